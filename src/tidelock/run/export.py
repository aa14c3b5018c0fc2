"""A run's adapter for use elsewhere: as it is, in PEFT's format or our own, or merged into a plain model.

May import everything below `run`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from tidelock.errors import ConfigError, ModelError, NonFiniteError, StorageError
from tidelock.model.checkpoint import Checkpoint
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.export import load_adapter
from tidelock.peft.methods import check_config
from tidelock.peft.side import SideConfig
from tidelock.run.exportable import readable_by_peft, require_fit
from tidelock.run.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from tidelock.peft.adapter_files import Adapter

FORMS = ("peft", "adapter", "merged")
# Of what is neither LoRA nor can be written as such: its method, its forms, and why no others.
_FORMS_OF: dict[type, tuple[str, tuple[str, ...], str]] = {
    AdapterConfig: ("adapter", ("adapter",), " No weight can take in what is no linear function of its input."),
    SideConfig: ("side", ("adapter",), " A side network is beside the weights and cannot be merged into them."),
}
# The expression that loads what was exported, by form; by kind for the forms of ours.
_LOADERS = {
    "peft": 'peft.PeftModel.from_pretrained({model}.from_pretrained(MODEL{labels}), "{folder}")',
    "merged": 'transformers.{model}.from_pretrained("{folder}")',
    AdapterConfig: 'tidelock.attach_adapter({model}.from_pretrained(MODEL{labels}), "{folder}")',
    SideConfig: 'model = {model}.from_pretrained(MODEL{labels}); tidelock.attach_side(model, "{folder}")',
}
# Of an earlier export; beside new files they would be loaded instead of them, or on top.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", CONFIG_FILE)
# The tokenizer's files and the like; what describes the weights is written anew.
_KEPT = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_REWRITTEN = ("config.json", "generation_config.json", "*.index.json", CONFIG_FILE)


@final
@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What to export, and how.

    Attributes:
        run: The run folder.
        form: `peft` or `merged` for LoRA and cores, `adapter` for the formats of ours: serial adapters, side networks.
        out: The folder to write.
        model: Folder or hub name of the model that the adapter belongs to; None is the run's own.
        force: Write into a folder that has something in it.
        all_modules: Export the modules that a schedule has killed too.
    """

    run: Path
    form: str
    out: Path
    model: str | None = None
    force: bool = False
    all_modules: bool = False


def export(order: ExportOrder, on_progress: Callable[[str], None]) -> list[Path]:
    """Write what was ordered; return the files.

    Args:
        order: What to export, and how.
        on_progress: Told in a short sentence what is going on, for a person to read.

    Raises:
        ConfigError: The form is unknown, the folder is not empty, or the model is not known.
        CheckpointError: The run has no readable adapter, or it does not fit the model.
        ModelError: The model cannot be read on this device.
        NonFiniteError: A merged weight is not a finite number.
        StorageError: The file system refused.
    """
    if order.form not in FORMS:
        msg = f"--to: expected one of {', '.join(FORMS)}, got {order.form!r}. Choose one of those."
        raise ConfigError(msg)
    _require_free(order)
    folder = RunFolder.open(order.run)
    if folder.config().method == "full":
        msg = (
            f"Exporting: expected an adapter, got a whole model ({folder.model}). It is a plain one: copy that folder."
        )
        raise ConfigError(msg)
    if order.all_modules and not folder.adapter_all.is_dir():
        msg = (
            f"--all-modules: expected a run with a schedule that kills modules, got one without or an unfinished one "
            f"({order.run}). Leave it out."
        )
        raise ConfigError(msg)
    adapter = load_adapter(folder.adapter_all if order.all_modules else folder.adapter)
    _require_form(order.form, adapter)
    model = order.model or folder.config().model
    if order.form == "merged":
        return _export_merged(order, adapter, model, on_progress)
    if order.model is not None:
        require_fit(adapter, Checkpoint.open(order.model))
    with readable_by_peft(adapter, model, on_progress) as readable, _new_files(order.out) as scratch:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(readable.folder / name, scratch / name)
    return sorted(order.out / name for name in (CONFIG_FILE, WEIGHTS_FILE))


def how_to_load(order: ExportOrder) -> str:
    """Return the Python that loads what was exported, for people."""
    config = RunFolder.open(order.run).config()
    labels, name = "", {"causal-lm": "AutoModelForCausalLM", "text-to-text": "AutoModelForSeq2SeqLM"}.get(config.task)
    if name is None:
        name, labels = "AutoModelForSequenceClassification", f", num_labels={config.num_labels or 1}"
    kind = type(load_adapter(order.out).config) if order.form == "adapter" else order.form
    return _LOADERS[kind].format(model=name, labels=labels, folder=order.out)


def _require_form(form: str, adapter: Adapter) -> None:
    check_config(adapter.config)
    method, forms, why = _FORMS_OF.get(type(adapter.config), ("lora and core", ("peft", "merged"), ""))
    if form not in forms:
        known = " or ".join(forms)
        msg = f"--to: expected {known} for what --method {method} trained, got {form}.{why} Choose that."
        raise ConfigError(msg)


def _require_free(order: ExportOrder) -> None:
    try:
        taken = order.out.exists() and (not order.out.is_dir() or any(order.out.iterdir()))
    except OSError as error:
        raise _refused(error, order.out) from error
    if taken and not (order.force and order.out.is_dir()):
        msg = (
            f"Export folder: expected a new or an empty one, got one with something in it ({order.out}). Choose "
            "another, or give --force to write into it."
        )
        raise ConfigError(msg)


def _export_merged(
    order: ExportOrder, adapter: Adapter, model: str | None, on_progress: Callable[[str], None]
) -> list[Path]:
    if model is None:
        msg = (
            f"Merging: expected the whole model on this device, got a run on the cloud's own model ({order.run}). Give "
            "--model with the same one's folder or hub name, or export --to peft."
        )
        raise ConfigError(msg)
    on_progress(f"Reading all of {model} (downloaded first if it is only on the hub).")
    try:
        checkpoint = Checkpoint.open(model)
        require_fit(adapter, checkpoint)
        source = checkpoint.materialise()
    except ModelError as error:
        msg = (
            f"{error.message}\nMerging needs the whole model on this device; with --model you can say where it is, and "
            "--to peft does not need it."
        )
        raise ModelError(msg) from error
    with readable_by_peft(adapter, model, on_progress) as readable:
        on_progress("Merging in fp32.")
        merged = _merge(source, readable)
    with _new_files(order.out) as scratch:
        merged.save_pretrained(scratch)
        for path in source.iterdir():
            if _matches(path.name, _KEPT) and not _matches(path.name, _REWRITTEN):
                shutil.copyfile(path, scratch / path.name)
        names = sorted(path.name for path in scratch.iterdir())
    return [order.out / name for name in names]


def _merge(source: Path, adapter: Adapter) -> PreTrainedModel:
    """Return the model with the adapter's products added to its weights, in fp32 so that nothing is rounded away."""
    model = _load_whole(source, adapter.num_labels)
    try:
        joined: Any = PeftModel.from_pretrained(model, str(adapter.folder))
        return cast("PreTrainedModel", joined.merge_and_unload(safe_merge=True))
    except ValueError as error:
        msg = f"Merging: expected finite weights, got: {error} ({adapter.folder}). Use another checkpoint of the run."
        raise NonFiniteError(msg) from error


def _load_whole(source: Path, num_labels: int | None) -> PreTrainedModel:
    """Return the causal model of a folder, or with a number of labels the one with a head for whole texts."""
    settings: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    loader: Any = AutoModelForCausalLM
    if num_labels is not None:
        loader, settings["num_labels"] = AutoModelForSequenceClassification, num_labels
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would say of a head that it is missing; the adapter brings it
    try:
        model, loading = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError) as error:
        msg = f"Loading the model: expected one that transformers knows, got {error} ({source}). Check the folder."
        raise ModelError(msg) from error
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted(set(loading["missing_keys"]) - {"score.weight"})
    if absent:
        msg = f"Loading the model: expected all its weights, got no {absent[0]} ({source}). Is the checkpoint complete?"
        raise ModelError(msg)
    return cast("PreTrainedModel", model)


@contextmanager
def _new_files(out: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then replace those of an earlier export in `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
            yield Path(name)
            out.mkdir(exist_ok=True)
            for path in out.iterdir():
                if _matches(path.name, _REPLACED):
                    path.unlink()
            for path in Path(name).iterdir():
                _sync(path)
                path.replace(out / path.name)
    except (OSError, SafetensorError) as error:  # a full disk is the latter when weights are written
        raise _refused(error, out) from error


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _refused(error: Exception, out: Path) -> StorageError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return StorageError(
        f"Exporting: expected the disk to take it, got {reason} ({out}). Free some space, or choose a "
        "folder that you may write."
    )
