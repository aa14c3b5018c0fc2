"""A tiny model on disk, clouds on loopback ports in this process, and devices driven by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.hand_device import BLOCKS, POSITIONS, TOKEN, VOCABULARY, WIDTH, HandDevice, RunningCloud
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.service import Limits
from tidelock.cloud.tenants import Tenants
from tidelock.model.load import ModelChoice
from tidelock.wire.address import parse_listen


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """Compute on one core: for tiny models the others cost more than they bring, above all where they are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random llama: 3 blocks, width 32, 64 words, 64 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,  # far enough from zero for every path to matter
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep what tests cache out of the user's folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDELOCK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def start_cloud(own_cache, tiny_folder):
    """Return a function that starts a cloud with the tiny model on a loopback port; all are stopped at the end."""
    servers: list[CloudServer] = []

    def start(limits: Limits | None = None, *, metrics=None, **listening) -> RunningCloud:
        server = CloudServer(
            ModelChoice(str(tiny_folder)),
            Tenants({"anna": TOKEN, "boris": TOKEN + "-of-boris"}),
            Listener(parse_listen("127.0.0.1:0", tls=bool(listening)), **listening),
            limits=limits,
            metrics=metrics,
        )
        servers.append(server)
        return RunningCloud.of(server)

    yield start
    for server in servers:
        server.stop(0)


@pytest.fixture
def hand_device():
    """Return a function that connects a hand-driven device to a cloud."""
    devices: list[HandDevice] = []

    def connect(cloud: RunningCloud, token: str = TOKEN) -> HandDevice:
        devices.append(HandDevice(cloud, token))
        return devices[-1]

    yield connect
    for device in devices:
        device.close()
