from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_omega.corpus import preprocess as engine
from megatron_omega.corpus.merge import merge_shards
from megatron_omega.corpus.options import Options, Result, Stream
from megatron_omega.corpus.parts import PartMaker, PartReport, Task
from megatron_omega.corpus.preprocess import preprocess
from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.reading.hugging_face import line_blocks
from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.origins import load_origins
from megatron_omega.data.sidecar import read_sidecar, to_json
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

Make = Callable[..., Result]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make(tmp_path: Path, model_path: Path) -> Make:
    def run(source: Path | list[Path] | Stream, name: str = "out", **options: object) -> Result:
        inputs = source
        if not isinstance(inputs, Stream):
            paths = inputs if isinstance(inputs, list) else [inputs]
            inputs = expand_inputs([str(path) for path in paths])
        settings = {"unit_bytes": 20_000, "append_eod": True, "workers": 0, **options}
        return preprocess(inputs, Options(str(tmp_path / name), str(model_path), **settings))  # type: ignore[arg-type]

    return run


def content(result: Result) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for prefix in result.prefixes for suffix in ("bin", "idx", "sums")]


def test_every_document_is_there_with_sentencepieces_ids(
    make: Make, corpus: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    result = make(corpus)
    shard = IndexedShard(result.prefixes[0])
    assert [shard.document(n).tolist() for n in range(len(shard))] == [[*tokenizer.encode(text), 3] for text in texts]
    shard.check_all()
    sidecar = read_sidecar(result.prefixes[0])
    assert sidecar and (sidecar.documents, sidecar.tokens) == (len(texts), shard.num_tokens)
    assert sidecar.tokenizer_fingerprint == tokenizer.fingerprint
    assert not list(Path(corpus.parent).glob("*.parts"))


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 20_000), (2, 3_000), (3, 500), (0, 1 << 20)])
def test_workers_and_chunks_change_no_byte(make: Make, corpus: Path, workers: int, unit_bytes: int) -> None:
    reference = content(make(corpus, "reference"))
    assert content(make(corpus, "other", workers=workers, unit_bytes=unit_bytes)) == reference


def test_every_kind_of_file_gives_the_same_bytes(make: Make, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    reference = content(make(corpus, "reference"))
    data = corpus.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(data))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet", row_group_size=50)
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet"):
        assert content(make(tmp_path / name, name)) == reference
    with corpus.open("rb") as stream:
        assert content(make(Stream("<stdin>", line_blocks(stream, 7_000)), "stream")) == reference


def test_a_finished_output_is_left_alone(make: Make, corpus: Path) -> None:
    first = make(corpus)
    again = make(corpus)
    assert again.was_finished and not first.was_finished
    assert (again.documents, again.tokens) == (first.documents, first.tokens)
    with pytest.raises(DataError, match=r"exists and was made from other inputs or options; .*--overwrite"):
        make(corpus, append_eod=False)
    assert make(corpus, append_eod=False, is_overwriting=True).tokens[0] == first.tokens[0] - first.documents


def test_what_was_finished_before_a_failure_is_used(make: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = content(make(corpus, "reference"))
    made: list[int] = []
    real = PartMaker.make

    def fail_at_two(self: PartMaker, task: Task) -> PartReport:
        if task.number == 2 and len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(task.number)
        return real(self, task)

    monkeypatch.setattr(PartMaker, "make", fail_at_two)
    with pytest.raises(DataError, match="is full; finished parts are kept: free some space"):
        make(corpus)
    assert not list(corpus.parent.glob("out_text_document*"))
    made.append(-1)
    assert content(make(corpus)) == reference
    assert made == [0, 1, -1, *range(2, max(made) + 1)]


def test_parts_of_other_inputs_are_not_used(
    make: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    def stop(*_: object) -> None:
        raise DataError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "join_parts", stop)
        with pytest.raises(DataError, match="stopped"):
            make(corpus)
    corpus.write_text(json.dumps({"text": "another corpus"}) + "\n")
    result = make(corpus)
    assert result.documents == 1


def test_a_mended_file_costs_its_own_parts_only(
    make: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    paths = [tmp_path / f"{number}.jsonl.gz" for number in range(3)]
    blocks = [b"".join(lines[100 * number : 100 * number + 100]) * 3 for number in range(3)]  # more than a look
    for block, path in zip(blocks, paths, strict=True):
        path.write_bytes(gzip.compress(block))
    corpus.write_bytes(b"".join(blocks))
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"1.jsonl.gz is damaged: .* is cut short"):
        make(paths, unit_bytes=100)
    assert not list(tmp_path.glob("out.parts/*.partial"))
    (tmp_path / "out.parts" / "killed.partial").touch()
    paths[1].write_bytes(whole)
    made: list[str] = []
    real = PartMaker.make

    def record(self: PartMaker, task: Task) -> PartReport:
        made.extend(Path(file.path).name for file, _ in task.units)
        assert not list(self.folder.glob("*.partial"))
        return real(self, task)

    monkeypatch.setattr(PartMaker, "make", record)
    result = make(paths, unit_bytes=100)
    assert made == ["1.jsonl.gz", "2.jsonl.gz"] and content(result) == content(make(corpus, "reference"))


def test_a_stream_that_changed_is_read_again(make: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    blocks = [b"".join(lines[:100]), b"".join(lines[100:])]
    real, made = PartMaker.make, []

    def record(self: PartMaker, task: Task) -> PartReport:
        made.append(task.number)
        return real(self, task)

    monkeypatch.setattr(PartMaker, "make", record)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "join_parts", lambda *_: (_ for _ in ()).throw(DataError("stopped")))
        with pytest.raises(DataError, match="stopped"):
            make(Stream("<stdin>", blocks))
    result = make(Stream("<stdin>", [blocks[0], b"".join(lines[100:150])]))
    assert made == [0, 1, 1] and result.documents == 150


def test_another_stream_is_not_taken_for_the_finished_one(make: Make, corpus: Path) -> None:
    data = corpus.read_bytes()
    make(Stream("<stdin>", [data]))
    assert make(Stream("<stdin>", [data[:500], data[500:]])).was_finished
    with pytest.raises(DataError, match="made from other inputs"):
        make(Stream("<stdin>", [data[:500]]))
    assert not make(Stream("<stdin>", [data[: data.index(b"\n") + 1]]), is_overwriting=True).was_finished


def test_bad_records_are_listed_where_they_stop_the_run(
    make: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_PATIENCE_RECORDS", 1)
    lines = corpus.read_text().splitlines()
    lines[2] = "{broken"
    corpus.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"bad \(1 not JSON\), more than .*; see .*out.bad.jsonl"):
        make(corpus, unit_bytes=4_000)
    listed = json.loads((corpus.parent / "out.bad.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (3, "not JSON")


def test_bad_records_are_counted_listed_and_limited(make: Make, corpus: Path, texts: list[str]) -> None:
    lines = corpus.read_text().splitlines()
    lines[5] = "{broken"
    lines.insert(200, '{"other": 1}')
    corpus.write_text("\n".join(lines) + "\n")
    result = make(corpus, unit_bytes=4_000)
    assert result.bad == {"not JSON": 1, "key 'text' missing": 1} and result.documents == len(texts) - 1
    listed = [json.loads(line) for line in (corpus.parent / "out.bad.jsonl").read_text().splitlines()]
    assert [(Path(one["file"]).name, one["line"], one["reason"]) for one in listed] == [
        ("corpus.jsonl", 6, "not JSON"),
        ("corpus.jsonl", 201, "key 'text' missing"),
    ]
    origins = load_origins(result.prefixes[0])
    assert origins is not None
    assert [origins.locate(n)[1] + 1 for n in (0, 4, 5, 198, 199)] == [1, 5, 7, 200, 202]
    with pytest.raises(
        DataError, match=r"2 of 301 records are bad .* first in .*corpus.jsonl line 6, more than --max-bad"
    ):
        make(corpus, "strict", max_bad_fraction=0.001)


def test_input_without_text_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no record at all"):
        make(tmp_path / "empty.jsonl")
    (tmp_path / "keys.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(DataError, match=r"3 of 3 records are bad \(3 key 'text' missing\).*line 1.*--json-keys"):
        make(tmp_path / "keys.jsonl")


def test_several_keys_make_several_shards(make: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x y", "title": "the"}\n')
    result = make(tmp_path / "a.jsonl", keys=("text", "title"), append_eod=False)
    assert [Path(prefix).name for prefix in result.prefixes] == ["out_text_document", "out_title_document"]
    assert [IndexedShard(prefix).document(0).tolist() for prefix in result.prefixes] == [
        tokenizer.encode("x y"),
        tokenizer.encode("the"),
    ]


def test_the_first_of_equal_documents_is_kept(make: Make, corpus: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:50], *lines[20:70], *lines[:10], *lines[60:]]) + "\n")
    for workers in (0, 2):
        result = make(corpus, f"w{workers}", is_deduplicated=True, unit_bytes=5_000, workers=workers)
        shard = IndexedShard(result.prefixes[0])
        assert [shard.document(n).tolist() for n in range(len(shard))] == [
            [*tokenizer.encode(text), 3] for text in texts
        ]
        assert result.duplicates == 50 + 10 + 10 - 20


def test_shuffling_moves_documents_and_their_origins(
    make: Make, corpus: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    first, again, other = (make(corpus, name, shuffle_seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert content(first) == content(again) != content(other)
    shard, origins = IndexedShard(first.prefixes[0]), load_origins(first.prefixes[0])
    assert origins is not None
    records = [origins.locate(number)[1] for number in range(len(shard))]
    assert sorted(records) == list(range(len(texts))) != records
    assert all(shard.document(n).tolist() == [*tokenizer.encode(texts[record]), 3] for n, record in enumerate(records))


def test_shards_of_an_array_merge_to_the_whole(make: Make, corpus: Path, tmp_path: Path) -> None:
    whole = make(corpus, "whole", unit_bytes=2_500)
    parts = [make(corpus, "part", unit_bytes=2_500, shard=(index, 3)) for index in range(3)]
    assert sum(part.documents for part in parts) == whole.documents and min(part.documents for part in parts) > 0
    merge_shards([part.prefixes[0] for part in parts], str(tmp_path / "merged"))
    for suffix in ("bin", "idx", "sums"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == Path(f"{whole.prefixes[0]}.{suffix}").read_bytes()
    merged, original = load_origins(tmp_path / "merged"), load_origins(whole.prefixes[0])
    assert merged and original and np.array_equal(merged.runs, original.runs)
    sidecar = read_sidecar(tmp_path / "merged")
    assert sidecar and sidecar.documents == whole.documents


def test_duplicates_across_the_shards_of_an_array_are_left_out(make: Make, corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:50], *lines[20:70], *lines[:10], *lines[60:], *lines[:300:7]]) + "\n")
    whole = make(corpus, "whole", is_deduplicated=True)
    parts = [make(corpus, "part", unit_bytes=2_500, shard=(index, 3)).prefixes[0] for index in range(3)]
    merged = merge_shards(parts, str(tmp_path / "merged"), is_deduplicated=True)
    assert (merged.documents, merged.tokens, merged.duplicates) == (300, whole.tokens[0], whole.duplicates)
    for suffix in ("bin", "idx", "sums"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == Path(f"{whole.prefixes[0]}.{suffix}").read_bytes()
    found, wanted = load_origins(tmp_path / "merged"), load_origins(whole.prefixes[0])
    assert found and wanted and np.array_equal(found.runs, wanted.runs)
    assert not list(tmp_path.glob("*.partial"))


def test_an_array_larger_than_its_input_merges_too(make: Make, corpus: Path, tmp_path: Path) -> None:
    whole = make(corpus, "whole")
    corpus_parts = [
        make(corpus, "part", unit_bytes=1 << 20, shard=(index, 3), is_deduplicated=True).prefixes[0]
        for index in range(3)
    ]
    assert sorted(len(IndexedShard(prefix)) for prefix in corpus_parts) == [0, 0, whole.documents]
    merge_shards(corpus_parts, str(tmp_path / "merged"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == Path(f"{whole.prefixes[0]}.{suffix}").read_bytes()
    with pytest.raises(DataError, match="shards 1 of 3 are missing"):
        merge_shards([corpus_parts[0], corpus_parts[2]], str(tmp_path / "other"))
    with pytest.raises(DataError, match="shards are mixed"):
        merge_shards([*corpus_parts[::-1]], str(tmp_path / "other"))


def test_only_shards_of_one_tokenizer_are_merged(make: Make, corpus: Path, tmp_path: Path) -> None:
    a, b = (make(corpus, name).prefixes[0] for name in ("a", "b"))
    sidecar = read_sidecar(b)
    assert sidecar is not None
    Path(f"{b}.json").write_text(to_json(replace(sidecar, tokenizer_fingerprint="0123" * 16)))
    with pytest.raises(DataError, match="b_text_document was made with another tokenizer"):
        merge_shards([a, b], str(tmp_path / "merged"))
    assert not (tmp_path / "merged.idx").exists()


def test_two_writers_of_one_output_are_kept_apart(make: Make, corpus: Path) -> None:
    with engine._locked(corpus.parent / "out.parts"), pytest.raises(DataError, match="another process is writing"):
        make(corpus)
