"""A model on the Hugging Face hub: its small files fetched, its weights read by byte range or fetched whole.

One try with short timeouts: whoever is offline learns it in seconds. Not a reader of tensors (see `checkpoint`).
May import only `errors` and `model.safetensors_layout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast, final

from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from tidelock.errors import ModelError
from tidelock.model.safetensors_layout import PIECE_BYTES

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_TIMEOUT_S = 5
# The hub's client raises OSError or its HTTP library's own root error, and that library differs between its versions:
# HfHubHTTPError derives from the right one. ValueError: the client itself finds an id or a revision malformed.
_HUB_ERRORS = cast("tuple[type[Exception], ...]", (OSError, ValueError, *HfHubHTTPError.__bases__))


@final
@dataclass(frozen=True, slots=True)
class HubModel:
    """One commit of a model on the hub.

    Args:
        repo: Its full name, ``organisation/name``.
        commit: The commit's hash: a branch that moves on does not change what we read.
        sizes: Size in bytes of each file in the repository's root.
    """

    repo: str
    commit: str
    sizes: dict[str, int]

    def fetch_small_files(self) -> Path:
        """Return the local folder into which all but the weights was downloaded; there must be a config.json.

        Raises:
            ModelError: A download failed.
        """
        try:
            paths = [
                hf_hub_download(self.repo, name, revision=self.commit, etag_timeout=_TIMEOUT_S)
                for name in self._small()
            ]
        except _HUB_ERRORS as error:
            raise _refused(self.repo, error) from error
        return Path(paths[0]).parent

    def fetch_all(self, weights: frozenset[str]) -> Path:
        """Return the local folder that holds the small files and these files of weights.

        Raises:
            ModelError: A download failed.
        """
        wanted = [*self._small(), *sorted(weights)]
        try:
            return Path(snapshot_download(self.repo, revision=self.commit, allow_patterns=wanted))
        except _HUB_ERRORS as error:
            raise _refused(self.repo, error) from error

    def is_on_disk(self, name: str) -> bool:
        """Return whether the hub's own cache on this machine holds the file."""
        return isinstance(try_to_load_from_cache(self.repo, name, revision=self.commit), str)

    def file(self, name: str) -> HubFile:
        """Return a file to be read by range.

        Raises:
            ModelError: The repository has no such file.
        """
        if name not in self.sizes:
            msg = f"Model file {name!r}: expected it on the hub, got none ({self.repo}). Ask its owner to upload it."
            raise ModelError(msg)
        return HubFile(self.repo, self.commit, name, self.sizes[name])

    def _small(self) -> list[str]:
        return sorted(name for name in self.sizes if any(fnmatchcase(name, pattern) for pattern in _SMALL_FILES))


@final
@dataclass(frozen=True, slots=True)
class HubFile:
    """One file on the hub, read by byte range."""

    repo: str
    commit: str
    name: str
    size: int

    @property
    def label(self) -> str:
        """How to name the file to a person."""
        return f"{self.repo}/{self.name} on the hub"

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield exactly the bytes from ``start`` up to ``stop``, in pieces of at most ``PIECE_BYTES``.

        Raises:
            ModelError: The hub does not answer, or answers with fewer bytes.
        """
        path = f"{self.repo}@{self.commit}/{self.name}"
        files = HfFileSystem()
        for begin in range(start, stop, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, stop)
            try:
                # No read-ahead: each request asks for these bytes and no others.
                piece = cast("bytes", files.cat_file(path, begin, end, cache_type="none", size=self.size))
            except _HUB_ERRORS as error:
                msg = f"Model file: expected bytes from the hub, got {_said(error)} ({self.label}). Check the network."
                raise ModelError(msg) from error
            if len(piece) != end - begin:
                msg = f"Model file: expected {end - begin} bytes, got {len(piece)} ({self.label}). Try again."
                raise ModelError(msg)
            yield piece


def find_on_hub(model: str, revision: str | None) -> HubModel:
    """Return the commit that a model's name and revision stand for now.

    Raises:
        ModelError: The hub is out of reach, or knows no such model or revision, or wants a login.
    """
    try:
        info = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
    except _HUB_ERRORS as error:
        raise _refused(model, error) from error
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or [] if "/" not in item.rfilename}
    return HubModel(info.id, info.sha or revision or "main", sizes)


def find_in_hub_cache(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model downloaded earlier, asking no network; None when there is none."""
    try:
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=["*.safetensors", *_SMALL_FILES]
            )
        )
    except _HUB_ERRORS:
        return None


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _refused(model: str, error: Exception) -> ModelError:
    return ModelError(
        f"Model {model!r}: expected a local folder or a model on the hub, got no such folder here, and from the hub "
        f"{_said(error)} ({constants.ENDPOINT}). Check the name, the network and `hf auth login`, or give a local "
        "folder with safetensors files."
    )
