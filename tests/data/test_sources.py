"""Sources: what each kind gives, resuming at the exact next document, errors that name the place."""

import gzip
import json

import pytest

from fastformer.data.corpora import Document
from fastformer.data.sources import open_source

RECORDS = [{"id": n, "text": f"text number {n}, ü"} for n in range(7)]
TEXTS = [record["text"] for record in RECORDS]


def write_lines(path, records, opener=open):
    with opener(path, "wb") as file:
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    return path


def write_parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3)
    return path


def a_directory(tmp_path):
    root = tmp_path / "all"
    (root / "sub").mkdir(parents=True)
    write_lines(root / "a.jsonl", RECORDS[:2])
    write_lines(root / "b.jsonl.gz", RECORDS[2:4], gzip.open)
    (root / "c.txt").write_text(TEXTS[4], encoding="utf-8")
    (root / "empty.txt").write_text("")
    (root / "ignored.bin").write_bytes(b"\xff\xfe")
    write_lines(root / "sub" / "d.ndjson", RECORDS[5:])
    return root


def datasets():
    return pytest.importorskip("datasets", reason="the package datasets is not installed")


SOURCES = {
    "jsonl": lambda tmp: write_lines(tmp / "x.jsonl", RECORDS),
    "jsonl.gz": lambda tmp: write_lines(tmp / "x.jsonl.gz", RECORDS, gzip.open),
    "parquet": lambda tmp: write_parquet(tmp / "x.parquet", RECORDS),
    "directory": a_directory,
    "sequence": lambda tmp: TEXTS,
    "dataset": lambda tmp: datasets().Dataset.from_list(RECORDS),
    "iterable dataset": lambda tmp: datasets().Dataset.from_list(RECORDS).to_iterable_dataset(num_shards=2),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_document_once_and_again_in_the_next_pass(kind, tmp_path):
    source = open_source(SOURCES[kind](tmp_path))
    assert [document.text for document in source] == TEXTS
    assert [document.text for document in source] == TEXTS
    names = [document.name for document in source]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", SOURCES)
def test_resuming_gives_the_exact_next_document(kind, tmp_path):
    def opened():
        """A stream of `datasets` has one position, so everyone gets their own."""
        if kind == "iterable dataset":
            return open_source(SOURCES[kind](tmp_path))
        return open_source(spec)

    spec = SOURCES[kind](tmp_path)
    whole = list(opened())
    for taken in range(len(TEXTS) + 1):
        source = opened()
        stream = iter(source)
        assert [next(stream) for _ in range(taken)] == whole[:taken]
        state = json.loads(json.dumps(source.state_dict()))
        resumed = opened()
        resumed.load_state_dict(state)
        assert list(resumed) == whole[taken:]
        assert list(resumed) == whole, "and the next pass is a whole one"
        # The loop itself goes on too, whoever took the state.
        assert list(stream) == whole[taken:]


def test_a_loop_that_was_left_goes_on(tmp_path):
    source = open_source(write_lines(tmp_path / "x.jsonl", RECORDS))
    for document in source:
        if document.metadata["id"] == 2:
            break
    assert [document.metadata["id"] for document in source] == [3, 4, 5, 6]


def test_names_and_metadata(tmp_path):
    records = [{"text": "a", "name": "first", "year": 1603}, {"text": "b", "year": None}]
    for path in (write_lines(tmp_path / "x.jsonl", records), write_parquet(tmp_path / "x.parquet", records)):
        one, two = open_source(path)
        assert (one.name, one.metadata) == ("first", {"year": 1603})
        assert two.name == f"{path.name}:2" and two.metadata["year"] is None
    (document,) = open_source(
        write_lines(tmp_path / "y.jsonl", [{"body": "b", "id": 5}]), text_field="body", name_field="id"
    )
    assert document == Document("5", "b", {})


def test_corpora_are_sources():
    source = open_source("python")
    first = next(iter(source))
    assert source.name == "Python language reference" and first.text
    assert open_source([first, Document("x", "y")]).documents[1].name == "x"
    assert open_source(source) is source


def test_lines_without_anything_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')  # byte-order mark, Windows, no last newline
    assert [(d.text, d.name) for d in open_source(path)] == [("a", "x.jsonl:1"), ("b", "x.jsonl:3")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": \n', r"x.jsonl, line 2 is not JSON: .* at column"),
        (
            b'{"text": "a"}\n\n{"txt": "b", "id": 1}\n',
            r"line 3 has no field 'text'; it has 'txt', 'id'; did you mean 'txt'\?",
        ),
        (b'{"text": 5}\n', "line 1: the field 'text' holds int"),
        (b'["text"]\n', "line 1: expected a record with the field 'text', got list"),
        (b'{"text": "Stra\xdfe"}\n', "line 1 is not UTF-8 .* undecodable='guess'"),
        (b"", "x.jsonl is empty"),
        (b"\n\n", "x.jsonl is empty"),
    ],
)
def test_bad_lines_are_named(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(path))


def test_a_missing_field_of_parquet_names_the_row(tmp_path):
    with pytest.raises(ValueError, match=r"x.parquet, row 1 has no field 'txt'.*did you mean 'text'"):
        list(open_source(write_parquet(tmp_path / "x.parquet", RECORDS), text_field="txt"))


def test_undecodable_bytes_can_be_guessed(tmp_path):
    pytest.importorskip("ftfy", reason="the package ftfy is not installed")
    path = tmp_path / "x.txt"
    path.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x.txt is not UTF-8"):
        list(open_source(path))
    assert [document.text for document in open_source(path, undecodable="guess")] == ["Straße"]


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "x.docx").write_bytes(b"PK")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'nowhere.txt' does not exist; expected a file.*hf:NAME"):
        open_source("nowhere.txt")
    with pytest.raises(ValueError, match=r"x.docx is of no known kind; expected .txt, .*.parquet"):
        open_source(tmp_path / "x.docx")
    with pytest.raises(ValueError, match="folder holds no files to read"):
        open_source(tmp_path / "folder")
    with pytest.raises(ValueError, match="documents holds no documents"):
        open_source([])
    with pytest.raises(ValueError, match="undecodable: got 'ignore', expected one of error, guess"):
        open_source("python", undecodable="ignore")
    with pytest.raises(TypeError, match="spec: got int"):
        open_source(5)


def test_a_state_of_another_source_is_refused(tmp_path):
    root = a_directory(tmp_path)
    source = open_source(root)
    next(iter(source))
    state = source.state_dict()
    with pytest.raises(ValueError, match="state: taken from"):
        open_source(root / "a.jsonl").load_state_dict(state)
    (root / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"stopped in 'a.jsonl', one of 5 files; .* has 4 now, without it"):
        open_source(root).load_state_dict(state)


def test_a_data_set_with_splits_has_to_be_chosen_from():
    splits = datasets().DatasetDict({"train": datasets().Dataset.from_list(RECORDS)})
    with pytest.raises(ValueError, match="splits train; choose one"):
        open_source(splits)
