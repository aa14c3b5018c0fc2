"""What README, ARCHITECTURE and docs/ name exists, and what they count is right."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer
from transformers import LlamaConfig

from tests.architecture.source import ROOT, SRC
from tests.support.scripts import load_script
from tidelock.backbone import patience as waiting
from tidelock.backbone.connection import Connection
from tidelock.cli.main import COMMANDS
from tidelock.cloud.server import CloudServer
from tidelock.cloud.service import Limits
from tidelock.errors import INTERRUPTED_EXIT_CODE, TidelockError
from tidelock.model.ends import empty_model
from tidelock.model.families import FAMILIES
from tidelock.model.frames import FrameChoice
from tidelock.model.geometry import Place, geometry_of
from tidelock.peft.side import SideConfig
from tidelock.run.config import BACKBONES, CODECS, METHODS, TASKS
from tidelock.run.folder import RunFolder
from tidelock.wire import limits
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec
from tidelock.wire.ledger import Kind

PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGE = SRC / "tidelock"
# Options of other programs that the pages show.
FOREIGN_OPTIONS = {"--index-url", "--logdir", "--nnodes", "--nproc-per-node"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; the empty one is that of commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, title: str) -> str:
    return text_of(page).split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """Return the rows of the tables in a text, headers included, as cells."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[| -]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def options_of(command: str) -> set[str]:
    app = typer.Typer(add_completion=False)
    app.command()(importlib.import_module(f"tidelock.cli.{command}").command)
    return {option for parameter in typer.main.get_command(app).params for option in parameter.opts}


def commands_in(page: Path) -> list[list[str]]:
    """Return every tidelock command that a page shows, in blocks and in the text, as words after `tidelock`."""
    shown = [line for body in blocks(page, "") for line in body.splitlines()]
    shown += re.findall(r"`(tidelock [a-z][^`]*)`", prose(page))
    lines = [line for line in shown if re.match(r"tidelock [a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def resolve(dotted: str) -> object:
    """Return what a dotted name starting with `tidelock` stands for."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise AttributeError(dotted)


@every_page
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_commands_and_their_options_exist(page: Path):
    for words in commands_in(page):
        assert words[0] in COMMANDS, words
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options_of(words[0]) | {"--help"}, words


def test_pages_show_every_command():
    shown = {words[0] for page in PAGES for words in commands_in(page)}
    assert shown == set(COMMANDS)


@every_page
def test_options_named_in_the_text_exist(page: Path):
    known = FOREIGN_OPTIONS.union({"--help", "--version"}, *(options_of(command) for command in COMMANDS))
    assert set(re.findall(r"--[a-z][a-z-]+", text_of(page))) <= known


@every_page
def test_make_targets_exist(page: Path):
    targets = re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)) <= set(targets)


@every_page
def test_python_blocks_are_python_and_what_they_use_of_tidelock_exists(page: Path):
    for body in blocks(page, "python"):
        tree = ast.parse(body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tidelock"):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("tidelock."):
                resolve(ast.unparse(node))


def test_a_side_networks_settings_are_listed():
    rows = table(section(ROOT / "docs" / "side.md", "Settings"))[1:]
    shown = {row[0].strip("`"): row[1].strip("`") for row in rows}
    assert shown == {field.name: str(field.default) for field in fields(SideConfig)}


@every_page
def test_public_names_exist(page: Path):
    for dotted in re.findall(r"`(tidelock\.[A-Za-z_]\w*)`", prose(page)):
        if dotted not in {"tidelock.proto", "tidelock.v1", "tidelock.token"}:
            resolve(dotted)


def test_arguments_of_connect_in_the_pages_exist():
    import tidelock

    known = set(inspect.signature(tidelock.connect).parameters)
    calls = [
        node
        for page in PAGES
        for body in blocks(page, "python")
        for node in ast.walk(ast.parse(body))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tidelock.connect"
    ]
    assert len(calls) >= 2
    assert {keyword.arg for call in calls for keyword in call.keywords} <= known


def listed_errors(text: str) -> dict[str, str]:
    return {row[1].strip("`"): row[0] for row in table(text) if row[0].isdigit() and row[1]}


def test_exit_codes_are_those_of_the_errors():
    kinds: list[type[TidelockError]] = [TidelockError, *TidelockError.__subclasses__()]
    codes = {kind.__name__: str(kind.exit_code) for kind in kinds}
    readme = section(ROOT / "README.md", "Exit codes")
    assert listed_errors(readme) == codes
    assert [row[0] for row in table(readme)][1] == "0"
    assert [row[0] for row in table(readme)][-1] == str(INTERRUPTED_EXIT_CODE)
    assert listed_errors(section(ROOT / "docs" / "getting-started.md", "When something fails")) == codes


def test_what_errors_mean_is_said_as_in_their_module():
    from tidelock import errors

    described = dict(re.findall(r"(\w+) +\d+ {2,}(.*)", errors.__doc__ or ""))
    said = {row[1].strip("`"): row[2] for row in table(section(ROOT / "README.md", "Exit codes")) if row[1] != "name"}
    assert len(described) == len(TidelockError.__subclasses__()) + 1
    assert {name: said[name] for name in described} == described


def test_what_works_today_is_what_there_is():
    rows = {row[0]: row[1] for row in table(section(ROOT / "README.md", "What works today"))}

    def named(title: str) -> set[str]:
        return set(re.findall(r"`([\w-]+)`", rows[title]))

    assert named("Where the frozen blocks run") == set(BACKBONES)
    assert named("What is trained") == set(METHODS)
    assert named("What is learned") == set(TASKS)
    assert named("Numbers on the wire") == set(CODECS)
    assert named("Commands") == set(COMMANDS)
    assert named("Model families, compared with `peft` by tests") == set(FAMILIES)


def test_the_tree_is_the_source():
    (tree,) = [body for body in blocks(ROOT / "ARCHITECTURE.md", "") if body.startswith("src/tidelock/")]
    listed, folder = [], ""
    for line in tree.splitlines()[1:]:
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        folder = name if name.endswith("/") else folder if indent > 2 else ""
        if not name.endswith("/"):
            listed.append(folder + name)
    present = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(listed) == sorted(path.relative_to(PACKAGE).as_posix() for path in present)
    assert all(
        len(line.split()) > 1 or line.strip() == "__init__.py" or line.endswith("/") for line in tree.splitlines()
    )


def defined(path: Path) -> set[str]:
    """Return the functions and classes of a file, and the methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
    return names


def test_every_function_named_is_there():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text_of(ROOT / "ARCHITECTURE.md"))
    assert len(named) > 40
    for file, name in named:
        path = (ROOT if file.startswith("tests/") else PACKAGE) / file
        assert path.is_file(), file
        assert name in defined(path), f"{file}:{name}"


def test_layers_are_those_that_are_tested():
    from tests.architecture.test_layers import LAYERS, ONLY

    (drawn,) = [body for body in blocks(ROOT / "ARCHITECTURE.md", "") if body.startswith("tidelock (")]
    lines = [set(re.findall(r"[a-z]+", line.partition("(")[0])) for line in drawn.splitlines()]
    present = {path.stem for path in PACKAGE.iterdir() if path.stem in set().union(*LAYERS)} | {"tidelock"}
    assert lines == [layer & present for layer in LAYERS if layer & present]
    rules = section(ROOT / "ARCHITECTURE.md", "Layers")
    for name in ("cloud", "wire"):
        (line,) = re.findall(rf"^- `{name}` imports only (.*?)\.(?: |$)", rules, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", line)) == ONLY[name]


def test_the_messages_are_those_of_the_protocol():
    rows = table(section(ROOT / "docs" / "protocol.md", "The order of a pass"))
    listed = {row[0].strip("`"): row[1] for row in rows[1:]}
    device = dict.fromkeys(pb.DeviceMessage.DESCRIPTOR.fields_by_name, "device")
    assert listed == device | dict.fromkeys(pb.CloudMessage.DESCRIPTOR.fields_by_name, "cloud")
    (drawn,) = [body for body in blocks(ROOT / "docs" / "protocol.md", "") if "->" in body]
    source = re.sub(r"^// ?", "", text_of(PACKAGE / "wire" / "tidelock.proto"), flags=re.MULTILINE)
    # The same steps in the same order, whatever the space between them.
    assert [line.split()[:2] for line in drawn.splitlines()[1:]] == [
        line.split()[:2] for line in source.splitlines() if "->" in line or "<-" in line
    ]


def test_the_ledgers_kinds_are_listed():
    rows = table(section(ROOT / "docs" / "protocol.md", "The ledger"))[1:]
    assert [row[0].strip("`") for row in rows] == [kind.value for kind in Kind]


def test_every_message_has_its_line_on_privacy():
    rows = table(section(ROOT / "docs" / "privacy.md", "What each message reveals"))
    listed = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows)))
    assert set(pb.DeviceMessage.DESCRIPTOR.fields_by_name) <= listed


def test_limits_are_those_of_the_code():
    page = ROOT / "docs" / "protocol.md"
    said = {row[0]: [float(number) for number in re.findall(r"[\d.]+\d|\d", row[1])] for row in table(text_of(page))}
    patience = inspect.signature(Connection).parameters["patience_seconds"].default
    grace = inspect.signature(CloudServer.stop).parameters["grace_seconds"].default
    assert said["`Describe`"] == [limits.CALL_SECONDS]
    assert said["`Fetch` of one file"] == [limits.FETCH_SECONDS]
    assert said["`Pass`"] == [limits.PASS_SECONDS, 60]
    assert said["HTTP/2 ping, answer to it"][1:] == [limits.KEEPALIVE_TIMEOUT_MS / 1000]
    assert said["HTTP/2 ping, answer to it"][0] == limits.KEEPALIVE_MS / 1000
    assert said["patience of a device for a cloud that is away"] == [patience]
    assert said["pause before a repeat"] == [waiting._FIRST_RETRY_SECONDS, waiting._SLOWEST_RETRY_SECONDS]
    assert said["grace for running passes when a cloud stops"] == [grace]
    assert f"1 to {Limits().max_tokens:,} tokens" in text_of(page)
    assert (limits.PART_BYTES, limits.MESSAGE_BYTES - limits.PART_BYTES) == (1 << 20, 64 << 10)
    assert f"protocol\nversion {limits.PROTOCOL_VERSION}" in text_of(page)


def numbers_per_token(config: LlamaConfig, place: Place, blocks: int, rank: int | None) -> tuple[int, int]:
    """Return how many numbers cross for a real and for a selected token, as the page's formula has it."""
    geometry = geometry_of(empty_model(config))
    active = [site for site_id, site in geometry.sites.items() if site_id.place is place][:blocks]
    frames = None if rank is None else FrameChoice("seeded", rank)
    widths = [site.widths(tuple(part.name for part in site.projections), frames) for site in active]
    token = geometry.embedding_width + sum(2 * (read + given) for read, given in widths) - widths[0][0]
    return token, 2 * geometry.final_width


SMOLLM2 = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=8)
LLAMA_7B = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=8)


@pytest.mark.parametrize(
    ("row", "config", "place", "blocks", "rank"),
    [
        ("SmolLM2-135M, all blocks", SMOLLM2, Place.ATTN, 30, None),
        ("SmolLM2-135M, 8 blocks", SMOLLM2, Place.ATTN, 8, None),
        ("SmolLM2-135M, `adapter` at all MLPs", SMOLLM2, Place.MLP, 30, None),
        ("SmolLM2-135M, `core` of rank 32 in all blocks", SMOLLM2, Place.ATTN, 30, 32),
        ("LLaMA-7B's shape, all blocks", LLAMA_7B, Place.ATTN, 32, None),
    ],
)
def test_sizes_are_those_of_the_formula(row: str, config: LlamaConfig, place: Place, blocks: int, rank: int | None):
    cells = {cells[0]: cells for cells in table(section(ROOT / "docs" / "protocol.md", "Sizes"))}[row]
    token, selected = numbers_per_token(config, place, blocks, rank)
    rows = 1 + 4 * blocks - 1  # the embedding, and four at each site but the lowest, whose input has no gradient
    sizes = [4 * token, 2 * token, token + 4 * rows, token // 2 + 4 * rows, 4 * selected]
    assert cells[4:] == [f"{token:,}", *(f"{size:,} B" for size in sizes)]


def test_a_codecs_bytes_and_bounds_are_those_of_the_page():
    listed = table(section(ROOT / "docs" / "protocol.md", "Tensors").split("A row is")[0])[1:]
    assert [row[0].strip("`") for row in listed] == [codec.value for codec in Codec]
    signs = {"⌈W / 2⌉": "ceil(W / 2)", "N W": "N * W", "N (": "N * (", "√": "sqrt", "\u2212": "-", "·": "*", "²": "**2"}
    names = {"N": 3, "W": 576, "sqrt": math.sqrt, "ceil": math.ceil}
    for codec, (_, *cells) in zip(Codec, listed, strict=True):
        size, bound = (re.sub("|".join(map(re.escape, signs)), lambda sign: signs[sign[0]], cell) for cell in cells)
        size = re.sub(r"^(\d) N", r"\1 * N", size.partition(":")[0])
        assert eval(size, names) == codec.size_bytes((3, 576))  # noqa: S307  (our own page)
        assert eval(bound, names) == pytest.approx(codec.error_bound(576, stochastic=False))  # noqa: S307


def test_what_codecs_cost_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "codecs.json").read_text(encoding="utf-8"))["codecs"]
    rows = table(section(ROOT / "docs" / "protocol.md", "Tensors").split("cost little of a step")[1])[1:]
    said = {row[0].replace("`", ""): [float(number) for number in re.findall(r"[\d.]+", row[1])] for row in rows}
    assert said == {
        name: [round(100 * values["share"][key], 1) for key in ("median", "min", "max")]
        for name, values in measured.items()
    }


def test_the_run_folders_files_are_listed(tmp_path: Path):
    rows = table(section(ROOT / "docs" / "getting-started.md", "The run folder, stopping and resuming"))
    folder = RunFolder(tmp_path)
    own = {folder.adapter, folder.adapter_all, folder.checkpoints, folder.metrics, folder.schedule}
    own |= {folder.facts, folder.tensorboard, folder.page, folder.images, folder._toml, folder._ledger}
    assert {row[0].strip("`/") for row in rows[1:]} == {path.name for path in own}


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_nothing_outside_the_project_is_named(page: Path):
    assert str(ROOT) not in text_of(page)
    assert str(Path.home()) not in text_of(page)
    for path in re.findall(r"(?:\.\./)+[\w./-]*", text_of(page)):
        assert (page.parent / path).resolve().is_relative_to(ROOT), path


def test_the_picture_is_one_that_light_and_dark_can_show():
    picture = ET.parse(ROOT / "docs" / "split.svg").getroot()  # noqa: S314  (our own file)
    name = "{http://www.w3.org/2000/svg}"
    assert [child.tag for child in picture][:2] == [f"{name}title", f"{name}desc"]
    assert "prefers-color-scheme: dark" in (picture.findtext(f"{name}style") or "")
    page = next(iter(picture.iter(f"{name}rect")))
    assert (page.get("class"), page.get("width"), page.get("height")) == ("page", "960", "600")


def test_the_benchmarks_table_has_its_place():
    readme = text_of(ROOT / "README.md")
    assert readme.count("<!-- split_overhead: begin -->") == readme.count("<!-- split_overhead: end -->") == 1
    assert (ROOT / "benchmarks" / "split_overhead.py").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_start(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    module = load_script(path)
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert "cloud" in capsys.readouterr().out
