"""On a GPU: what is computed there is what a CPU computes, up to rounding, for whoever trains and from wherever."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.support.cloud_process import TOKEN
from tests.support.parity import randomise_adapter, relative_error, token_batch
from tests.support.plain_side import randomise_side
from tests.support.tiny_models import ALL_MODELS
from tidelock.cache.config import CacheConfig
from tidelock.cloud.memory import bytes_at_sites, measure_cost
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.service import Limits
from tidelock.cloud.tenants import Tenants
from tidelock.device.generate import GenerationSettings
from tidelock.device.model import DeviceModel
from tidelock.device.side_model import SideModel
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch, Walk
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.peft.side import SideConfig
from tidelock.run.connect import connect
from tidelock.run.connect_side import connect_side
from tidelock.wire.address import parse_listen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, says `torch.cuda.is_available()`")

# Of an fp32 gradient's norm; the two add up the same numbers in another order.
_TOLERANCE = 1e-4
_METHODS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=[ALL_PROJECTIONS]),
    "adapter": AdapterConfig(bottleneck=8),
    "core": CoreConfig(rank=8),
}


@pytest.fixture(scope="module")
def gpu_cloud(tiny_models: Path) -> Iterator[str]:
    """Return the address of a cloud that holds a tiny model on the GPU."""
    choice = ModelChoice(str(tiny_models / "llama"), torch_device="cuda")
    listener = Listener(parse_listen("127.0.0.1:0", tls=False))
    server = CloudServer(choice, Tenants({"anna": TOKEN}), listener, limits=Limits(max_sessions=16))
    yield server.start().url
    server.stop(0)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tiny_models: Path) -> Iterator[Any]:
    """Return `on_cpu(name, config)`: a model whose blocks are in this process, and not on the GPU."""
    opened: list[DeviceModel] = []

    def on_cpu(name: str, config: Any) -> DeviceModel:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            opened.append(connect("local", model=tiny_models / name, peft_config=config))
        randomise_adapter(opened[-1])
        return opened[-1]

    yield on_cpu
    for model in opened:
        model.close()


def _gradients(
    model: DeviceModel, padding: str, seed: int = 0, prefix: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    made = token_batch(padding, seed=seed, lengths=(prefix + 11, prefix + 7, prefix + 9), prefix=prefix)
    batch = {name: tensor.to(model.device) for name, tensor in made.arguments().items()}
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), _grads(model)


def _grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}


def _assert_close(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert relative_error(ours[1][name], gradient) < _TOLERANCE, name


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_a_cloud_on_a_gpu_gives_a_cpu_s_gradients(
    method: str, padding: str, gpu_cloud: str, tiny_models: Path, on_cpu: Any
) -> None:
    expected = _gradients(on_cpu("llama", _METHODS[method]), padding)
    model = connect(gpu_cloud, model=tiny_models / "llama", peft_config=_METHODS[method], token=TOKEN)
    randomise_adapter(model)
    assert model.device.type == "cpu"
    _assert_close(_gradients(model, padding), expected)
    model.close()


@pytest.mark.parametrize("where", ["local", "cloud"])
def test_a_prefix_that_rows_share_too(where: str, gpu_cloud: str, tiny_models: Path, on_cpu: Any) -> None:
    expected = _gradients(on_cpu("llama", _METHODS["lora"]), "right", prefix=10)
    at, config = gpu_cloud if where == "cloud" else "local", _METHODS["lora"]
    for share in (False, True):
        model = connect(at, model=tiny_models / "llama", peft_config=config, token=TOKEN, share_prefix=share)
        randomise_adapter(model)
        _assert_close(_gradients(model, "right", prefix=10), expected)
        model.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_local_blocks_on_a_gpu_give_a_cpu_s_gradients(name: str, device: str, tiny_models: Path, on_cpu: Any) -> None:
    expected = _gradients(on_cpu(name, _METHODS["lora"]), "right")
    model = connect("local", model=tiny_models / name, peft_config=_METHODS["lora"])
    randomise_adapter(model)
    model.to(device)
    assert model.backbone._cut.device.type == "cuda"  # type: ignore[attr-defined]
    _assert_close(_gradients(model, "right"), expected)
    model.close()


def test_devices_at_once_on_a_gpu_get_what_each_gets_alone(gpu_cloud: str, tiny_models: Path) -> None:
    models = [
        connect(gpu_cloud, model=tiny_models / "llama", peft_config=config, token=TOKEN, micro_batches=2)
        for config in _METHODS.values()
        for _ in range(2)
    ]
    for seed, model in enumerate(models):
        randomise_adapter(model, seed)
    alone = [_gradients(model, "right", seed) for seed, model in enumerate(models)]
    with ThreadPoolExecutor(len(models)) as pool:
        for _ in range(8):
            runs = [pool.submit(_gradients, model, "right", seed) for seed, model in enumerate(models)]
            for run, expected in zip(runs, alone, strict=True):
                _assert_close(run.result(), expected)
    for model in models:
        model.close()


def test_a_cloud_on_a_gpu_generates_what_a_cpu_does(gpu_cloud: str, tiny_models: Path, on_cpu: Any) -> None:
    model = connect(gpu_cloud, model=tiny_models / "llama", peft_config=_METHODS["lora"], token=TOKEN)
    randomise_adapter(model)
    batch = token_batch("left")
    prompts = (batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=8))
    expected = torch.stack(list(on_cpu("llama", _METHODS["lora"]).eval().stream(*prompts)))
    assert torch.equal(torch.stack(list(model.eval().stream(*prompts))), expected)
    model.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("where", ["local", "cloud"])
def test_taps_of_a_gpu_train_a_side_network_alike(
    where: str, device: str, gpu_cloud: str, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(url: str, **more: Any) -> SideModel:
        config = SideConfig(init="random", zero_upsample=False)
        model = connect_side(url, model=tiny_models / "llama", side_config=config, **more)
        assert isinstance(model, SideModel)
        randomise_side(model)
        return model

    def outcome(model: SideModel) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        loss.backward()
        return loss.item(), _grads(model)

    batch = token_batch("right").arguments()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = join("local")
    expected = outcome(on_cpu)
    on_cpu.close()
    cache = CacheConfig(tmp_path / "taps", key=tmp_path / "key")
    access = {} if where == "local" else {"token": TOKEN}
    model = join("local" if where == "local" else gpu_cloud, cache=cache, **access)
    model.to(device)
    # One example of the batch is cached before the others are computed; then all of them are.
    model.read_taps({name: tensor[:1].to(device) for name, tensor in batch.items()})
    for _ in range(2):
        _assert_close(outcome(model), expected)
    assert model.source.computed == 3
    model.close()


def test_a_pass_takes_no_more_of_a_gpu_than_it_is_said_to_keep(tiny_models: Path) -> None:
    cut = load_cut_model(
        Checkpoint.open(str(tiny_models / "llama")), ModelChoice(str(tiny_models / "llama"), torch_device="cuda")
    )
    rows, width = 16, 100
    active = {site_id: tuple(p.name for p in site.projections) for site_id, site in cut.geometry.sites.items()}
    active = {site_id: names for site_id, names in active.items() if site_id.place.name == "ATTN"}
    batch = Batch(
        torch.randn(rows * width, cut.geometry.embedding_width),
        Rows((0,) * rows, (width,) * rows, width),
        torch.arange(rows * width),
        active,
        training=True,
    )
    said = measure_cost(cut).bytes_for(rows, width, bytes_at_sites(cut.geometry, cut.dtype.itemsize, active))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    walk = Walk(cut, batch, _Zero(cut))
    walk.forward()
    assert torch.cuda.memory_allocated() - before <= said * 1.15


class _Zero:
    """Answers zero at every site."""

    def __init__(self, cut: Any) -> None:
        self._sites = cut.geometry.sites

    def forward(self, site: Any, x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND.new_zeros(len(x_ND), sum(part.width for part in self._sites[site].projections))

    def backward(self, site: Any, grad_NW: torch.Tensor, *, need_input: bool) -> torch.Tensor | None:
        return grad_NW.new_zeros(len(grad_NW), self._sites[site].width) if need_input else None
