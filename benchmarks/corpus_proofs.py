#!/usr/bin/env python3
"""Prove what the corpus path promises, on real text: the same bytes always, nothing lost to kills, damage refused.

    benchmarks/corpus_proofs.py bytes  --corpus /tmp/corpus/corpus.jsonl    workers x parts x kinds of file; Megatron
    benchmarks/corpus_proofs.py kills  --corpus /tmp/corpus/corpus.jsonl    SIGKILL at random moments
    benchmarks/corpus_proofs.py damage --corpus /tmp/corpus/corpus.jsonl    bits flipped, files cut, another tokenizer
    benchmarks/corpus_proofs.py merge                                       3 billion documents, 60 billion tokens
    benchmarks/corpus_proofs.py start  --corpus /tmp/corpus/corpus.jsonl    CPU-seconds before the first document

Each prints what it saw and ends with code 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.preprocessing import ROOT, cut, measure, ours
from megatron_omega.config.schema import Corpus, DataConfig, ModelConfig, RunConfig
from megatron_omega.corpus.merge import write_merged_index
from megatron_omega.data.indexed import HEADER_BYTES, IndexedShard, token_dtype
from megatron_omega.data.sources import open_sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

MEGABYTE_CHUNKS = ("1", "5", "16")


def say(is_so: bool, claim: str) -> bool:
    print(f"{'yes' if is_so else 'NO '}  {claim}", flush=True)
    return is_so


def digest(prefix: Path) -> str:
    found = hashlib.sha256()
    for suffix in ("bin", "idx", "sums"):
        found.update(Path(f"{prefix}.{suffix}").read_bytes())
    return found.hexdigest()[:16]


def make(source: Path, model: Path, folder: Path, workers: int, *more: str) -> str:
    """Preprocess and return the digest of the shard."""
    measure(ours(source, model, folder, workers, *more))
    return digest(folder / "o_text_document")


def kinds(source: Path, folder: Path) -> Iterator[Path]:
    """Write the same documents as every kind of file."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    data = source.read_bytes()
    yield source
    for suffix, compressed in (
        ("gz", gzip.compress(data, 1)),
        ("zst", zstandard.compress(data, 3)),
        ("bz2", bz2.compress(data, 1)),
        ("xz", lzma.compress(data, preset=0)),
    ):
        path = folder / f"part.jsonl.{suffix}"
        path.write_bytes(compressed)
        yield path
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in data.splitlines()]})
    pyarrow.parquet.write_table(table, folder / "part.parquet", row_group_size=500)
    yield folder / "part.parquet"
    with pyarrow.ipc.new_stream(str(folder / "part.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=500)
    yield folder / "part.arrow"


def prove_bytes(source: Path, model: Path, folder: Path) -> bool:
    wanted = make(source, model, folder, 1)
    tokenizer, shard = Tokenizer.open(model), IndexedShard(folder / "o_text_document")
    texts = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
    is_whole = len(shard) == len(texts) and all(
        tokenizer.decode(shard.document(number)[:-1].tolist()) == text.replace("\u2581", " ")
        for number, text in enumerate(texts)
    )
    results = [say(is_whole, f"{len(shard):,} documents decode to their text, {shard.num_tokens:,} tokens")]
    results.append(compare_with_megatron(texts, tokenizer, folder))
    for path in kinds(source, folder):
        for workers in (1, 2, 3):
            found = {chunk: make(path, model, folder, workers, "--chunk-megabytes", chunk) for chunk in MEGABYTE_CHUNKS}
            claim = f"{path.name}, {workers} workers, parts of {', '.join(found)} MB: bytes {', '.join(found.values())}"
            results.append(say(set(found.values()) == {wanted}, claim))
    return all(results)


def compare_with_megatron(texts: list[str], tokenizer: Tokenizer, folder: Path) -> bool:
    """Write the documents by megatron-core's builder, as its classic tool does, and compare files and documents."""
    try:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    except ImportError:
        print("--   megatron-core is not installed: not compared")
        return True
    builder = IndexedDatasetBuilder(str(folder / "m.bin"), dtype=token_dtype(tokenizer.vocab_size).type)
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(str(folder / "m.idx"))
    mine = folder / "o_text_document"
    same = all(Path(f"{mine}.{end}").read_bytes() == (folder / f"m.{end}").read_bytes() for end in ("bin", "idx"))
    ours_by_us, ours_by_them = IndexedShard(mine), IndexedDataset(str(mine))
    theirs_by_us = IndexedShard(folder / "m")
    equal = sum(
        np.array_equal(ours_by_us.document(number), ours_by_them[number])
        and np.array_equal(theirs_by_us.document(number), ours_by_them[number])
        for number in range(len(texts))
    )
    first = say(same, "megatron-core's builder writes the same .bin and .idx")
    return say(equal == len(texts), f"{equal:,} documents are equal read by it and by us, both ways") and first


def prove_kills(source: Path, model: Path, folder: Path, kills: int, seed: int) -> bool:
    started = time.monotonic()
    wanted = make(source, model, folder, 2, "--chunk-megabytes", "1")
    wall = time.monotonic() - started
    moments = random.Random(seed)
    killed = finished = torn = 0
    prefix = folder / "killed_text_document"
    command = ours(source, model, folder, 2, "--chunk-megabytes", "1")
    command[command.index("--output-prefix") + 1] = str(folder / "killed")
    command.remove("--overwrite")
    while killed < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, wall))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        killed += code == -signal.SIGKILL
        if Path(f"{prefix}.idx").exists():
            torn += digest(prefix) != wanted
            if code == 0:
                finished += 1
                for path in folder.glob("killed*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if code not in (0, -signal.SIGKILL):
            return say(False, f"the tool ended with code {code} after {killed} kills")
    measure(command)
    first = say(torn == 0, f"{killed} kills within {wall:.1f} s each, {finished} runs ended: no half-written shard")
    return say(digest(prefix) == wanted, "killed and called again, it ends with the same bytes") and first


def check_command(prefix: Path, model: Path) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools/inspect_data.py"),
        str(prefix),
        "--check",
        "--tokenizer-model",
        str(model),
    ]


def is_refused(command: list[str]) -> str:
    """Return the one line a command refuses with (exit code 3); empty where it does otherwise."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = found.stderr.splitlines()
    return lines[0] if found.returncode == 3 and len(lines) == 1 and not found.stdout else ""


def prove_damage(source: Path, model: Path, folder: Path, seed: int, times: int = 400) -> bool:
    make(source, model, folder, 2)
    whole, bad = folder / "o_text_document", folder / "bad"
    files = {end: Path(f"{whole}.{end}").read_bytes() for end in ("bin", "idx", "sums", "json", "origins.npz")}
    moments = random.Random(seed)

    def write(end: str, data: bytes | bytearray) -> None:
        for other, content in files.items():
            Path(f"{bad}.{other}").write_bytes(data if other == end else content)

    def is_found() -> bool:
        try:
            IndexedShard(bad).check_all()
        except DataError as error:
            return len(error.findings) == 1
        return False

    results = []
    for end in ("bin", "idx", "sums"):
        found, cuts = 0, 0
        for _ in range(times):
            data = bytearray(files[end])
            data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
            write(end, data)
            found += is_found()
            write(end, files[end][: moments.randrange(len(files[end]))])
            cuts += is_found()
        results.append(say(found == times, f".{end}: {found} of {times} flipped bits found"))
        results.append(say(cuts == times, f".{end}: {cuts} of {times} cuts found"))
        line = is_refused(check_command(bad, model))
        results.append(say(bool(line), f"the tool says of the last one, with exit code 3: {line}"))
    index = bytearray(files["idx"])
    middle = HEADER_BYTES + 4 * len(IndexedShard(whole)) + 8 * (len(IndexedShard(whole)) // 2)
    index[middle : middle + 8] = (1 << 40).to_bytes(8, "little")
    write("idx", index)
    Path(f"{bad}.sums").unlink()
    line = is_refused(check_command(bad, model))
    results.append(say(bool(line), f"offsets beyond the file, without checksums: {line}"))
    write("json", files["json"])
    other = folder / "other.model"
    train = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(source), "--output", str(other)]
    measure([*train, "--megabytes", "1", "--vocab-size", "1000"])
    line = is_refused(check_command(bad, other))
    results.append(say(bool(line), f"another tokenizer: {line}"))
    refused = 0
    for _ in range(20):
        data = bytearray(files["bin"])
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        write("bin", data)
        refused += is_refused_in_training(bad, model)
    results.append(say(refused == 20, f"an epoch of samples meets {refused} of 20 bits flipped in .bin"))
    write("bin", files["bin"])
    is_kept_out = is_refused_in_training(bad, other) and not is_refused_in_training(bad, model)
    results.append(say(is_kept_out, "training refuses another tokenizer, and takes the shard when it is whole"))
    return all(results)


def is_refused_in_training(prefix: Path, model: Path) -> bool:
    """Return whether training on a shard ends with one finding before its first epoch is over."""
    data = DataConfig(tokenizer=str(model), corpora=(Corpus(prefix=str(prefix)),), split=(1.0, 0.0, 0.0))
    try:
        source = open_sources(RunConfig(model=ModelConfig(vocab_size=1 << 16), data=data)).train
        for number in range(len(source)):
            source.held(number)
    except DataError as error:
        return len(error.findings) == 1
    return False


class Endless:
    """A shard of a billion documents of equal length that exists as arithmetic only."""

    def __init__(self, documents: int, length: int) -> None:
        self.num_sequences, self.length, self.dtype = documents, length, np.dtype("<u2")
        self.num_tokens = documents * length

    def __len__(self) -> int:
        return self.num_sequences

    def lengths_of(self, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, self.length, dtype="<i4")

    def pointers_of(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype="<i8") * (2 * self.length)

    def bounds_of(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype="<i8")


class Judge(io.RawIOBase):
    """Takes the bytes of an index and compares them with the index of all documents."""

    def __init__(self, documents: int, length: int) -> None:
        self.documents, self.length, self.place, self.is_right = documents, length, 0, True

    def write(self, data: Any) -> int:
        start, self.place = self.place, self.place + len(data)
        if start < HEADER_BYTES:
            self.is_right &= data[18:26] == self.documents.to_bytes(8, "little")
            return len(data)
        lengths_end = HEADER_BYTES + 4 * self.documents
        pointers_end = lengths_end + 8 * self.documents
        if start < lengths_end:
            self.is_right &= bool((np.frombuffer(data, "<i4") == self.length).all())
            return len(data)
        base, scale = (lengths_end, 2 * self.length) if start < pointers_end else (pointers_end, 1)
        first = (start - base) // 8
        self.is_right &= bool((np.frombuffer(data, "<i8") == np.arange(first, first + len(data) // 8) * scale).all())
        return len(data)


def prove_merge() -> bool:
    shards = [Endless(10**9, 20) for _ in range(3)]
    judge = Judge(3 * 10**9, 20)
    started = time.process_time()
    write_merged_index(cast(list[IndexedShard], shards), cast(IO[bytes], judge))
    size = HEADER_BYTES + 20 * 3 * 10**9 + 8
    claim = f"the index of 3 x 10^9 documents of 20 tokens, {judge.place:,} bytes, is right in every entry"
    return say(judge.is_right and judge.place == size, f"{claim} ({time.process_time() - started:.0f} CPU-s)")


def prove_start(source: Path, model: Path, folder: Path) -> bool:
    one = cut(source, 0.0001, folder / "one.jsonl")
    found = [measure(ours(one, model, folder, 1)) for _ in range(3)]
    help_ = [measure([sys.executable, str(ROOT / "tools/preprocess_data.py"), "--help"]) for _ in range(3)]
    whole, text = (statistics.median(run["cpu"] for run in runs) for runs in (found, help_))
    return say(whole < 1, f"one document, from start to end: {whole:.2f} CPU-s; --help: {text:.2f} CPU-s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=("bytes", "kills", "damage", "merge", "start"))
    parser.add_argument("--corpus", type=Path, help="jsonl, its first --megabytes are taken")
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--tokenizer-model", type=Path, help="default: a BPE model of 32,768 pieces, trained first")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.proof == "merge":
        raise SystemExit(0 if prove_merge() else 1)
    if arguments.corpus is None:
        parser.error("--corpus is needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.tokenizer_model or folder / "tokenizer.model"
        if not model.exists():
            train = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(arguments.corpus)]
            measure([*train, "--output", str(model), "--megabytes", "30"])
        source = cut(arguments.corpus, arguments.megabytes, folder / "part.jsonl")
        if arguments.proof == "bytes":
            is_proven = prove_bytes(source, model, folder)
        elif arguments.proof == "kills":
            is_proven = prove_kills(source, model, folder, arguments.kills, arguments.seed)
        elif arguments.proof == "damage":
            is_proven = prove_damage(source, model, folder, arguments.seed)
        else:
            is_proven = prove_start(source, model, folder)
    raise SystemExit(0 if is_proven else 1)


if __name__ == "__main__":
    main()
