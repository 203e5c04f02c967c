from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.corpus.inputs import plan_units, read_unit
from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.corpus.reading.recognition import describe
from megatron_omega.corpus.reading.records import BadRecord, Document, Record
from megatron_omega.errors import DataError

LIMIT = 1000


def read_all(files: list[InputFile], unit_bytes: int = 1 << 20, keys: tuple[str, ...] = ("text",)) -> list[Record]:
    return [
        record
        for task in plan_units(files, unit_bytes)
        for unit in task
        for record in read_unit(files[unit.file], unit, keys, LIMIT)
    ]


def texts_of(records: list[Record]) -> list[str]:
    return [record.texts[0] for record in records if isinstance(record, Document)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), max_size=12),
    st.integers(1, 90),
    st.booleans(),
)
@settings(max_examples=60)
def test_byte_ranges_of_any_size_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, is_closed: bool
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(jsonl(texts) if is_closed else jsonl(texts).rstrip(b"\n"))
    files = [describe(path)]
    whole = [(type(record), getattr(record, "texts", None)) for record in read_all(files)]
    parts = [(type(record), getattr(record, "texts", None)) for record in read_all(files, unit_bytes)]
    assert parts == whole and len(whole) == len(texts)


def test_every_compression_and_format_gives_the_same_texts(tmp_path: Path) -> None:
    texts = [f"text {n} é" * 3 for n in range(50)]
    data = jsonl(texts)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "c.jsonl.zst").write_bytes(compressor.compress(data[:900]) + compressor.compress(data[900:]))
    (tmp_path / "d.json.xz").write_bytes(lzma.compress(data))
    (tmp_path / "e.ndjson.bz2").write_bytes(bz2.compress(data))
    table = pyarrow.table({"text": texts, "id": list(range(50))})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet", row_group_size=7)
    for name, writer in (("g.arrow", pyarrow.ipc.new_stream), ("h.arrow", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as sink:
            sink.write_table(table, max_chunksize=9)
    for path in sorted(tmp_path.iterdir()):
        assert texts_of(read_all([describe(path)], unit_bytes=400)) == texts, path.name


def test_plain_text_files_are_documents(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("second\n")
    (folder / "a.md").write_text("\ufefffirst")
    (folder / "more" / "c").write_text("third")
    (folder / ".hidden").write_text("no")
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    records = read_all(expand_inputs([str(folder)]))
    assert texts_of(records) == ["first", "second\n", "third"]
    assert [record.reason for record in records if isinstance(record, BadRecord)] == ["invalid UTF-8"]


def test_bad_records_have_their_reasons(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{not json}",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ""}',
        b"",
        b'{"text": "' + b"x" * 5000 + b'"}',
        b"[1]",
        b'{"text": "also good"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    for unit_bytes in (1 << 20, 17, 1):
        records = read_all([describe(path)], unit_bytes)
        assert [record.reason if isinstance(record, BadRecord) else "" for record in records] == [
            "",
            "not JSON",
            "key 'text' missing",
            "key 'text' is not a string",
            "key 'text' is null",
            "NUL",
            "invalid UTF-8",
            "invalid Unicode in the text",
            "empty",
            "",
            "longer than 1000 bytes",
            "not a JSON object",
            "",
        ]


def test_several_keys_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t", "text": "x"}\n{"text": "y"}\n')
    first, second = read_all([describe(path)], keys=("text", "title"))
    assert first == Document(0, ("x", "t"))
    assert second == BadRecord(1, "key 'title' missing")


def test_small_files_share_a_task_and_large_ones_are_cut(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 10), ("c", 500), ("d", 10)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    tasks = plan_units(expand_inputs([str(tmp_path)]), 100)
    assert [[(unit.file, unit.start) for unit in task] for task in tasks] == [
        [(0, 0), (1, 0)],
        *[[(2, start)] for start in range(0, 500, 100)],
        [(3, 0)],
    ]


def test_globs_folders_and_files_are_found_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    found = expand_inputs([str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path)])
    assert [Path(file.path).name for file in found] == ["b.jsonl", "a.jsonl"]
    with pytest.raises(DataError) as caught:
        expand_inputs(["nowhere.jsonl", str(tmp_path), "none*"])
    assert len(caught.value.findings) == 2


def test_a_folder_of_save_to_disk_is_read_in_its_order(tmp_path: Path) -> None:
    for number in (1, 0):
        table = pyarrow.table({"text": [f"text {number}"]})
        with pyarrow.ipc.new_stream(str(tmp_path / f"data-{number}.arrow"), table.schema) as sink:
            sink.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{\n}")
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": f"data-{number}.arrow"} for number in (1, 0)]}))
    assert texts_of(read_all(expand_inputs([str(tmp_path)]))) == ["text 1", "text 0"]
    state.write_text("{}")
    with pytest.raises(DataError, match="state.json is not that of a saved data set"):
        expand_inputs([str(tmp_path)])


def test_a_missing_column_and_a_broken_file_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'text'; it has body"):
        read_all([describe(tmp_path / "a.parquet")])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 900)[:-20])
    with pytest.raises(
        DataError, match=r"b.jsonl.gz is damaged: its gz stream 1, which begins at byte 0, is cut short"
    ):
        read_all([describe(tmp_path / "b.jsonl.gz")])
    rows = jsonl(["x"] * 9000)
    for name, data in (("z.jsonl.zst", zstandard.compress(rows)), ("z.jsonl.xz", lzma.compress(rows))):
        for length in (len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(DataError, match=rf"{name} is damaged: its .* is cut short"):
                read_all([describe(tmp_path / name)])
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"c.parquet is not a readable parquet file"):
        read_all([describe(tmp_path / "c.parquet")])
