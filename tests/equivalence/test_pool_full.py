"""Full fine-tuning through any layout of a pool is that of `transformers`' own model in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.equivalence.test_pool import LAYOUTS, texts
from tests.equivalence.test_pool_blocks import RECIPE, batches, run_in_pool, share_of_peak
from tests.equivalence.test_pool_training import AFTERWARDS, COUNT, PER_EPOCH
from tests.support.parity import plain_model
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import ALL_MODELS
from tidelock.model.checkpoint import Checkpoint
from tidelock.pool.block_stage import BlockStage
from tidelock.pool.full_part import FullConfig
from tidelock.pool.layout import PoolLayout
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Pipeline
from tidelock.pool.recipe import Progress
from tidelock.pool.side_stage import padded
from tidelock.pool.trained import TrainedModel

CONFIG = FullConfig()
TIED = "smollm3"  # without key biases, whose gradients are rounding alone: nothing depends on them


def begun_model(folder: Path, num_labels: int | None) -> PreTrainedModel:
    """Return `transformers`' model as a run begins with it, its head for whole texts among it."""
    model = plain_model(folder, num_labels)
    if num_labels is not None:
        with torch.no_grad():
            model.get_parameter("score.weight").copy_(fresh_head(num_labels))
    return model


def fresh_head(num_labels: int) -> torch.Tensor:
    return torch.randn(num_labels, 32, generator=torch.Generator().manual_seed(3)) * 0.3


def own_name(name: str) -> str:
    """Return what a pool calls a parameter of `transformers`' model."""
    return "head.weight" if name == "score.weight" else name


def one_process(folder: Path, num_labels: int | None = None) -> tuple[PreTrainedModel, list[float]]:
    model, losses, rows = begun_model(folder, num_labels), [], texts(COUNT, num_labels)
    adam = torch.optim.AdamW(model.parameters(), lr=RECIPE.learning_rate, weight_decay=0.0)
    for done, batch in enumerate(batches()):
        adam.param_groups[0]["lr"] = RECIPE.learning_rate * share_of_peak(done)
        loss = model(**padded([rows[number] for number in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


def assert_gradients_equal(folder: Path, layout: PoolLayout, num_labels: int | None = None) -> None:
    batch, model = texts(4, num_labels), begun_model(folder, num_labels)
    loss = model(**padded(batch)).loss
    loss.backward()

    def work(peers: Peers) -> tuple[float, dict[str, torch.Tensor]]:
        number = layout.stage_of(peers.peer)
        assert number is not None
        stage = BlockStage.load(Checkpoint.open(str(folder)), CONFIG, layout.stages[number].blocks, num_labels)
        stage.load_whole({} if num_labels is None else {"head.weight": fresh_head(num_labels)})
        found = Pipeline(peers, layout, number, stage).run(batch)
        return found, {name: p.grad for name, p in stage.trained().items() if p.grad is not None}

    results = all_of(in_pool(layout.num_peers, work))
    assert [found for found, _ in results] == pytest.approx([float(loss.detach())] * layout.num_peers, rel=1e-5)
    gradients = {name: value for _, by_name in results for name, value in by_name.items()}
    expected = {own_name(name): parameter for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for _, by_name in results:  # a tied weight has the same gradient on all who have it
        assert all(torch.equal(value, gradients[name]) for name, value in by_name.items())
    for name, parameter in expected.items():
        assert parameter.grad is not None
        # As far off as one process is that computes the tiny Gemma's rows one by one.
        atol = 2e-3 * float(parameter.grad.abs().max()) + 1e-7
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_family_gives_the_gradients_of_one_process(name: str, tiny_models: Path) -> None:
    assert_gradients_equal(tiny_models / name, LAYOUTS["hybrid"])


@pytest.mark.parametrize("layout", ["alone", "straight pipeline", "hybrid"])
@pytest.mark.parametrize("name", [TIED, "llama"])
def test_with_a_head_for_whole_texts_too(name: str, layout: str, tiny_models: Path) -> None:
    assert_gradients_equal(tiny_models / name, LAYOUTS[layout], num_labels=3)


def test_the_tied_one_is_tied(tiny_models: Path) -> None:
    tied, other = plain_model(tiny_models / TIED), plain_model(tiny_models / "llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert other.get_output_embeddings().weight is not other.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "layout", "num_labels"),
    [
        *((TIED, layout, None) for layout in ("alone", "data parallel", "straight pipeline", "hybrid")),
        *((name, "hybrid", labels) for name in (TIED, "llama") for labels in (3, 1)),
        *(
            pytest.param(name, layout, None, marks=pytest.mark.slow)
            for name in (TIED, "llama")
            for layout in LAYOUTS
            if name == "llama" or layout in {"uneven shares", "one without blocks", "hybrid, uneven groups"}
        ),
    ],
)
def test_a_run_is_that_of_one_process(
    name: str, layout: str, num_labels: int | None, tiny_models: Path, tmp_path: Path
) -> None:
    folder = tiny_models / name
    model, losses = one_process(folder, num_labels)
    begin = None if num_labels is None else Progress(0, {"head.weight": fresh_head(num_labels)}, {})
    lead, *others = run_in_pool(folder, CONFIG, LAYOUTS[layout], begin, num_labels=num_labels)
    for outcome in (lead, *others):
        assert outcome.notes.losses == pytest.approx(losses, rel=1e-4)
    assert all(not other.progress.parameters for other in others)  # only peer 0 needs it
    assert_is_that_of_one_process(folder, model, lead.state, tmp_path, num_labels)


def assert_is_that_of_one_process(
    folder: Path,
    expected: PreTrainedModel,
    state: dict[str, torch.Tensor] | None,
    tmp_path: Path,
    num_labels: int | None = None,
) -> None:
    """Compare what was trained, once it has been written and read as any model."""
    assert state is not None
    TrainedModel(folder, state).save_adapter(tmp_path / "model")
    start, found = (
        dict(begun_model(folder, num_labels).named_parameters()),
        dict(plain_model(tmp_path / "model", num_labels).named_parameters()),
    )
    moved = 0
    for name, parameter in expected.named_parameters():
        moved += not torch.equal(found[name], start[name])
        torch.testing.assert_close(found[name], parameter, rtol=1e-2, atol=2e-4, msg=name)
    assert moved == len(found)


def test_a_run_goes_on_bit_for_bit(tiny_models: Path) -> None:
    folder, layout = tiny_models / TIED, LAYOUTS["hybrid"]
    whole, *_ = run_in_pool(folder, CONFIG, layout)
    assert whole.state is not None
    lead, *_ = run_in_pool(folder, CONFIG, layout, whole.notes.saved[4])
    assert lead.state is not None
    assert lead.notes.losses == whole.notes.losses[4:]
    assert all(torch.equal(lead.state[name], value) for name, value in whole.state.items())


def test_the_others_go_on_without_a_lost_peer(tiny_models: Path, tmp_path: Path) -> None:
    folder = tiny_models / TIED
    left = run_in_pool(folder, CONFIG, LAYOUTS["hybrid"], dies_at="step 3")
    assert left[0].progress.steps == 2
    lead, *_ = run_in_pool(folder, CONFIG, AFTERWARDS[len(left)], left[0].progress)
    assert lead.notes.first + len(lead.notes.losses) == RECIPE.epochs * PER_EPOCH
    assert_is_that_of_one_process(folder, one_process(folder)[0], lead.state, tmp_path)
