"""Which safetensors files a model folder has, and which of them holds each tensor.

Not a reader of tensors (see `checkpoint`). May import only `errors` and `model.safetensors_layout`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tidelock.errors import ModelError
from tidelock.model.safetensors_layout import (
    MAX_HEADER_BYTES,
    ByteFile,
    LocalFile,
    StoredTensor,
    parse_json_object,
    read_layout,
    short,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN_FILE = re.compile(r"[\w-][\w. -]*\.safetensors")
_CONVERT = (
    "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
    "(for GGUF with gguf_file=...), and the same with AutoTokenizer."
)


@final
@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Which file holds each tensor, and where in it.

    Args:
        files: Tensor name to file.
        layouts: File name to what its header says; on the hub a header is fetched when first needed.
    """

    files: dict[str, ByteFile]
    layouts: dict[str, dict[str, StoredTensor]]


def read_folder(folder: Path) -> StoredTensors:
    """Return where each tensor of a local folder lies, with every header checked.

    Raises:
        ModelError: The files are incomplete, malformed, contradict each other, or are not safetensors.
    """
    try:
        present = [path.name for path in folder.iterdir()]
    except OSError as error:
        msg = f"Model folder: expected a readable one, got {error.strerror} ({folder}). Check that you may read it."
        raise ModelError(msg) from error
    require_files(present, str(folder))
    index = None if SINGLE in present else read_index(folder / INDEX)
    stored = StoredTensors({}, {})
    for shard in [SINGLE] if index is None else sorted(set(index.values())):
        file = LocalFile.at(folder / shard)
        stored.layouts[shard] = layout = read_layout(file)
        if twice := stored.files.keys() & layout.keys():
            name = min(twice)
            msg = (
                f"Tensor {short(name)}: expected it in one file, got two ({stored.files[name].label} and {shard}). "
                "Save the model again."
            )
            raise ModelError(msg)
        stored.files.update(dict.fromkeys(layout, file))
    for name, shard in (index or {}).items():
        if name not in stored.layouts[shard]:
            raise misplaced(name, str(folder / shard))
    return stored


def require_files(present: Collection[str], where: str) -> None:
    """Refuse a model without safetensors or without its config.

    Args:
        present: The names of the files in its folder.
        where: How to name the folder to a person.

    Raises:
        ModelError: One of them is missing.
    """
    if SINGLE not in present and INDEX not in present:
        others = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        got = ", ".join(others[:3]) or "no weights"
        msg = f"Model weights: expected {SINGLE} or {INDEX}, got {got} ({where}). {_CONVERT}"
        raise ModelError(msg)
    if "config.json" not in present:
        msg = f"Model files: expected a config.json, got none ({where}). Save or download the whole model again."
        raise ModelError(msg)


def read_index(path: Path) -> dict[str, str]:
    """Return the plain name of the file that holds each tensor, by tensor name.

    Raises:
        ModelError: The index is missing, malformed, or names a file outside its folder.
    """
    file = LocalFile.at(path)
    if file.size > MAX_HEADER_BYTES:
        msg = f"Model index: expected at most {MAX_HEADER_BYTES} bytes, got {file.size} ({path}). Save the model again."
        raise ModelError(msg)
    index = parse_json_object(b"".join(file.stream(0, file.size)), str(path)).get("weight_map")
    if not isinstance(index, dict) or not index:
        msg = f"Model index: expected a weight_map with tensors, got none ({path}). Save the model again."
        raise ModelError(msg)
    for name, shard in index.items():
        # Posix and Windows rules alike: nothing that could lead out of the folder.
        if not isinstance(shard, str) or not _PLAIN_FILE.fullmatch(shard):
            msg = (
                f"Model index: expected the plain name of a .safetensors file for tensor {short(name)}, got "
                f"{short(str(shard))} ({path}). Do not use this model unless you know why."
            )
            raise ModelError(msg)
    return index


def misplaced(name: str, where: str) -> ModelError:
    """Return the error for a tensor that is not in the file in which the index has it."""
    return ModelError(
        f"Tensor {short(name)}: expected it in the file that the index names, got none ({where}). Save the model again."
    )
