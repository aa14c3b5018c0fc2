"""Checkpoint: tensors come back bit for bit, hashes ignore how files are cut, and a hostile folder is refused."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tidelock.errors import ModelError
from tidelock.model import checkpoint, hub_files, safetensors_layout, weight_files
from tidelock.model.cache_folder import cache_folder, load_digests, store_digests, write_atomically
from tidelock.model.checkpoint import Checkpoint, tensor_sha256


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return one model stored in one file and in several."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    whole, sharded = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("sharded")
    model.save_pretrained(whole)
    model.save_pretrained(sharded, max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    return whole, sharded


def write_model(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file with a header made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "config.json").write_text("{}")
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + text + data)
    return folder


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list to which every range read from a local file is added."""
    ranges: list[tuple[int, int]] = []
    original = safetensors_layout.LocalFile.stream

    def stream(self, start, stop):
        ranges.append((start, stop))
        return original(self, start, stop)

    monkeypatch.setattr(safetensors_layout.LocalFile, "stream", stream)
    return ranges


# ---- what is stored comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_every_tensor_is_as_stored(folders, which):
    opened = Checkpoint.open(str(folders[which]))
    stored = load_file(folders[0] / "model.safetensors")
    assert opened.names() == stored.keys()
    assert "lm_head.weight" not in opened.names()  # tied
    assert opened.folder == folders[which]
    assert opened.materialise() == folders[which]
    for name, tensor in stored.items():
        read = opened.read(name)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, tensor)
        assert opened.sha256(name) == tensor_sha256(tensor)


@pytest.mark.parametrize("dtype", safetensors_layout.DTYPES.values(), ids=str)
def test_every_dtype_and_odd_shape(tmp_path, dtype):
    raw = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8)
    wanted = {
        "matrix": raw.view(dtype).reshape(2, 3),
        "scalar": raw.view(dtype)[0].clone(),
        "none": raw.view(dtype)[:0],
    }
    save_file({name: tensor.clone() for name, tensor in wanted.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    opened = Checkpoint.open(str(tmp_path))
    for name, tensor in wanted.items():
        read = opened.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_hash_is_of_dtype_shape_and_raw_bytes(tmp_path):
    values = torch.tensor([[1.0, -2.0]], dtype=torch.float16)
    save_file({"a": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    expected = hashlib.sha256(b"F16 1,2\n" + bytes.fromhex("003c00c0")).hexdigest()
    assert Checkpoint.open(str(tmp_path)).sha256("a") == expected == tensor_sha256(values)
    assert tensor_sha256(values.reshape(2)) != expected
    assert tensor_sha256(values.view(torch.bfloat16)) != expected
    assert tensor_sha256(torch.tensor([[1.0], [-2.0]]).half().T) == expected  # not contiguous


def test_hash_and_read_in_pieces(folders, tmp_path, monkeypatch):
    whole = Checkpoint.open(str(folders[0])).fingerprint()
    monkeypatch.setattr(safetensors_layout, "PIECE_BYTES", 7)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 7)
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "elsewhere"))
    opened = Checkpoint.open(str(folders[0]))
    name = "model.norm.weight"
    assert opened.sha256(name) == tensor_sha256(opened.read(name))
    assert opened.fingerprint() == whole


def test_hash_of_a_dtype_that_files_do_not_have():
    with pytest.raises(ModelError, match=r"expected a dtype of .*got torch.complex64"):
        tensor_sha256(torch.zeros(1, dtype=torch.complex64))


def test_fingerprint_ignores_how_files_are_cut(folders):
    whole, sharded = (Checkpoint.open(str(folder)).fingerprint() for folder in folders)
    assert whole == sharded
    assert whole is not None


def test_fingerprint_sees_one_changed_bit_and_a_changed_name(folders, tmp_path):
    tensors = load_file(folders[0] / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    seen = {Checkpoint.open(str(folders[0])).fingerprint()}
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, tmp_path / "model.safetensors")
    seen.add(Checkpoint.open(str(tmp_path)).fingerprint())
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    seen.add(Checkpoint.open(str(tmp_path)).fingerprint())
    assert len(seen) == 3


def test_unknown_tensor(folders):
    for ask in (Checkpoint.open(str(folders[0])).read, Checkpoint.open(str(folders[0])).sha256):
        with pytest.raises(ModelError, match=r"Tensor 'lm_head.weight': expected one of the \d+ stored tensors"):
            ask("lm_head.weight")


# ---- the cache of hashes -----------------------------------------------------------------------------------------


def test_hashes_are_computed_once_per_version_of_a_file(folders, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m", {"a": entry()}, b"\0\0\0\0")
    first = Checkpoint.open(str(folder)).fingerprint()
    ranges = count_reads(monkeypatch)
    assert Checkpoint.open(str(folder)).fingerprint() == first
    assert all(start < 100 and stop <= (folder / "model.safetensors").stat().st_size - 4 for start, stop in ranges)
    write_model(folder, {"a": entry()}, b"\0\0\0\1")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert Checkpoint.open(str(folder)).fingerprint() != first


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"path": 1}', b"\xff", b"[" * 100_000, "foreign"])
def test_damaged_cache_is_computed_again(tmp_path, own_cache, damage):
    folder = write_model(tmp_path / "m", {"a": entry()}, b"\0\0\0\0")
    good = Checkpoint.open(str(folder)).sha256("a")
    (kept,) = (own_cache / "tensor-sha256").glob("*.json")
    if damage == "foreign":
        damage = kept.read_bytes().replace(good.encode(), b"not a hash")
    kept.write_bytes(damage)
    assert Checkpoint.open(str(folder)).sha256("a") == good
    assert good in kept.read_text()


def test_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "file"))
    folder = write_model(tmp_path / "m", {"a": entry()}, b"\0\0\0\0")
    assert Checkpoint.open(str(folder)).sha256("a") == tensor_sha256(torch.zeros(1))


def test_digests_of_another_size_or_time_are_not_used(tmp_path):
    file = tmp_path / "file"
    store_digests(file, 1, 2, {"a": "0" * 64})
    assert load_digests(file, 1, 2) == {"a": "0" * 64}
    assert load_digests(file, 1, 3) == load_digests(file, 2, 2) == load_digests(tmp_path / "other", 1, 2) == {}


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("TIDELOCK_CACHE", "/own")
    assert cache_folder() == Path("/own").absolute()
    monkeypatch.delenv("TIDELOCK_CACHE")
    assert cache_folder() == Path("/xdg/tidelock").absolute()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tidelock"


# ---- malformed files ---------------------------------------------------------------------------------------------

MALFORMED = {
    "not json": (b"{", b"", "JSON without repeated keys"),
    "not utf-8": (b'{"\xff": 1}', b"", "JSON without repeated keys"),
    "too deep": (b"[" * 100_000, b"", "JSON without repeated keys"),
    "not an object": ([], b"", "a JSON object, got list"),
    "repeated tensor": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "without repeated keys",
    ),
    "metadata": ({"__metadata__": 1}, b"", "an object as __metadata__, got int"),
    "entry": ({"a": 1}, b"", "Tensor 'a': expected a dtype"),
    "dtype": ({"a": entry("F33")}, b"\0" * 4, "Tensor 'a': expected a dtype of .*got 'F33'"),
    "negative shape": ({"a": entry(shape=[-1, -1])}, b"\0" * 4, "Tensor 'a': expected a shape"),
    "true in shape": ({"a": entry(shape=[True])}, b"\0" * 4, "Tensor 'a': expected a shape"),
    "fraction": ({"a": entry(shape=[1.0])}, b"\0" * 4, "Tensor 'a': expected a shape"),
    "shape without end": ({"a": entry(shape=[1] * 65)}, b"\0" * 4, "Tensor 'a': expected a shape"),
    "huge dimension": ({"a": entry(shape=[2**64])}, b"\0" * 4, "Tensor 'a': expected a shape"),
    "offsets fall": ({"a": entry(offsets=[4, 0])}, b"\0" * 4, "Tensor 'a': expected two rising offsets"),
    "three offsets": ({"a": entry(offsets=[0, 2, 4])}, b"\0" * 4, "Tensor 'a': expected two rising offsets"),
    "out of range": ({"a": entry(offsets=[0, 5])}, b"\0" * 4, "within 4 bytes of data"),
    "byte count": (
        {"a": entry(shape=[2])},
        b"\0" * 4,
        r"Tensor 'a': expected as many bytes as F32 '\[2\]' needs, got 4",
    ),
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 6])}, b"\0" * 6, "Tensor 'b': expected its data at byte"),
    "hole": ({"a": entry(), "b": entry(offsets=[5, 9])}, b"\0" * 9, "Tensor 'b': expected its data at byte"),
    "tail": ({"a": entry()}, b"\0" * 5, "the end of its last tensor"),
}


@pytest.mark.parametrize(("header", "data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_header(tmp_path, header, data, message):
    write_model(tmp_path, header, data)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint.open(str(tmp_path))
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (100_000_001, "a header of at most 100000000 bytes, got 100000001"),
        (2**64 - 1, "a header of at most"),
        (3, "a header within its 10 bytes"),
    ],
)
def test_header_length(tmp_path, length, message):
    write_model(tmp_path, {}, length=length)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(str(tmp_path))


def test_too_short_for_a_length(tmp_path):
    write_model(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(ModelError, match="at least 8 bytes, got 7"):
        Checkpoint.open(str(tmp_path))


def test_endless_name_is_cut_in_the_message(tmp_path):
    write_model(tmp_path, {"x" * 10_000: entry("F33")}, b"\0" * 4)
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(str(tmp_path))
    assert len(caught.value.message) < 1000


@given(flip=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_damaged_file_is_refused_or_read_within_bounds(tmp_path_factory, flip, byte):
    folder = tmp_path_factory.mktemp("damaged")
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", [2, 2], [4, 8])}
    write_model(folder, header, bytes(range(8)))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[flip % len(content)] = byte
    file.write_bytes(content)
    try:
        opened = Checkpoint.open(str(folder))
    except ModelError:
        return
    assert sum(opened.read(name).nbytes for name in opened.names()) == 8


def test_file_changed_under_our_hands(tmp_path):
    opened = Checkpoint.open(str(write_model(tmp_path, {"a": entry()}, b"\0" * 4)))
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    for ask in (opened.read, opened.sha256):
        with pytest.raises(ModelError, match="expected it unchanged while in use"):
            ask("a")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="got fewer"):
        opened.read("a")
    (tmp_path / "model.safetensors").unlink()
    for ask in (opened.read, opened.sha256):
        with pytest.raises(ModelError, match="expected a readable file, got No such file"):
            ask("a")


# ---- folders -----------------------------------------------------------------------------------------------------


def shard(folder: Path, weight_map: object, **tensors: str) -> Path:
    """Write shards, each with the tensors named in a string such as ``"ab"``, and an index."""
    for name, letters in tensors.items():
        save_file({letter: torch.zeros(1) for letter in letters}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "target",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "..\\x.safetensors",
        "c:x.safetensors",
        "..safetensors",
        "x.safetensors\n",
        "x.bin",
        "",
        ".",
        7,
    ],
)
def test_index_cannot_lead_out_of_the_folder(tmp_path, target):
    (tmp_path / "m").mkdir()
    shard(tmp_path / "m", {"a": target})
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"plain name of a \.safetensors file for tensor 'a'"):
        Checkpoint.open(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "a weight_map with tensors"),
        ([], "a weight_map with tensors"),
        ({"a": "gone.safetensors"}, "expected a file, got none"),
        ({"a": "x.safetensors", "c": "x.safetensors"}, "Tensor 'c': expected it in the file that the index names"),
        ({"a": "x.safetensors", "b": "y.safetensors"}, "Tensor 'b': expected it in one file, got two"),
    ],
)
def test_index_and_shards_disagree(tmp_path, weight_map, message):
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(str(shard(tmp_path, weight_map, x="ab", y="b")))


def test_index_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_HEADER_BYTES", 10)
    with pytest.raises(ModelError, match="Model index: expected at most 10 bytes"):
        Checkpoint.open(str(shard(tmp_path, {"a": "x.safetensors"}, x="a")))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-Q4_0.gguf", "other.safetensors"])
def test_other_formats_are_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"got {name} .*Convert it .*save_pretrained"):
        Checkpoint.open(str(tmp_path))


def test_empty_folder_and_missing_config(tmp_path):
    with pytest.raises(ModelError, match="got no weights"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected a config\.json"):
        Checkpoint.open(str(tmp_path))


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match="expected a readable one, got Permission denied"):
        Checkpoint.open(str(tmp_path))


def test_what_is_neither_folder_nor_name(tmp_path):
    (tmp_path / "file.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="got a file"):
        Checkpoint.open(str(tmp_path / "file.gguf"))
    for model in (str(tmp_path / "gone"), "./gone", "a/b/c", "../x"):
        with pytest.raises(ModelError, match="got no such folder"):
            Checkpoint.open(model)


def test_revision_of_a_local_folder(folders):
    with pytest.raises(ModelError, match="Revision 'main': expected none"):
        Checkpoint.open(str(folders[0]), revision="main")


# ---- the hub, played by a folder ---------------------------------------------------------------------------------


class FakeHub:
    """Serves a folder as the hub would, and remembers what was asked."""

    def __init__(self, served: Path, cache: Path) -> None:
        self.served, self.cache = served, cache
        self.ranges: list[tuple[str, int, int]] = []
        self.downloads: list[str] = []
        self.cached: set[str] = set()
        self.cut = 0
        self.down: Exception | None = None
        cache.mkdir()

    def model_info(self, model, *, revision, timeout, files_metadata):
        assert timeout <= 10
        assert files_metadata
        if self.down:
            raise self.down
        found = [SimpleNamespace(rfilename=path.name, size=path.stat().st_size) for path in self.served.iterdir()]
        found.append(SimpleNamespace(rfilename="onnx/config.json", size=1))
        return SimpleNamespace(id=f"org/{model.split('/')[-1]}", sha="c0ffee", siblings=found)

    def hf_hub_download(self, repo, name, *, revision, etag_timeout):
        assert revision == "c0ffee"
        if self.down:
            raise self.down
        self.downloads.append(name)
        (self.cache / name).write_bytes((self.served / name).read_bytes())
        return str(self.cache / name)

    def snapshot_download(self, repo, *, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            if not self.cached:
                raise FileNotFoundError("no snapshot")
            return str(self.cache)
        for name in allow_patterns:
            self.hf_hub_download(repo, name, revision=revision, etag_timeout=1)
        return str(self.cache)

    def try_to_load_from_cache(self, repo, name, *, revision):
        return str(self.cache / name) if name in self.cached else None

    def cat_file(self, path, start, end, *, cache_type, size):
        assert cache_type == "none"
        if self.down:
            raise self.down
        repo, _, name = path.partition("@c0ffee/")
        assert repo == "org/tiny"
        self.ranges.append((name, start, end))
        assert size == (self.served / name).stat().st_size
        return (self.served / name).read_bytes()[start : end - self.cut]


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    return use_hub(FakeHub(folders[0], tmp_path / "hub-cache"), monkeypatch)


@pytest.fixture
def sharded_hub(folders, tmp_path, monkeypatch):
    return use_hub(FakeHub(folders[1], tmp_path / "hub-cache"), monkeypatch)


def use_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(hub_files, "HfApi", lambda: fake)
    monkeypatch.setattr(hub_files, "HfFileSystem", lambda: fake)
    for name in ("hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
        monkeypatch.setattr(hub_files, name, getattr(fake, name))
    return fake


def test_hub_gives_one_tensor_without_the_rest(hub, folders):
    opened = Checkpoint.open("tiny")  # short names become full ones
    stored = load_file(folders[0] / "model.safetensors")
    assert opened.names() == stored.keys()
    assert opened.folder == hub.cache
    assert set(hub.downloads) == {"config.json", "generation_config.json"}
    before = len(hub.ranges)
    name = "model.norm.weight"
    assert torch.equal(opened.read(name), stored[name])
    assert opened.sha256(name) == tensor_sha256(stored[name])
    assert [end - start for _, start, end in hub.ranges[before:]] == [stored[name].nbytes]  # once for both
    assert opened.fingerprint() is None


def test_hub_hashes_a_tensor_that_was_not_read(hub, folders):
    name = "model.norm.weight"
    wanted = tensor_sha256(load_file(folders[0] / "model.safetensors")[name])
    assert Checkpoint.open("org/tiny").sha256(name) == wanted


def test_hub_reads_the_header_of_the_needed_shard_only(sharded_hub, folders):
    opened = Checkpoint.open("org/tiny")
    assert opened.names() == Checkpoint.open(str(folders[0])).names()
    assert sharded_hub.ranges == []
    assert torch.equal(
        opened.read("model.norm.weight"), load_file(folders[0] / "model.safetensors")["model.norm.weight"]
    )
    assert len({name for name, _, _ in sharded_hub.ranges}) == 1


def test_materialised_hub_model_is_a_local_one(sharded_hub, folders):
    opened = Checkpoint.open("org/tiny")
    folder = opened.materialise()
    assert {path.name for path in folder.iterdir()} == {path.name for path in folders[1].iterdir()}
    assert opened.fingerprint() == Checkpoint.open(str(folders[0])).fingerprint()
    sharded_hub.down = OSError("gone")
    assert opened.materialise() == folder
    opened.read("model.norm.weight")
    assert not any(name == "" for name, _, _ in sharded_hub.ranges)


def test_hub_model_already_downloaded_is_read_from_disk(hub, folders):
    hub.cached.add("model.safetensors")
    (hub.cache / "model.safetensors").write_bytes((folders[0] / "model.safetensors").read_bytes())
    assert Checkpoint.open("org/tiny").fingerprint() == Checkpoint.open(str(folders[0])).fingerprint()
    assert hub.ranges == []


def test_hub_out_of_reach(hub):
    hub.down = ConnectionError("name or service not known\nand more")
    with pytest.raises(ModelError) as caught:
        Checkpoint.open("org/tiny")
    message = caught.value.message
    assert "no such folder here" in message
    assert "ConnectionError: name or service not known (https://" in message
    assert "Check the name" in message


def test_hub_error_of_its_http_library_is_understood(hub):
    hub.down = HfHubHTTPError.__bases__[0]("connection refused")
    with pytest.raises(ModelError, match="connection refused"):
        Checkpoint.open("org/tiny")


def test_hub_out_of_reach_but_downloaded_before(hub, folders):
    for path in folders[0].iterdir():
        (hub.cache / path.name).write_bytes(path.read_bytes())
    hub.cached.add("all")
    hub.down = ConnectionError()
    assert Checkpoint.open("org/tiny").fingerprint() == Checkpoint.open(str(folders[0])).fingerprint()


def test_hub_out_of_reach_and_only_small_files_here(hub):
    hub.cached.add("config.json")
    hub.down = ConnectionError()
    with pytest.raises(ModelError, match="from the hub ConnectionError"):
        Checkpoint.open("org/tiny")


def test_hub_goes_away_between_the_calls(hub, monkeypatch):
    opened = Checkpoint.open("org/tiny")
    hub.down = TimeoutError("slow")
    with pytest.raises(ModelError, match=r"expected bytes from the hub, got TimeoutError: slow .org/tiny/model"):
        opened.read("model.norm.weight")
    with pytest.raises(ModelError, match="from the hub TimeoutError"):
        opened.materialise()
    hub.down = None
    monkeypatch.setattr(hub_files, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ModelError, match="from the hub OSError: disk full"):
        Checkpoint.open("org/tiny")


def test_hub_sends_too_little(hub):
    opened = Checkpoint.open("org/tiny")
    hub.cut = 1
    with pytest.raises(ModelError, match="expected 32 bytes, got 31"):
        opened.read("model.norm.weight")


def test_hub_index_names_a_file_that_is_not_there(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    use_hub(FakeHub(shard(served, {"a": "gone.safetensors"}), tmp_path / "hub-cache"), monkeypatch)
    with pytest.raises(ModelError, match=r"Model file 'gone.safetensors': expected it on the hub"):
        Checkpoint.open("org/tiny")


def test_hub_index_and_shard_disagree(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    use_hub(FakeHub(shard(served, {"c": "x.safetensors"}, x="a"), tmp_path / "hub-cache"), monkeypatch)
    with pytest.raises(ModelError, match="Tensor 'c': expected it in the file that the index names"):
        Checkpoint.open("org/tiny").read("c")


def test_hub_model_without_safetensors(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    (served / "pytorch_model.bin").write_bytes(b"")
    fake = use_hub(FakeHub(served, tmp_path / "hub-cache"), monkeypatch)
    with pytest.raises(ModelError, match=r"got pytorch_model.bin \(org/tiny on the hub\)"):
        Checkpoint.open("org/tiny")
    assert fake.downloads == []
