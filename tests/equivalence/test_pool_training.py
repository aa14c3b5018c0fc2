"""A whole run in a pool gives the side network of one process: an epoch through a pipeline, then cached epochs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.equivalence.test_pool import CONFIG, LAYOUTS, examples, state_of, texts
from tests.support.plain_side import side_model
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import BLOCKS
from tidelock.cache.config import CacheConfig
from tidelock.cache.folder import CacheFolder
from tidelock.cache.identity import CacheIdentity
from tidelock.data.batch import Collator
from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.side_model import SideModel
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.errors import MemoryExceeded, PeerError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import read_config
from tidelock.model.sizes import sizes_of
from tidelock.pool.example import Example
from tidelock.pool.held_out import HeldOut, Measured
from tidelock.pool.job import PoolJob
from tidelock.pool.layout import PoolLayout, Stage, one_forward_one_backward
from tidelock.pool.memory import MemoryLimit
from tidelock.pool.peers import Peers
from tidelock.pool.recipe import Progress, Recipe
from tidelock.pool.redistribute import Kept
from tidelock.pool.side_stage import padded
from tidelock.pool.timeline import Activity, Timeline, summary
from tidelock.pool.train import PoolTraining

RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=1e-2, warmup_steps=2, clip=0.5)
COUNT = 10
# The layouts that are always tried where all are tried with something else too.
QUICK = ("data parallel", "straight pipeline", "hybrid")


@dataclass(frozen=True)
class Beside:
    """What a side network stands beside, and what it learns from."""

    model: Callable[[Path], SideModel | SideSeq2SeqModel]
    examples: Callable[[int], list[Example]]


def decoder(num_labels: int | None) -> Beside:
    """Return a decoder as a run begins with it; a head for whole texts is drawn from the global generator."""

    def begun_model(folder: Path) -> SideModel:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return side_model(folder, CONFIG, num_labels)

    return Beside(begun_model, lambda count: texts(count, num_labels))


class Notes:
    """Takes notes, and has its peer die or the pool change where it is told to."""

    def __init__(self, steps: int, dies_at: str | None = None, changes_after: int | None = None) -> None:
        self.first = steps
        self.saved: dict[int, Progress] = {}
        self.losses: list[float] = []
        self.sent: list[int] = []
        self.filled: list[int] = []
        self.evaluated_at: dict[int, float] = {}
        self.outputs_at: dict[int, torch.Tensor] = {}
        self.owed: list[int] = []
        self.activities: dict[int, list[Activity]] = {}
        self.timeline: tuple[int, list[Timeline]] | None = None
        self.dies_at, self.changes_after = dies_at, changes_after

    def step(self, step: int, loss: float) -> None:
        assert step == self.first + len(self.losses) + 1
        self.losses.append(loss)
        self._may_die(f"step {step}")

    def save(self, progress: Progress) -> None:
        copied = {kind: {n: t.clone() for n, t in values.items()} for kind, values in progress.moments.items()}
        parameters = {name: tensor.clone() for name, tensor in progress.parameters.items()}
        self.saved[progress.steps] = Progress(progress.steps, parameters, copied)
        self._may_die(f"save {progress.steps}")

    def evaluated(self, step: int, found: Measured) -> None:
        assert step not in self.evaluated_at
        self.evaluated_at[step], self.outputs_at[step] = found.loss, found.outputs_BC
        self._may_die(f"evaluation {step}")

    def owes_evaluation(self, step: int) -> bool:
        self.owed.append(step)
        return True

    def activity(self, step: int, of_peers: list[Activity]) -> None:
        self.activities[step] = of_peers

    def timelines(self, step: int, of_peers: list[Timeline]) -> None:
        self.timeline = (step, of_peers)

    def fill(self, examples: int) -> None:
        self.filled.append(examples)
        self._may_die("fill")

    def redistributed(self, sent_bytes: int) -> None:
        self.sent.append(sent_bytes)
        self._may_die("redistributed")

    def wants_change(self) -> bool:
        return self.first + len(self.losses) == self.changes_after

    def _may_die(self, where: str) -> None:
        if where == self.dies_at:
            raise DiedError


class DiedError(Exception):
    """What a peer dies of."""


@dataclass
class Outcome:
    """What a peer saw of a round."""

    notes: Notes
    progress: Progress
    state: dict[str, torch.Tensor] | None
    error: PeerError | None


def run_in_pool(
    folder: Path,
    layout: PoolLayout,
    tmp_path: Path,
    begin: Progress | None = None,
    *,
    places: Sequence[int] | None = None,
    held_out: HeldOut | None = None,
    recipe: Recipe = RECIPE,
    beside: Beside | None = None,
    num_labels: int | None = None,
    **lead: Any,
) -> list[Outcome]:
    """Return what each peer saw of a round; those that died are left out.

    Args:
        folder: The model's.
        layout: Who computes what.
        tmp_path: Where the peers' caches are.
        begin: From where.
        places: Number of each peer's cache; by default that of the peer.
        held_out: What it is measured on.
        recipe: How it is trained; with another one than `RECIPE` no checkpoint is written within an epoch.
        beside: What kind of model it is; a decoder if it is not said.
        num_labels: Of a decoder's head for whole texts.
        lead: `dies_at` of the last peer, `grows_after` so many steps beyond its memory, `changes_after` of peer 0.
    """
    kind = beside or decoder(num_labels)
    first = begin or Progress(0, state_of(kind.model(folder)), {})
    num_blocks = sizes_of(read_config(folder)).num_blocks

    def work(peers: Peers) -> Outcome:
        place = tmp_path / str(peers.peer if places is None else places[peers.peer])

        def open_cache(taps):
            identity = CacheIdentity("0" * 64, "1" * 64, "fp32", taps, None, "fp32")
            return CacheConfig(place, key=tmp_path / f"key{place.name}").open(identity)

        there = [range(found.taps[0], found.taps[-1] + 1) for _, found in CacheFolder(place).groups() if found]
        dies_at = lead.get("dies_at") if peers.peer == peers.count - 1 else None
        notes = Notes(first.steps, dies_at, lead.get("changes_after") if peers.peer == 0 else None)
        kept, looks = Kept(open_cache, there, num_blocks), itertools.count()
        most_steps = lead.get("grows_after", RECIPE.epochs * PER_EPOCH) if peers.peer == peers.count - 1 else COUNT
        # The first two looks are at what there was before, and at the blocks.
        memory = MemoryLimit(10, lambda: 11 if next(looks) > 1 and len(notes.losses) >= most_steps else 0)
        save_every = 2 if recipe == RECIPE else COUNT
        source, measured, rows = Checkpoint.open(str(folder)), held_out or HeldOut(), kind.examples(COUNT)
        job = PoolJob("tiny", source, CONFIG, first, rows, recipe, save_every, kept, measured, memory, num_labels)
        training, trained, error = PoolTraining(peers, layout, job, notes), None, None
        try:
            trained = training.run()
        except PeerError as lost:
            error = lost.with_traceback(None)  # which would keep the round's connections open
        finally:
            peers.close()
        state = state_of(trained) if isinstance(trained, BesideBlocks) else None
        return Outcome(notes, training.progress, state, error)

    outcomes = in_pool(layout.num_peers, work)
    died = [outcome for outcome in outcomes if isinstance(outcome, DiedError | MemoryExceeded)]
    assert len(died) == ("dies_at" in lead or "grows_after" in lead)
    return all_of([outcome for outcome in outcomes if outcome not in died])


def one_process(
    folder: Path,
    recipe: Recipe = RECIPE,
    measure: Callable[[int, SideModel | SideSeq2SeqModel], None] | None = None,
    beside: Beside | None = None,
    num_labels: int | None = None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train as a person would, on the batches that the pool has; measure after each step."""
    kind = beside or decoder(num_labels)
    model, losses = kind.model(folder), []
    rows, steps = kind.examples(COUNT), recipe.epochs * recipe.steps_per_epoch(COUNT)
    adam = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warm, order = recipe.warmup_steps, recipe.order(COUNT, 0)
    batches = [order[first : first + recipe.batch_size] for first in range(0, COUNT, recipe.batch_size)]
    for epoch in range(1, recipe.epochs):
        shards = recipe.shards(COUNT, epoch, 1)
        batches += [[n for shard in shards for n in shard[step]] for step in range(recipe.steps_per_epoch(COUNT))]
    for done, batch in enumerate(batches):
        adam.param_groups[0]["lr"] = recipe.learning_rate * (
            done / warm if done < warm else (steps - done) / (steps - warm)
        )
        loss = model(**padded([rows[number] for number in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
        if measure is not None:
            measure(done + 1, model)
    return state_of(model), losses


def assert_is_that_of_one_process(
    folder: Path, state: dict[str, torch.Tensor], beside: Beside | None = None, num_labels: int | None = None
) -> None:
    expected, _ = one_process(folder, beside=beside, num_labels=num_labels)
    start = state_of((beside or decoder(num_labels)).model(folder))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not torch.equal(state[name], start[name]), name
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("layout", "num_labels"),
    [
        *((layout, None) for layout in LAYOUTS),
        *(pytest.param(layout, 3, marks=[] if layout in QUICK else pytest.mark.slow) for layout in LAYOUTS),
        ("hybrid", 1),
    ],
)
def test_a_run_is_that_of_one_process(layout: str, num_labels: int | None, tiny_models: Path, tmp_path: Path) -> None:
    _, losses = one_process(tiny_models / "llama", num_labels=num_labels)
    outcomes = run_in_pool(tiny_models / "llama", LAYOUTS[layout], tmp_path, num_labels=num_labels)
    first = outcomes[0].state
    assert first is not None
    for outcome in outcomes:
        assert outcome.state is not None
        assert outcome.notes.losses == pytest.approx(losses, rel=1e-4)
        assert all(torch.equal(outcome.state[name], first[name]) for name in first)
        assert len(outcome.notes.sent) == 1
        assert outcome.notes.filled == []
    assert_is_that_of_one_process(tiny_models / "llama", first, num_labels=num_labels)


HELD_OUT = examples(COUNT + 6)[COUNT:]


@pytest.fixture(scope="module")
def evaluations_of_one_process(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return what `transformers.Trainer` measures after each step of one process."""
    found: dict[int, float] = {}
    rows = [{"input_ids": list(example.input_ids), "labels": example.labels} for example in HELD_OUT]
    where = str(tmp_path_factory.mktemp("trainer"))
    arguments = TrainingArguments(where, per_device_eval_batch_size=RECIPE.batch_size, use_cpu=True)

    def measure(step: int, model: SideModel | SideSeq2SeqModel) -> None:
        trainer = Trainer(model, arguments, data_collator=Collator(0), eval_dataset=rows)
        found[step] = trainer.evaluate()["eval_loss"]

    one_process(tiny_models / "llama", measure=measure)
    assert len({round(loss, 4) for loss in found.values()}) == len(found)
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name != "hybrid" else []) for name in LAYOUTS]
)
@pytest.mark.parametrize(
    ("every", "steps"),
    [
        pytest.param(2, [2, 4, 6, 8, 9], id="first through the stages"),
        pytest.param(4, [4, 8, 9], id="first in a cached epoch", marks=pytest.mark.slow),
    ],
)
def test_what_it_measures_is_what_one_process_does(
    layout: str,
    every: int,
    steps: list[int],
    evaluations_of_one_process: dict[int, float],
    tiny_models: Path,
    tmp_path: Path,
) -> None:
    held_out, expected = HeldOut(HELD_OUT, RECIPE.batch_size, every), evaluations_of_one_process
    undisturbed = run_in_pool(tiny_models / "llama", LAYOUTS[layout], tmp_path / "alone")[0]
    outcomes = run_in_pool(tiny_models / "llama", LAYOUTS[layout], tmp_path / "pool", held_out=held_out)
    assert undisturbed.state is not None
    for outcome in outcomes:
        assert outcome.notes.evaluated_at == pytest.approx({step: expected[step] for step in steps}, rel=1e-4)
        assert outcome.notes.filled == ([len(HELD_OUT)] if steps[0] > PER_EPOCH else [])
        assert outcome.notes.owed == []
        assert outcome.state is not None
        assert all(torch.equal(outcome.state[name], value) for name, value in undisturbed.state.items())


@pytest.mark.parametrize(("layout", "num_labels"), [("hybrid", 3), ("one without blocks", 1)])
def test_what_a_head_for_whole_texts_gives_is_measured(
    layout: str, num_labels: int, tiny_models: Path, tmp_path: Path
) -> None:
    """In the order of the examples, in the first epoch and in a cached one; and how far off that is."""
    rows, expected = texts(COUNT + 6, num_labels)[COUNT:], {}

    @torch.no_grad()
    def measure(step: int, model: SideModel | SideSeq2SeqModel) -> None:
        found = model(**padded(rows))
        expected[step] = (float(found.loss), found.logits)

    one_process(tiny_models / "llama", measure=measure, num_labels=num_labels)
    # In batches of as many, so that the mean of their losses is that of all.
    for outcome in run_in_pool(
        tiny_models / "llama", LAYOUTS[layout], tmp_path, num_labels=num_labels, held_out=HeldOut(rows, 3, 2)
    ):
        assert list(outcome.notes.evaluated_at) == [2, 4, 6, 8, 9]
        for step, loss in outcome.notes.evaluated_at.items():
            assert loss == pytest.approx(expected[step][0], rel=1e-4)
            torch.testing.assert_close(outcome.notes.outputs_at[step], expected[step][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("dies_at", "goes_on_from", "is_owed"),
    [
        ("evaluation 2", 2, True),  # after the checkpoint of that step, through the stages
        pytest.param("evaluation 4", 4, True, marks=pytest.mark.slow),
        ("evaluation 9", 9, True),  # when there is nothing else left to do
        # One that was done is asked for: whoever has written it down says no.
        pytest.param("step 3", 2, True, marks=pytest.mark.slow),
        pytest.param("step 2", 0, False, marks=pytest.mark.slow),
    ],
)
def test_a_peer_lost_while_measuring(
    dies_at: str,
    goes_on_from: int,
    is_owed: bool,
    evaluations_of_one_process: dict[int, float],
    tiny_models: Path,
    tmp_path: Path,
) -> None:
    folder, held_out = tiny_models / "llama", HeldOut(HELD_OUT, RECIPE.batch_size, 2)
    expected = evaluations_of_one_process
    left = run_in_pool(folder, LAYOUTS["hybrid"], tmp_path, held_out=held_out, dies_at=dies_at)
    assert left[0].progress.steps == goes_on_from
    again = run_in_pool(folder, AFTERWARDS[2], tmp_path, left[0].progress, held_out=held_out)
    due = [step for step in (2, 4, 6, 8, 9) if step >= goes_on_from]
    for outcome in again:
        assert outcome.notes.owed == ([goes_on_from] if is_owed else [])
        assert outcome.notes.evaluated_at == pytest.approx({step: expected[step] for step in due}, rel=1e-4)
        assert outcome.state is not None
        assert_is_that_of_one_process(folder, outcome.state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_peer_notes_what_it_does_in_a_step(layout: str, tiny_models: Path, tmp_path: Path) -> None:
    whole = LAYOUTS[layout]
    notes, *others = [o.notes for o in run_in_pool(tiny_models / "llama", whole, tmp_path, changes_after=2)]
    assert all(other.timeline is None for other in others)
    assert notes.timeline is not None
    step, timelines = notes.timeline
    assert step == 2
    assert [timeline.peer for timeline in timelines] == list(range(whole.num_peers))
    lines = summary(timelines)
    for timeline, line in zip(timelines, lines, strict=True):
        assert timeline.memory_bytes > 0
        assert timeline.stage == whole.stage_of(timeline.peer)
        if timeline.stage is None:
            assert line.startswith(f"Peer {timeline.peer}, without blocks: ")
            continue
        stage, last = whole.stages[timeline.stage], len(whole.stages) - 1
        # What it computed, in order: as many rows as it has have each a micro-batch.
        mine = {
            number
            for number, by_stage in enumerate(whole.rows_of(RECIPE.batch_size))
            if by_stage[timeline.stage][timeline.peer]
        }
        computed = [(bar.work, bar.micro_batch) for bar in timeline.bars if bar.work in {"forward", "backward"}]
        order = one_forward_one_backward(min(whole.micro_batches, RECIPE.batch_size), stage.in_flight)
        assert computed == [(work, number) for work, number in order if number in mine]
        waited = {bar.work for bar in timeline.bars} - {"forward", "backward", "all-reduce"}
        assert waited == {
            *(["wait-forward"] if mine and timeline.stage > 0 else []),
            *(["wait-backward"] if mine and timeline.stage < last else []),
        }
        ends = [0.0, *(moment for bar in timeline.bars for moment in (bar.begin, bar.end))]
        assert ends == sorted(ends)
        assert f"Peer {timeline.peer}, stage {timeline.stage + 1}: computing " in line
        assert ("waiting for stage" in line) == bool(last and mine)


def test_peers_tell_each_other_in_short_what_they_do(tiny_models: Path, tmp_path: Path) -> None:
    layout = LAYOUTS["hybrid"]
    notes, *others = [o.notes for o in run_in_pool(tiny_models / "llama", layout, tmp_path)]
    assert all(other.activities == notes.activities for other in others)
    assert list(notes.activities) == [2, 5]  # through the stages, and from the cache
    assert notes.timeline is not None
    for found, line in zip(notes.activities[2], summary(notes.timeline[1]), strict=True):
        assert found.stage == layout.stage_of(found.peer)
        assert found.said().partition(";")[0] == line.partition(";")[0]
    for found in notes.activities[5]:
        assert (found.stage, found.waiting_before, found.waiting_after) == (None, 0, 0)
        assert found.memory_bytes > 0
        shares = (found.computing, found.summing, found.idle)
        assert all(share >= 0 for share in shares)
        assert sum(shares) == pytest.approx(1)
        assert found.said().startswith(f"Peer {found.peer}: computing ")


@pytest.mark.parametrize("steps", [2, 3, 4, 8])  # in the first epoch, at its end, and in later ones
@pytest.mark.parametrize(("layout", "num_labels"), [("hybrid", None), ("one without blocks", None), ("hybrid", 3)])
def test_a_run_goes_on_bit_for_bit(
    layout: str, num_labels: int | None, steps: int, tiny_models: Path, tmp_path: Path
) -> None:
    folder = tiny_models / "llama"
    whole = run_in_pool(folder, LAYOUTS[layout], tmp_path, num_labels=num_labels)
    state, notes = whole[0].state, whole[0].notes
    assert state is not None
    assert list(notes.saved) == [2, 3, 4, 6, 8]
    for later in run_in_pool(folder, LAYOUTS[layout], tmp_path, notes.saved[steps], num_labels=num_labels):
        assert later.state is not None
        assert later.notes.losses == notes.losses[steps:]
        assert all(torch.equal(later.state[name], state[name]) for name in state)
        assert later.notes.sent == [0]
        assert later.notes.filled == []


# By how many are left; other cuts than those of `LAYOUTS`.
AFTERWARDS = {
    1: PoolLayout((Stage(range(BLOCKS), (0,), (1,)),), 2),
    2: PoolLayout((Stage(range(3), (1,), (1,), 2), Stage(range(3, BLOCKS), (0,), (1,))), 2),
    3: PoolLayout((Stage(range(2), (1,), (1,), 2), Stage(range(2, BLOCKS), (0, 2), (1, 1))), 2),
}
PER_EPOCH = 3


def lost_with_last(layout: PoolLayout, steps: int, *, is_shared: bool) -> int:
    """Return of how many examples of so many steps the last peer alone had what some block gave.

    Args:
        layout: By which they were computed.
        steps: Those that are not done again.
        is_shared: Whether peers have the outputs of what they learn from besides.
    """
    last, order, found = layout.num_peers - 1, RECIPE.order(COUNT, 0), 0
    owners = RECIPE.owners(COUNT, layout.num_peers)
    for first in range(0, min(steps * RECIPE.batch_size, COUNT), RECIPE.batch_size):
        batch = order[first : first + RECIPE.batch_size]
        for stages in layout.rows_of(len(batch)):
            gone = {row for by_peer in stages for row in by_peer.get(last, ())}
            found += sum(not is_shared or owners[batch[row]] == last for row in gone)
    return found


@pytest.mark.parametrize(
    ("dies_at", "goes_on_from"),
    [
        ("step 1", {0}),
        ("step 2", {0}),  # before the network was gathered
        ("save 2", {2}),
        ("step 3", {2}),
        ("save 3", {3}),
        ("redistributed", {3}),
        ("step 4", {3, 4}),  # whether the others had all that they needed for it is a race
        ("step 7", {6, 7}),
    ],
)
@pytest.mark.parametrize(
    "layout",
    ["hybrid", *(pytest.param(name, marks=pytest.mark.slow) for name in ("straight pipeline", "one without blocks"))],
)
def test_the_others_go_on_without_a_lost_peer(
    layout: str, dies_at: str, goes_on_from: set[int], tiny_models: Path, tmp_path: Path
) -> None:
    left = run_in_pool(tiny_models / "llama", LAYOUTS[layout], tmp_path, dies_at=dies_at)
    assert all(outcome.error is not None for outcome in left)
    progress = left[0].progress
    assert progress.steps in goes_on_from
    outcomes = run_in_pool(tiny_models / "llama", AFTERWARDS[len(left)], tmp_path, progress)
    for outcome in outcomes:
        assert outcome.state is not None
        assert outcome.notes.first == progress.steps
        assert outcome.notes.first + len(outcome.notes.losses) == RECIPE.epochs * PER_EPOCH
        filled = sum(outcome.notes.filled)
        most = lost_with_last(LAYOUTS[layout], progress.steps, is_shared=False)
        least = lost_with_last(LAYOUTS[layout], progress.steps, is_shared=True)
        if dies_at in {"step 4", "step 7"}:
            assert filled == least
        elif dies_at == "redistributed":
            assert least <= filled <= most
        else:
            assert filled == most
        assert_is_that_of_one_process(tiny_models / "llama", outcome.state)


@pytest.mark.parametrize("dies_at", ["save 2", "redistributed", "step 7"])
def test_a_head_for_whole_texts_is_not_lost_with_a_peer(dies_at: str, tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / "llama"
    left = run_in_pool(folder, LAYOUTS["straight pipeline"], tmp_path, num_labels=3, dies_at=dies_at)
    assert all(outcome.error is not None for outcome in left)  # the last one had the head
    for outcome in run_in_pool(folder, AFTERWARDS[2], tmp_path, left[0].progress, num_labels=3):
        assert outcome.state is not None
        assert_is_that_of_one_process(folder, outcome.state, num_labels=3)


def test_a_lost_peer_costs_fewer_than_five_steps(tiny_models: Path, tmp_path: Path) -> None:
    folder, recipe = tiny_models / "llama", replace(RECIPE, batch_size=1, epochs=1)
    left = run_in_pool(folder, LAYOUTS["hybrid"], tmp_path, recipe=recipe, dies_at="step 8")
    assert [list(outcome.notes.saved) for outcome in left] == [[], []]
    assert left[0].progress.steps == 5
    expected, losses = one_process(folder, recipe)
    for outcome in run_in_pool(folder, AFTERWARDS[2], tmp_path, left[0].progress, recipe=recipe):
        assert outcome.notes.losses == pytest.approx(losses[5:], rel=1e-3)
        assert outcome.state is not None
        for name, tensor in expected.items():
            torch.testing.assert_close(outcome.state[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_something_of_every_kind_is_lost() -> None:
    """Look whether the test before asserts what it says it does."""
    counts = {
        layout: [lost_with_last(LAYOUTS[layout], 3, is_shared=is_shared) for is_shared in (False, True)]
        for layout in ("hybrid", "straight pipeline", "one without blocks")
    }
    assert counts["one without blocks"] == [0, 0]
    assert counts["straight pipeline"][0] == COUNT
    assert 0 < counts["hybrid"][1] < counts["hybrid"][0] < COUNT


def test_blocks_that_are_run_again_may_be_lost_again(tiny_models: Path, tmp_path: Path) -> None:
    folder, layout = tiny_models / "llama", LAYOUTS["straight pipeline"]
    left = run_in_pool(folder, layout, tmp_path, dies_at="step 4")
    again = run_in_pool(folder, AFTERWARDS[2], tmp_path, left[0].progress, dies_at="fill")
    assert [outcome.notes.filled for outcome in again] == [[lost_with_last(layout, 3, is_shared=True)]]
    (alone,) = run_in_pool(folder, AFTERWARDS[1], tmp_path, again[0].progress)
    assert alone.state is not None
    assert_is_that_of_one_process(folder, alone.state)


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_a_pool_grows_between_two_steps(after: int, tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / "llama"
    before = run_in_pool(folder, AFTERWARDS[2], tmp_path, changes_after=after)
    for outcome in before:
        assert outcome.progress.steps == after
        assert (outcome.state, outcome.error) == (None, None)
    for outcome in run_in_pool(folder, AFTERWARDS[3], tmp_path, before[0].progress):
        assert outcome.state is not None
        assert outcome.notes.filled == []
        assert_is_that_of_one_process(folder, outcome.state)


@pytest.mark.parametrize("after", [0, pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_peer_that_takes_too_much_leaves_after_the_step(after: int, tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / "llama"
    left = run_in_pool(folder, AFTERWARDS[3], tmp_path, grows_after=after)
    for outcome in left:
        assert (outcome.state, outcome.error) == (None, None)
        assert outcome.progress.steps == after + 1
    for outcome in run_in_pool(folder, AFTERWARDS[2], tmp_path, left[0].progress):
        assert outcome.state is not None
        assert_is_that_of_one_process(folder, outcome.state)


def test_peers_may_come_back_with_other_numbers(tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / "llama"
    before = run_in_pool(folder, AFTERWARDS[3], tmp_path, changes_after=4)
    for outcome in run_in_pool(folder, AFTERWARDS[3], tmp_path, before[0].progress, places=(2, 0, 1)):
        assert outcome.state is not None
        assert outcome.notes.filled == []
        assert_is_that_of_one_process(folder, outcome.state)
