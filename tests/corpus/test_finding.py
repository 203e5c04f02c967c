"""What an input is: found once, told by its content, and what cannot be read is refused by its name."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_omega.corpus.inputs import read_unit, units_of
from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.reading.recognition import describe
from megatron_omega.corpus.reading.records import BadRecord, Document
from megatron_omega.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(path: Path, keys: tuple[str, ...] = ("text",)) -> list[str]:
    """Return the texts of all files of an input; bad records as their reason in brackets."""
    files = expand_inputs([str(path)])
    units = (unit for number, file in enumerate(files) for unit in units_of(number, file, 1 << 20))
    records = (record for unit in units for record in read_unit(files[unit.file], unit, keys, 1 << 20))
    return [
        record.texts[0] if isinstance(record, Document) else f"[{record.reason}]"
        for record in records
        if isinstance(record, Document | BadRecord)
    ]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        texts(path)
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name", ["part-00000", "a.jsonlines", "b.ndjson", "c.txt", "d.jsonl-00001-of-00004", "e.JSONL"]
)
def test_lines_of_json_are_known_by_content(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, LINES)) == ["one", "two"]
    assert texts(write(tmp_path / f"{name}.part", gzip.compress(LINES))) == ["one", "two"]


@pytest.mark.parametrize(
    "content", [b"plain text\n{}", b"{braces} at the start", b'{"text": 1} and more', b"[1] a list"]
)
def test_text_stays_text(tmp_path: Path, content: bytes) -> None:
    assert texts(write(tmp_path / "document", content)) == [content.decode()]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "one"}, {"text": "two"}]).encode(),
        json.dumps([{"text": "one"}, {"text": "two"}], indent=2).encode(),
        json.dumps({"text": "one"}, indent=2).encode() + b"\n" + json.dumps({"text": "two"}, indent=2).encode(),
        b'[{"text": "one"},\n{"text": "two"}]\n',
        json.dumps([{"text": "long " * 40}] * 900, indent=1).encode(),
    ],
)
def test_one_value_over_many_lines_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    for name in ("a.json", "b.jsonl", "c"):
        assert "not JSON Lines; write each record on a line of its own: jq" in refusal(write(tmp_path / name, content))


def test_a_damaged_first_line_is_one_bad_record(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", b'{"text": "cut\n' + LINES)) == ["[not JSON]", "one", "two"]


def test_archives_and_strangers_are_refused_by_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(write(tmp_path / "inside.jsonl", LINES))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside.jsonl", LINES)
    assert "is a zip archive; unpack it" in refusal(tmp_path / "a.zip")
    assert "is a tar archive; unpack it" in refusal(write(tmp_path / "a.tar", buffer.getvalue()))
    assert "is a tar archive; unpack it" in refusal(write(tmp_path / "a.tgz", gzip.compress(buffer.getvalue())))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    assert "a pointer of Git LFS" in refusal(write(tmp_path / "b.jsonl", pointer))
    assert "is no gz file, though its name says so" in refusal(write(tmp_path / "c.jsonl.gz", LINES))
    assert "it is empty" in refusal(write(tmp_path / "d.jsonl.xz", b""))
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refusal(tmp_path / "pipe")
    assert "cannot be read in parts" in refusal(write(tmp_path / "e.parquet.xz", lzma.compress(b"PAR1")))


def test_rows_of_csv_and_tsv_have_the_names_of_the_first_line(tmp_path: Path) -> None:
    rows = '\ufeffid,text\r\n1,"one, with ""quotes""\nand a line"\r\n\r\n2,two\r\n3\r\n4,four,5\r\n5,\r\n'.encode()
    wanted = [
        'one, with "quotes"\nand a line',
        "two",
        "[fewer fields than the header]",
        "[more fields than the header]",
        "[empty]",
    ]
    assert texts(write(tmp_path / "a.csv", rows)) == wanted
    assert texts(write(tmp_path / "b.csv.gz", gzip.compress(rows))) == wanted
    assert texts(write(tmp_path / "c.tsv", b"text\tid\none, two\t1\n\xff\t2\n")) == [
        "one, two",
        "[invalid Unicode in the text]",
    ]
    with pytest.raises(DataError, match="has no column 'body'; its first line names id, text"):
        texts(tmp_path / "b.csv.gz", ("body",))
    assert "is no csv file from line" in refusal(write(tmp_path / "d.csv", b'text\n"never closed\n' + LINES * 9))
    assert "2 columns 'text'" in refusal(write(tmp_path / "e.csv", b"text,text\na,b\n"))


def test_a_folder_leaves_aside_what_speaks_of_its_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "README.md",
        "LICENSE",
        "SHA256SUMS",
        "dataset_infos.json",
        ".git/config",
        "_SUCCESS",
        "data/a.jsonl.md5",
    ):
        write(tmp_path / name, b"{}\n")
    write(tmp_path / "data" / "a.jsonl", LINES)
    assert texts(tmp_path) == ["one", "two"]
    for name in ("README.md", "LICENSE", "SHA256SUMS", "dataset_infos.json", ".git/", "_SUCCESS", "data/a.jsonl.md5"):
        assert name in caplog.text
    assert texts(write(tmp_path / "only" / "README.md", b"a document")) == ["a document"]
    assert texts(tmp_path / "only") == ["a document"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", LINES)
    root = write(tmp_path / "root" / "a.jsonl", b'{"text": "zero"}\n').parent
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again.jsonl").symlink_to(root / "a.jsonl")
    (root / "loop").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert texts(root) == ["zero", "one", "two"]
    assert texts(tmp_path / "ro*") == ["zero", "one", "two"]
    (root / "gone.jsonl").symlink_to(tmp_path / "nothing")
    assert "gone.jsonl is a link to nothing" in refusal(root)


def test_a_saved_data_set_stays_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.arrow", b"")
    for name in ("../secret.arrow", "/etc/passwd", "", 5, "missing.arrow"):
        state = write(tmp_path / "set" / "state.json", json.dumps({"_data_files": [{"filename": name}]}).encode())
        assert str(state) in refusal(state.parent)


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (b'{"text": "a", "score": NaN, "other": -Infinity}', "a"),
        (b'{"text": "a", "emoji": "\\ud83d"}', "a"),
        (b'{"text": "a", "n": ' + b"9" * 6000 + b"}", "a"),
        (b'\xef\xbb\xbf{"text": "a"}', "a"),
        (b'{"text": "half \\ud83d"}', "[invalid Unicode in the text]"),
        (b'{"text": null}', "[key 'text' is null]"),
        (b'{"text": 1e999}', "[key 'text' is not a string]"),
        (b'{"text": "a", "deep": ' + b"[" * 200_000 + b"}", "[nested too deeply]"),
        (b'{"text": "a",}', "[not JSON]"),
    ],
)
def test_a_record_is_lost_only_for_what_is_wrong_with_it(tmp_path: Path, line: bytes, outcome: str) -> None:
    path = write(tmp_path / "a.jsonl", LINES + b"\n \r\n\xef\xbb\xbf\n" + line + b"\n\n")
    assert texts(path) == ["one", "two", outcome]


def test_content_tells_what_a_plain_name_holds(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "blob")
    assert texts(tmp_path / "blob") == ["one", "[key 'text' is null]"]
    assert describe(write(tmp_path / "x", lzma.compress(LINES))).compression == "xz"
