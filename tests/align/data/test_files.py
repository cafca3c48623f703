from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.files import Raw, local_files, parse, read_file, read_hub


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, text_chars: int = 0) -> list[tuple[str, object]]:
    return [(raw.place, parse(raw)) for raw in read_file("f", path, text_chars)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_carry_their_number(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"a{suffix}", '{"a": 1}\n\n{"a": "\u2028é"}\n')
    assert read(path) == [("f:1", {"a": 1}), ("f:3", {"a": "\u2028é"})]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_array_of_objects_is_counted(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"a{suffix}", '[{"a": 1}, {"a": 2}]')
    assert read(path) == [("f[1]", {"a": 1}), ("f[2]", {"a": 2})]


def test_parquet_gives_plain_objects(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("f[1]", rows[0]), ("f[2]", rows[1])]


def test_text_is_cut_at_empty_lines_once_it_is_long_enough(tmp_path: Path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\nthree\n\nfour\n")
    assert read(path, text_chars=6) == [
        ("f:1", {"text": "one\n\ntwo\nthree\n\n"}),
        ("f:6", {"text": "four\n"}),
    ]
    assert read(path) == [("f:1", {"text": "one\n\ntwo\nthree\n\nfour\n"})]


@given(st.lists(st.sampled_from(["a\n", "bb b\n", "\n", " \n"]), max_size=20), st.integers(0, 9))
def test_no_text_is_lost_between_pieces(tmp_path_factory, lines: list[str], text_chars: int):
    path = write(tmp_path_factory.mktemp("t") / "a.txt", "".join(lines))
    joined = "".join(record["text"] for _, record in read(path, text_chars))
    assert "".join(lines).startswith(joined)
    assert not "".join(lines)[len(joined) :].strip()


def test_folder_and_glob_mean_their_files_in_order(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "c.md"):
        write(tmp_path / name, '{"text": "x"}')
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "d.txt.gz", "x")
    assert local_files(".", tmp_path) == [
        ("a.jsonl", tmp_path / "a.jsonl"),
        ("b.jsonl", tmp_path / "b.jsonl"),
    ]
    assert [name for name, _ in local_files("*.jsonl", tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [name for name, _ in local_files("**/*.gz", tmp_path)] == ["deep/d.txt.gz"]
    assert local_files(str(tmp_path / "a.jsonl"), Path("elsewhere")) == [
        (str(tmp_path / "a.jsonl"), tmp_path / "a.jsonl")
    ]


@pytest.mark.parametrize("path", ["none.jsonl", "none/*.jsonl", "empty"])
def test_missing_file_is_named(tmp_path: Path, path: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.path = '.*': no such file, folder of .jsonl"):
        local_files(path, tmp_path)


def test_unknown_form_is_named(tmp_path: Path):
    write(tmp_path / "a.csv", "x")
    with pytest.raises(ValueError, match=r"data.path = 'a.csv': expected a file of .jsonl, .json"):
        local_files("a.csv", tmp_path)


def test_broken_line_is_told_with_its_column():
    with pytest.raises(ValueError, match=r"broken JSON at column 7: Expecting value; expected one"):
        parse(Raw("f:1", b'{"a": }'))


def test_line_that_is_not_utf8_is_told():
    with pytest.raises(ValueError, match="byte 3 of the line is not UTF-8"):
        parse(Raw("f:1", b'{"\xff"}'))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", r"f: broken JSON: .*; a file of lines is named .jsonl"),
        ("a.json", b"{}", r"f: a dict, expected a list of objects"),
        ("a.txt", b"ab\xff", r"f: byte 3 is not UTF-8"),
        ("a.parquet", b"ab", r"f: broken parquet file: "),
    ],
)
def test_broken_file_is_told(tmp_path: Path, name: str, data: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, data))


@pytest.mark.parametrize("data", [b"ab", gzip.compress(b'{"a": 1}', mtime=0)[:-4]])
def test_broken_gzip_is_told(tmp_path: Path, data: bytes):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"f: broken gzip file: .*; fetch or write it again"):
        read(tmp_path / "a.jsonl.gz")


def test_hub_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": "one"}, {"text": "two"}]
    write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_hub(str(folder), "", "train", "main"))
    assert [raw.data for raw in found] == rows
    assert found[1].place == f"{folder}[train]:2"


def test_hub_that_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.hub = .*none\[train\]: datasets could not load it"):
        list(read_hub(str(tmp_path / "none"), "", "train", "main"))
