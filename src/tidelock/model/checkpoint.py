"""A model's stored tensors, read one at a time from a local folder or from the hub, never the whole model.

Reads safetensors only: the other formats run code when they are opened (pickle) or need converting (GGUF). Not a
loader of models: the cloud hands `materialise()` to transformers. May import only `errors` and its neighbours
`cache_folder`, `hub_files`, `safetensors_layout`, `weight_files`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol, final

import torch

from tidelock.errors import ModelError
from tidelock.model.cache_folder import load_digests, store_digests
from tidelock.model.hub_files import HUB_ID, HubModel, find_in_hub_cache, find_on_hub
from tidelock.model.safetensors_layout import (
    DTYPES,
    PIECE_BYTES,
    ByteFile,
    LocalFile,
    StoredTensor,
    read_layout,
    short,
)
from tidelock.model.weight_files import (
    INDEX,
    SINGLE,
    StoredTensors,
    misplaced,
    read_folder,
    read_index,
    require_files,
)


class TensorSource(Protocol):
    """What a device needs of a model's files; a folder, the hub or a cloud can be one."""

    @property
    def folder(self) -> Path:
        """The local folder with config.json and the tokenizer's files."""

    def names(self) -> frozenset[str]:
        """Return the names of all stored tensors; a tied head may be missing."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype and shape in which it is stored.

        Raises:
            ModelError: There is no such tensor, or it cannot be read.
        """

    def sha256(self, name: str) -> str:
        """Return the hash of a tensor's dtype, shape and little-endian bytes as stored, in hex (see `tensor_sha256`).

        Raises:
            ModelError: There is no such tensor, or it cannot be read.
        """


@final
class Checkpoint:
    """The stored tensors of one model; open it with `Checkpoint.open`."""

    def __init__(self, model: str, folder: Path, stored: StoredTensors, hub: HubModel | None) -> None:
        self._model = model
        self._folder = folder
        self._stored = stored
        self._hub = hub  # None once every file is on this disk
        self._digests: dict[str, str] = {}

    @classmethod
    def open(cls, model: str, *, revision: str | None = None) -> Checkpoint:
        """Return the tensors of a model in a local folder or on the hub.

        Args:
            model: A folder with ``model.safetensors`` or ``model.safetensors.index.json``, or a name on the hub.
            revision: Branch, tag or commit on the hub; None for its main branch.

        Raises:
            ModelError: No such folder and the hub has no such model or is out of reach; or the files are incomplete,
                malformed, or not safetensors.
        """
        path = Path(model).expanduser()
        if path.is_dir():
            if revision is not None:
                msg = f"Revision {revision!r}: expected none with a local folder, got one ({model}). Leave it out."
                raise ModelError(msg)
            return cls(model, path, read_folder(path), None)
        if path.exists() or not HUB_ID.fullmatch(model):
            got = "a file" if path.exists() else "no such folder"
            msg = (
                f"Model {model!r}: expected a folder with {SINGLE} or {INDEX}, or a name on the hub such as org/name, "
                f"got {got} ({path.absolute()}). Check the path."
            )
            raise ModelError(msg)
        try:
            hub = find_on_hub(model, revision)
        except ModelError:
            cached = find_in_hub_cache(model, revision)
            if cached is None or not ((cached / SINGLE).is_file() or (cached / INDEX).is_file()):
                raise
            return cls(model, cached, read_folder(cached), None)
        return cls._open_hub(model, hub)

    @classmethod
    def _open_hub(cls, model: str, hub: HubModel) -> Checkpoint:
        require_files(hub.sizes, f"{model} on the hub")
        folder = hub.fetch_small_files()
        if SINGLE in hub.sizes:
            index, weights = None, {SINGLE}
        else:
            index = read_index(folder / INDEX)
            weights = set(index.values())
        if all(hub.is_on_disk(name) for name in weights):
            return cls(model, folder, read_folder(folder), None)
        shards = {name: hub.file(name) for name in weights}
        if index is None:
            layout = read_layout(shards[SINGLE])
            return cls(model, folder, StoredTensors(dict.fromkeys(layout, shards[SINGLE]), {SINGLE: layout}), hub)
        return cls(model, folder, StoredTensors({name: shards[shard] for name, shard in index.items()}, {}), hub)

    @property
    def folder(self) -> Path:
        """The local folder with config.json and the tokenizer's files."""
        return self._folder

    def names(self) -> frozenset[str]:
        """Return the names of all stored tensors; a tied head may be missing."""
        return frozenset(self._stored.files)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype and shape in which it is stored.

        Raises:
            ModelError: There is no such tensor, or it cannot be read.
        """
        file, stored = self._find(name)
        raw = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
        target = raw.numpy().data
        digest = _start_digest(stored.dtype, stored.shape)
        position = 0
        for piece in file.stream(stored.start, stored.stop):
            target[position : position + len(piece)] = piece
            position += len(piece)
            digest.update(piece)
        self._digests[name] = digest.hexdigest()  # so that sha256() speaks of the bytes that were read
        return raw.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def sha256(self, name: str) -> str:
        """Return the hash of a tensor's dtype, shape and little-endian bytes as stored, in hex.

        Computed once per version of a local file: it is kept in tidelock's cache folder.

        Raises:
            ModelError: There is no such tensor, or it cannot be read.
        """
        file, _ = self._find(name)
        if name not in self._digests:
            self._hash_tensors(file, [name])
        return self._digests[name]

    def fingerprint(self) -> str | None:
        """Return one hash over all tensors' names and hashes, the same however they are spread over files.

        None when the tensors are not all on this disk: hashing them would download the whole model.

        Raises:
            ModelError: A tensor cannot be read.
        """
        if self._hub is not None:
            return None
        by_file: dict[str, list[str]] = {}
        for name, file in self._stored.files.items():
            by_file.setdefault(file.name, []).append(name)
        for names in by_file.values():
            self._hash_tensors(self._stored.files[names[0]], [name for name in names if name not in self._digests])
        total = hashlib.sha256()
        for name in sorted(self._stored.files):
            total.update(json.dumps([name, self._digests[name]]).encode() + b"\n")
        return total.hexdigest()

    def materialise(self) -> Path:
        """Return a folder with all of the model's files on this disk, downloading what is missing.

        From then on tensors are read from there, and `fingerprint` has an answer.

        Raises:
            ModelError: A download failed, or what came is malformed.
        """
        if self._hub is None:
            return self._folder
        weights = frozenset(file.name for file in self._stored.files.values())
        folder = self._hub.fetch_all(weights)
        self._stored, self._folder, self._hub = read_folder(folder), folder, None
        self._digests.clear()  # they spoke of bytes from the hub, not of these files
        return folder

    def _find(self, name: str) -> tuple[ByteFile, StoredTensor]:
        file = self._stored.files.get(name)
        if file is None:
            msg = (
                f"Tensor {short(name)}: expected one of the {len(self._stored.files)} stored tensors, got no such name "
                f"({self._model}). Check that this model's architecture is the one meant."
            )
            raise ModelError(msg)
        if file.name not in self._stored.layouts:
            self._stored.layouts[file.name] = read_layout(file)
        stored = self._stored.layouts[file.name].get(name)
        if stored is None:
            raise misplaced(name, file.label)
        return file, stored

    def _hash_tensors(self, file: ByteFile, names: list[str]) -> None:
        """Hash tensors of one file, or take their hashes from the cache while that file is as it was."""
        if isinstance(file, LocalFile):
            file.require_unchanged()
        known = load_digests(file.path, file.size, file.mtime_ns) if isinstance(file, LocalFile) else {}
        missing = [name for name in names if name not in known]
        for name in missing:
            _, stored = self._find(name)
            digest = _start_digest(stored.dtype, stored.shape)
            for piece in file.stream(stored.start, stored.stop):
                digest.update(piece)
            known[name] = digest.hexdigest()
        if missing and isinstance(file, LocalFile):
            store_digests(file.path, file.size, file.mtime_ns, known)
        self._digests.update({name: known[name] for name in names})


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the hash of a tensor's dtype, shape and bytes, equal to `TensorSource.sha256` of the same one stored.

    It is the sha256, in hex, of a line such as ``F16 49152,576`` and the values' little-endian bytes in row order.

    Raises:
        ModelError: safetensors files that tidelock reads have no such dtype.
    """
    dtype = next((name for name, known in DTYPES.items() if known == tensor.dtype), None)
    if dtype is None:
        msg = (
            f"Hash of a tensor: expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype} (memory). Convert it first."
        )
        raise ModelError(msg)
    digest = _start_digest(dtype, tuple(tensor.shape))
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(raw), PIECE_BYTES):
        digest.update(raw[start : start + PIECE_BYTES])
    return digest.hexdigest()


def _start_digest(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(f"{dtype} {','.join(map(str, shape))}\n".encode())
