import gzip
import json
import subprocess
import sys
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from tidelock.data.example import Conversation, LabelledText, PlainText, PromptCompletion
from tidelock.data.source import read_examples
from tidelock.errors import DataError

SECRET = "Marlowe"
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": SECRET}]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path as a string."""

    def put(name, content):
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return put


def places(examples):
    return [example.where for example in examples]


def refused(data, expected, **options):
    """Check that a data set is refused, and that neither the message nor its causes hold the text."""
    with pytest.raises(DataError, match=expected) as caught:
        read_examples(data, **options)
    error = caught.value
    assert SECRET not in str(error)
    assert error.__cause__ is None or SECRET not in repr(error.__cause__)
    assert error.__suppress_context__ or error.__context__ is None
    return str(error)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_are_read_and_blank_lines_count_but_hold_nothing(write, name):
    lines = f'{json.dumps({"messages": TURNS})}\r\n\n  \n{{"text": "line\\u2028end \u2028 日本"}}\n'
    examples = read_examples(write(name, lines))
    assert places(examples) == [f"{name}:1", f"{name}:4"]
    assert isinstance(examples[0].content, Conversation)
    assert examples[1].content == PlainText("line\u2028end \u2028 日本")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(write, name):
    content = {"a.jsonl": '{"text": "x"}', "a.csv": "text\nx\n"}[name]
    assert read_examples(write(name, b"\xef\xbb\xbf" + content.encode()))[0].content == PlainText("x")


def test_csv_is_read_with_the_line_where_each_record_begins(write):
    text = 'id,prompt, completion\n1,"a, ""b""\nc", d\n\n2,e,f\n'
    examples = read_examples(write("a.csv", text))
    assert places(examples) == ["a.csv:2", "a.csv:5"]
    assert examples[0].content == PromptCompletion('a, "b"\nc', " d")
    assert examples[1].content == PromptCompletion("e", "f")


def test_csv_can_hold_text_or_conversations(write):
    assert read_examples(write("a.csv.gz", "text\nx\n"))[0].content == PlainText("x")
    cell = json.dumps(TURNS).replace('"', '""')
    [example] = read_examples(write("b.csv", f'messages\n"{cell}"\n'))
    assert isinstance(example.content, Conversation)
    assert example.content.messages[1].content == SECRET


def test_labelled_texts_are_read_from_every_kind_of_file(write, tmp_path):
    rows: list[dict[str, Any]] = [
        {"text_a": "one", "text_b": "two", "label": 1},
        {"text_a": "three", "text_b": None, "label": 0.5},
    ]
    expected = [LabelledText("one", "two", 1), LabelledText("three", None, 0.5)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    table = "text_a,text_b,label,idx\none,two,1,7\nthree,,0.5,8\n"
    for name, content in (("a.jsonl.gz", lines), ("a.csv", table)):
        assert [example.content for example in read_examples(write(name, content))] == expected
    parquet.write_table(pa.Table.from_pylist([{**row, "idx": 3} for row in rows]), tmp_path / "a.parquet")
    read = [example.content for example in read_examples(str(tmp_path / "a.parquet"))]
    # A column has one type.
    assert read == [LabelledText("one", "two", 1.0), LabelledText("three", None, 0.5)]


def test_a_tables_whole_labels_stay_whole(write, tmp_path):
    parquet.write_table(pa.table({"text_a": ["x"], "label": [1]}), tmp_path / "a.parquet")
    for path in (str(tmp_path / "a.parquet"), write("a.csv", "text_a,label\nx,1\n")):
        [example] = read_examples(path)
        assert isinstance(example.content, LabelledText)
        assert (example.content.label, type(example.content.label)) == (1, int)


def test_parquet_rows_are_counted_over_its_batches(tmp_path):
    rows_in_a_batch = 65_536  # pyarrow's own default
    parquet.write_table(pa.table({"text": ["x"] * (rows_in_a_batch + 2)}), tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet"))
    assert [example.line for example in examples[-3:]] == [rows_in_a_batch, rows_in_a_batch + 1, rows_in_a_batch + 2]


def test_parquet_is_read_over_all_its_row_groups(tmp_path):
    table = pa.table({"messages": [TURNS] * 3, "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    examples = read_examples(str(tmp_path / "a.parquet"))
    assert places(examples) == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    assert isinstance(examples[2].content, Conversation)
    assert [message.role for message in examples[2].content.messages] == ["user", "assistant"]


def test_a_split_keeps_its_rows_and_their_numbers(write, tmp_path):
    rows = [{"text": "a", "split": "train"}, {"text": "b", "split": "held_out"}, {"text": "c"}]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    assert places(read_examples(path, split="held_out")) == ["a.jsonl:2"]
    assert len(read_examples(path)) == 3
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert places(read_examples(str(tmp_path / "a.parquet"), split="held_out")) == ["a.parquet:2"]
    assert places(read_examples(write("a.csv", "split,text\ntrain,a\nheld_out,b\n"), split="held_out")) == ["a.csv:3"]


def test_a_split_that_no_row_has_is_refused_with_those_that_exist(write):
    path = write("a.jsonl", '{"text": "a", "split": "train"}\n{"text": "b", "split": "held_out"}\n{"text": "c"}')
    refused(path, r"expected rows with split 'test', got only 'held_out', 'train'\.", split="test")
    refused(write("b.jsonl", '{"text": "Marlowe"}'), r"with split 'test', got no column 'split'\.", split="test")


def test_a_row_that_is_no_object_is_refused_under_a_split_too(write):
    path = write("a.jsonl", '{"text": "a", "split": "train"}\n["Marlowe"]')
    refused(path, r"expected an object with keys, got .* list \(a\.jsonl:2\)", split="train")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", r"Data 'a\.jsonl': expected at least one row, got none\."),
        ("a.csv", "", r"expected at least one row, got none"),
        ("a.csv", "text\n", r"expected at least one row, got none"),
        ("a.txt", SECRET, r"expected a name that ends in \.jsonl, .*, got another ending\."),
        ("a.parquet.gz", SECRET, r"expected a name that ends in"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "Marlowe", }',
            r"JSON: .* at column \d+ \(a\.jsonl:2\)\. Write one object",
        ),
        ("a.json", '[\n{"text": "Marlowe"}\n]', r"JSON: expected .* at column \d \(a\.json:1\).*no list around them"),
        ("a.jsonl", '{"text": ' + "[" * 200_000, r"got a number too long or a nesting too deep \(a\.jsonl:1\)"),
        ("a.jsonl", '{"text": "Marlowe", "n": 1' + "0" * 5000 + "}", r"got a number too long .* \(a\.jsonl:1\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "Marlowe \xe9"}', r"expected UTF-8, .* byte 19 \(a\.jsonl:2\)"),
        ("a.csv", b"text\nx\nMarlowe \xe9\n", r"expected UTF-8, got another encoding at byte 9 \(a\.csv:3\)"),
        ("a.csv", 'text\n"Marlowe" x\n', r"CSV: expected a well-formed record, got: .* \(a\.csv:2\)"),
        ("a.csv", 'text\n"a\nb"\n"Marlowe\n', r"CSV: .* unexpected end of data \(a\.csv:4\)"),
        ("a.csv", "prompt,completion\nMarlowe\n", r"expected 2 fields as in the header, got 1 \(a\.csv:2\)"),
        ("a.csv", "text\nx\nMarlowe,x\n", r"expected 1 fields as in the header, got 2 \(a\.csv:3\)"),
        ("a.csv", "text, text\nMarlowe,x\n", r"column names that differ, got one twice \(a\.csv:1\)"),
        ("a.csv", "messages\nMarlowe\n", r"JSON: .* at column 1 \(a\.csv:2, column 'messages'\)"),
        ("a.csv", "text_a,label\nx,Marlowe\n", r"'label': expected a number, got a value of type str \(a\.csv:2\)"),
        ("a.csv", "text_a,label\nMarlowe,\n", r"'label': expected a number, got nothing \(a\.csv:2\)"),
        ("a.csv", "Marlowe\nx\n", r"got none of these keys \(a\.csv:2\)"),
        ("a.parquet", SECRET, r"expected a whole Parquet file, got ArrowInvalid after row 0\."),
    ],
)
def test_each_malformed_file_is_refused_without_its_text(write, name, content, expected):
    refused(write(name, content), expected)


@pytest.mark.parametrize(
    "data", [b"Marlowe", gzip.compress(b'{"text": "Marlowe"}', mtime=0)[:-9], b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff"]
)
def test_a_damaged_gzip_file_is_refused(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    message = refused(str(tmp_path / "a.jsonl.gz"), r"expected a whole gzip file, got other or damaged bytes\.")
    assert "b'Ma'" not in message  # as gzip's own error says


def test_a_parquet_table_without_a_known_column_is_refused(tmp_path):
    parquet.write_table(pa.table({"question": [SECRET]}), tmp_path / "a.parquet")
    refused(str(tmp_path / "a.parquet"), r"got none of these keys \(a\.parquet:1\)")


def test_a_file_that_may_not_be_read_is_refused(write, monkeypatch):
    path = write("a.jsonl", '{"text": "x"}')

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"expected a readable file, got: Permission denied\."):
        read_examples(path)


def test_a_folder_and_a_missing_file_are_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    refused(str(tmp_path), r"expected a file, got a folder\. Name one file in it")
    for name in (str(tmp_path / "none"), "./none", "family.jsonl", "letters/family.csv.gz", "notes.txt", "a/b/c"):
        refused(name, r"expected a file or a hub data set such as org/name, got no file there\.")


class FakeHub:
    """Stands for the hub: holds what it was asked, and answers with a table or an error."""

    def __init__(self, monkeypatch, answer, *, probe=None):
        self.asked: list[tuple[str, str]] = []

        def download(name, **options):
            assert options["repo_type"] == "dataset"
            if probe:
                raise probe

        def load(name, *, split):
            self.asked.append((name, split))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_hub_data_set_is_read_with_its_split_in_its_name(monkeypatch):
    table = datasets.Dataset.from_list([{"messages": TURNS, "score": 1}, {"messages": TURNS[::-1], "score": 2}])
    hub = FakeHub(monkeypatch, table)
    examples = read_examples("org/talk.v2")
    assert places(examples) == ["org/talk.v2[train]:1", "org/talk.v2[train]:2"]
    assert isinstance(examples[1].content, Conversation)
    assert examples[1].content.messages[0].role == "assistant"
    read_examples("talk", split="test[:10]")
    assert hub.asked == [("org/talk.v2", "train"), ("talk", "test[:10]")]


def test_a_hub_data_sets_classes_are_numbers(monkeypatch):
    rows = {"text_a": ["one"], "text_b": ["two"], "label": [1], "idx": [0]}
    classes = datasets.ClassLabel(names=["bad", "good"])
    FakeHub(monkeypatch, datasets.Dataset.from_dict(rows).cast_column("label", classes))
    assert read_examples("org/reviews")[0].content == LabelledText("one", "two", 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Unknown split \"test\". Should be one of ['train']."), r"got: Unknown split .* \['train'\] \("),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/x' doesn't exist"),
            r"got: Dataset 'org/x' doesn't exist",
        ),
        (RuntimeError("Dataset scripts are\n no longer supported"), r"got: Dataset scripts are no longer supported \("),
        (datasets.exceptions.DatasetsError(), r"got: DatasetsError \("),
        (datasets.exceptions.DatasetGenerationError(f"row {SECRET}"), r"got: DatasetGenerationError \("),
    ],
)
def test_what_the_hub_says_is_passed_on_with_what_was_tried(monkeypatch, error, reason):
    FakeHub(monkeypatch, error)
    message = refused("org/x", reason, split="test")
    assert "(tried: local file org/x; hub data set org/x, split test). Check the name" in message


def test_without_a_network_the_hub_is_given_up_at_the_first_try(monkeypatch):
    hub = FakeHub(monkeypatch, None, probe=huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError"))
    refused("org/x", r"got: no answer from the hub, and no copy here of what it would send \(tried")
    assert hub.asked == []


def test_offline_mode_is_no_answer(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("tidelock-no-such-org/no-such-data", r"got: no answer from the hub.* local file tidelock-no-such-org/no")


def test_an_empty_hub_split_is_refused(monkeypatch):
    FakeHub(monkeypatch, datasets.Dataset.from_dict({"text": []}))
    refused("org/x", r"Data 'org/x\[train\]': expected at least one row, got none")


def test_reading_a_local_file_loads_no_slow_library(write):
    path = write("a.jsonl", '{"text": "x"}')
    program = (
        f"import sys; from tidelock.data.source import read_examples; read_examples({path!r}); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "tidelock.data.source" in loaded
    assert not loaded & {"torch", "pyarrow", "datasets", "transformers"}
