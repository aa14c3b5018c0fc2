"""LoRA and serial adapters through any layout of a pool give the losses and the weights of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.equivalence.test_pool import LAYOUTS, texts
from tests.equivalence.test_pool_training import AFTERWARDS, COUNT, PER_EPOCH, QUICK, DiedError, Notes, Outcome
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import ALL_MODELS, UNVERIFIED_MODELS
from tidelock.backbone.local import LocalBackbone
from tidelock.device.bank import BankPass
from tidelock.device.in_flight import PassSettings
from tidelock.device.model import DeviceModel
from tidelock.errors import PeerError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.methods import ModuleConfig
from tidelock.pool.block_stage import BlockStage
from tidelock.pool.full_part import FullConfig
from tidelock.pool.job import PoolJob
from tidelock.pool.layout import PoolLayout
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Pipeline
from tidelock.pool.recipe import Progress, Recipe
from tidelock.pool.side_stage import padded
from tidelock.pool.train import PoolTraining

CONFIGS: dict[str, ModuleConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=8, target_modules=["*"]),
    "adapter": AdapterConfig(bottleneck=3, places=("mlp", "attn-out")),
}
# Both of them drop out too.
DROPPING: dict[str, ModuleConfig] = {
    "lora, dropping": LoraConfig(r=2, lora_alpha=8, target_modules=["*"], lora_dropout=0.3),
    "adapter, dropping": AdapterConfig(bottleneck=3, places=("mlp", "attn-out"), dropout=0.3),
}
ALL_CONFIGS = CONFIGS | DROPPING
# With steps of 1e-2 Adam makes more than 1e-4 of a loss out of rounding before a run ends.
RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=3e-3, warmup_steps=2, clip=0.5)


def device_model(folder: Path, config: ModuleConfig, num_labels: int | None = None) -> DeviceModel:
    """Return the model that `tidelock train` would train, with modules that already do something."""
    checkpoint = Checkpoint.open(str(folder))
    backbone = LocalBackbone(load_cut_model(checkpoint, ModelChoice(str(folder))))
    model = DeviceModel(Ends(read_config(folder), checkpoint), backbone, config, num_labels=num_labels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def state_of(model: DeviceModel) -> dict[str, torch.Tensor]:
    """Return what is trained by its names in a pool."""
    return {name.removeprefix("bank."): value for name, value in model.state_dict().items()}


def drop_out(model: DeviceModel, seeds: list[int]) -> None:
    """Have a model take its next batch row by row, each with the masks that follow from a seed of its own."""
    given, parameters = iter(seeds), list(model.bank.parameters())
    model.settings = PassSettings(in_flight=1, micro_batches=len(seeds))
    model.open_sites = lambda: BankPass(  # type: ignore[method-assign]
        model.bank, parameters, training=True, dropout_seed=next(given)
    )


def batches() -> list[list[int]]:
    """Return which examples each step of a run learns from."""
    orders = [RECIPE.order(COUNT, epoch) for epoch in range(RECIPE.epochs)]
    size = RECIPE.batch_size
    return [order[first : first + size] for order in orders for first in range(0, COUNT, size)]


def share_of_peak(done: int) -> float:
    """Return how much of the peak the learning rate is after so many steps."""
    steps, warm = RECIPE.epochs * RECIPE.steps_per_epoch(COUNT), RECIPE.warmup_steps
    return done / warm if done < warm else (steps - done) / (steps - warm)


def one_process(
    folder: Path, config: ModuleConfig, num_labels: int | None = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train as a person would, on the batches that the pool has."""
    model, losses, rows = device_model(folder, config, num_labels), [], texts(COUNT, num_labels)
    adam = torch.optim.AdamW(model.parameters(), lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    for done, batch in enumerate(batches()):
        adam.param_groups[0]["lr"] = RECIPE.learning_rate * share_of_peak(done)
        if model.bank.has_dropout:
            drop_out(model, RECIPE.dropout_seeds(done, batch))
        loss = model(**padded([rows[number] for number in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return state_of(model), losses


def run_in_pool(
    folder: Path,
    config: ModuleConfig | FullConfig,
    layout: PoolLayout,
    begin: Progress | None = None,
    *,
    num_labels: int | None = None,
    dies_at: str | None = None,
    changes_after: int | None = None,
) -> list[Outcome]:
    """Return what each peer saw of a round; the last one dies where it is told to, and is left out."""
    fresh = {} if isinstance(config, FullConfig) else state_of(device_model(folder, config, num_labels))
    first = begin or Progress(0, fresh, {})

    def work(peers: Peers) -> Outcome:
        leads, is_last = peers.peer == 0, peers.peer == peers.count - 1
        notes = Notes(first.steps, dies_at if is_last else None, changes_after if leads else None)
        source, rows = Checkpoint.open(str(folder)), texts(COUNT, num_labels)
        job = PoolJob("tiny", source, config, first, rows, RECIPE, 2, None, num_labels=num_labels)
        training, trained, error = PoolTraining(peers, layout, job, notes), None, None
        try:
            trained = training.run()
        except PeerError as lost:
            error = lost.with_traceback(None)
        finally:
            peers.close()
        state = None if trained is None else dict(training.progress.parameters)
        return Outcome(notes, training.progress, state, error)

    outcomes = in_pool(layout.num_peers, work)
    died = [outcome for outcome in outcomes if isinstance(outcome, DiedError)]
    assert len(died) == (dies_at is not None)
    return all_of([outcome for outcome in outcomes if outcome not in died])


def assert_is_that_of_one_process(
    folder: Path, config: ModuleConfig, state: dict[str, torch.Tensor], num_labels: int | None = None
) -> None:
    expected, _ = one_process(folder, config, num_labels)
    start = state_of(device_model(folder, config, num_labels))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not torch.equal(state[name], start[name]), name
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("method", "layout", "num_labels"),
    [
        *(("lora", layout, None) for layout in LAYOUTS),
        *(pytest.param("lora", layout, 3, marks=[] if layout in QUICK else pytest.mark.slow) for layout in LAYOUTS),
        ("lora", "hybrid", 1),
        *(
            pytest.param("adapter", layout, labels, marks=[] if layout == "hybrid" else pytest.mark.slow)
            for labels in (None, 3)
            for layout in LAYOUTS
        ),
        *(
            pytest.param("lora, dropping", layout, None, marks=[] if layout in QUICK else pytest.mark.slow)
            for layout in LAYOUTS
        ),
        ("adapter, dropping", "hybrid", 3),
    ],
)
def test_a_run_is_that_of_one_process(method: str, layout: str, num_labels: int | None, tiny_models: Path) -> None:
    folder, config = tiny_models / "llama", ALL_CONFIGS[method]
    _, losses = one_process(folder, config, num_labels)
    outcomes = run_in_pool(folder, config, LAYOUTS[layout], num_labels=num_labels)
    first = outcomes[0].state
    assert first is not None
    for outcome in outcomes:
        assert outcome.state is not None
        assert outcome.notes.losses == pytest.approx(losses, rel=1e-4)
        assert all(torch.equal(outcome.state[name], first[name]) for name in first)
        assert (outcome.notes.sent, outcome.notes.filled) == ([], [])
    assert_is_that_of_one_process(folder, config, first, num_labels)


@pytest.mark.parametrize("method", DROPPING)
def test_it_drops_out_otherwise_in_every_step_and_not_when_it_measures(method: str, tiny_models: Path) -> None:
    folder, config, batch = tiny_models / "llama", DROPPING[method], texts(4, None)
    model, layout = device_model(folder, config), LAYOUTS["straight pipeline"]
    model.eval()
    undropped = float(model(**padded(batch)).loss.detach())
    steps = [RECIPE.dropout_seeds(step, range(4)) for step in (0, 1, 0)]

    def work(peers: Peers) -> tuple[float, list[float]]:
        number = layout.stage_of(peers.peer)
        assert number is not None
        stage = BlockStage.load(Checkpoint.open(str(folder)), config, layout.stages[number].blocks)
        stage.load_whole(state_of(model))
        pipeline = Pipeline(peers, layout, number, stage)
        return pipeline.measure(batch).loss, [pipeline.run(batch, seeds) for seeds in steps]

    for measured, (first, second, again) in all_of(in_pool(layout.num_peers, work)):
        assert measured == pytest.approx(undropped, rel=1e-5)
        assert first == again
        assert len({round(loss, 3) for loss in (measured, first, second)}) == 3


SOME_LAYERS: dict[str, ModuleConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "adapter": AdapterConfig(bottleneck=3, layers=(2,)),
}


def assert_gradients_equal(
    folder: Path, config: ModuleConfig, layout: PoolLayout, num_labels: int | None = None
) -> list[bool]:
    """Compare a batch's loss and gradients; return whether each peer is sent something back."""
    batch, model = texts(4, num_labels), device_model(folder, config, num_labels)
    loss = model(**padded(batch)).loss
    loss.backward()
    whole = state_of(model)

    def work(peers: Peers) -> tuple[float, dict[str, torch.Tensor], bool]:
        number = layout.stage_of(peers.peer)
        assert number is not None
        stage = BlockStage.load(Checkpoint.open(str(folder)), config, layout.stages[number].blocks, num_labels)
        stage.load_whole(whole)
        found = Pipeline(peers, layout, number, stage).run(batch)
        gradients = {name: parameter.grad for name, parameter in stage.trained().items() if parameter.grad is not None}
        return found, gradients, stage.after.backward is not None

    results = all_of(in_pool(layout.num_peers, work))
    for found, _, _ in results:
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {name: value for _, by_name, _ in results for name, value in by_name.items()}
    parameters = {name.removeprefix("bank."): parameter for name, parameter in model.named_parameters()}
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        # One process that computes the tiny Gemma's rows one by one has gradients 8e-4 of the largest off.
        atol = 2e-3 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=atol, msg=name)
    return [is_sent for _, _, is_sent in results]


@pytest.mark.parametrize("num_labels", [None, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_family_gives_the_gradients_of_one_process(name: str, num_labels: int | None, tiny_models: Path) -> None:
    for method, config in CONFIGS.items():
        if method == "lora" or name not in UNVERIFIED_MODELS:  # of those no outputs of linears are known
            assert_gradients_equal(tiny_models / name, config, LAYOUTS["hybrid"], num_labels)


@pytest.mark.parametrize("method", SOME_LAYERS)
def test_nothing_is_sent_back_to_where_nothing_learns(method: str, tiny_models: Path) -> None:
    are_sent = assert_gradients_equal(tiny_models / "llama", SOME_LAYERS[method], LAYOUTS["straight pipeline"])
    assert are_sent == ([True] * 3 if method == "lora" else [False, True, True])


@pytest.mark.parametrize(
    ("method", "steps", "num_labels"),
    [
        *(("lora", steps, None) for steps in (2, 4, 9)),  # in the first epoch, in a later one, and at the end
        ("lora", 4, 3),
        ("lora, dropping", 4, None),
    ],
)
def test_a_run_goes_on_bit_for_bit(method: str, steps: int, num_labels: int | None, tiny_models: Path) -> None:
    folder, config, layout = tiny_models / "llama", ALL_CONFIGS[method], LAYOUTS["hybrid"]
    whole = run_in_pool(folder, config, layout, num_labels=num_labels)
    state, notes = whole[0].state, whole[0].notes
    assert state is not None
    assert list(notes.saved) == [2, 4, 6, 8, 9]
    for later in run_in_pool(folder, config, layout, notes.saved[steps], num_labels=num_labels):
        assert later.state is not None
        assert later.notes.losses == notes.losses[steps:]
        assert all(torch.equal(later.state[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("method", "dies_at", "goes_on_from", "num_labels"),
    [
        *(("adapter", *case, None) for case in (("step 1", 0), ("save 2", 2), ("step 7", 6))),
        ("adapter", "step 7", 6, 3),
        ("adapter, dropping", "step 7", 6, None),
    ],
)
def test_the_others_go_on_without_a_lost_peer(
    method: str, dies_at: str, goes_on_from: int, num_labels: int | None, tiny_models: Path
) -> None:
    folder, config = tiny_models / "llama", ALL_CONFIGS[method]
    left = run_in_pool(folder, config, LAYOUTS["hybrid"], num_labels=num_labels, dies_at=dies_at)
    assert all(outcome.error is not None for outcome in left)
    assert left[0].progress.steps == goes_on_from
    for outcome in run_in_pool(folder, config, AFTERWARDS[len(left)], left[0].progress, num_labels=num_labels):
        assert outcome.state is not None
        assert outcome.notes.first + len(outcome.notes.losses) == RECIPE.epochs * PER_EPOCH
        assert_is_that_of_one_process(folder, config, outcome.state, num_labels)


def test_a_pool_grows_between_two_steps(tiny_models: Path) -> None:
    folder, config = tiny_models / "llama", CONFIGS["lora"]
    before = run_in_pool(folder, config, AFTERWARDS[2], changes_after=5)
    for outcome in before:
        assert outcome.progress.steps == 5
        assert (outcome.state, outcome.error) == (None, None)
    for outcome in run_in_pool(folder, config, AFTERWARDS[3], before[0].progress):
        assert outcome.state is not None
        assert_is_that_of_one_process(folder, config, outcome.state)
