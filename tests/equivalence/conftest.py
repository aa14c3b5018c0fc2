"""One folder of tiny models and one cloud process for all tests of equality."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.certs import Certificates, make_certificates
from tests.support.cloud_process import TOKEN, CloudProcess, Service
from tests.support.smollm2 import smollm2_folder
from tests.support.tiny_models import ALL_MODELS, save_tiny_model
from tidelock.device.model import DeviceModel
from tidelock.peft.methods import MethodConfig
from tidelock.run.connect import connect

# Served over TLS as well as in the clear.
TLS_MODEL = "llama"

Connect = Callable[..., DeviceModel]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds every model of `ALL_MODELS`, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ALL_MODELS:
        save_tiny_model(name, folder)
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with more threads, and much slower on a machine that does other things too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """Keep hashes and fetched models out of the user's cache; yield what the user's is set to."""
    users = os.environ.get("TIDELOCK_CACHE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDELOCK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield users


@pytest.fixture(scope="session")
def smollm2(_own_cache: str | None) -> Path:
    """Return the folder of SmolLM2, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if _own_cache is None:
            patch.delenv("TIDELOCK_CACHE")
        else:
            patch.setenv("TIDELOCK_CACHE", _own_cache)
        return smollm2_folder()


@pytest.fixture(scope="session")
def cloud(
    tiny_models: Path, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory, _own_cache: None
) -> Iterator[CloudProcess]:
    """Return the process that serves every tiny model, and one of them over TLS too."""
    services = [Service(name, str(tiny_models / name)) for name in ALL_MODELS]
    services.append(
        Service(
            f"{TLS_MODEL}_tls",
            str(tiny_models / TLS_MODEL),
            tls_cert=str(certificates.cert),
            tls_key=str(certificates.key),
        )
    )
    services.append(Service(f"{TLS_MODEL}_limited", str(tiny_models / TLS_MODEL), max_active=2))
    services.append(Service(f"{TLS_MODEL}_again", str(tiny_models / TLS_MODEL), recompute=True))
    with CloudProcess(services, tmp_path_factory.mktemp("cloud") / "log") as process:
        yield process


@pytest.fixture(params=["local", "cloud"])
def join(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Connect]:
    """Return `join(name, config)`, the device's model of a tiny model, with blocks here and then in the cloud.

    What else `connect` is to be given can follow.
    """
    opened: list[DeviceModel] = []

    def join(name: str, config: MethodConfig, **settings: Any) -> DeviceModel:
        if request.param == "local":
            model = connect("local", model=tiny_models / name, peft_config=config, **settings)
        else:
            cloud: CloudProcess = request.getfixturevalue("cloud")
            model = connect(cloud.url(name), model=tiny_models / name, peft_config=config, token=TOKEN, **settings)
        opened.append(model)
        return model

    yield join
    for model in opened:
        model.close()
