#!/usr/bin/env python3
"""Shards -> samples, in CPU-seconds: windows against megatron-core's GPTDataset, objectives, a billion documents.

    benchmarks/sampling.py --prefix /tmp/corpus/shard_text_document --tokenizer-model tokenizer.model

megatron-core is optional (pip install --no-deps megatron-core==0.16.1); without it its column stays empty.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omega.config.schema import Corpus, DataConfig, ModelConfig, RunConfig
from megatron_omega.data.indexed import HEADER_BYTES, IndexedShard, header
from megatron_omega.data.objectives import span_example
from megatron_omega.data.permutation import Permutation
from megatron_omega.data.search import last_not_above
from megatron_omega.data.sources import open_sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.data.windows import Windows, WindowShape

GIGA = 10**9


def microseconds(work: Callable[[int], Any], count: int) -> float:
    started = time.process_time()
    for number in range(count):
        work(number)
    return (time.process_time() - started) / count * 1e6


def rival(prefix: str, tokens: int) -> Callable[[int], Any] | None:
    """Return GPTDataset's own sample function, document ids and position resets included."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
            from megatron.core.datasets.indexed_dataset import IndexedDataset
            from megatron.core.datasets.utils import Split
    except ImportError:
        return None
    tokenizer: Any = SimpleNamespace(vocab_size=32768, eod=3, pad=0, unique_identifiers={"name": "benchmark"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=tokens,
        blend=None,
        blend_per_split=None,
        split="1",
        path_to_cache=tempfile.mkdtemp(),
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = IndexedDataset(prefix)
    samples = GPTDataset(dataset, prefix, np.arange(len(dataset), dtype=np.int32), None, Split.train, config)
    return lambda number: samples[number % len(samples)]


def windows_against_megatron(prefix: str, rounds: int) -> None:
    shard = IndexedShard(prefix)
    mine = Windows(shard, range(len(shard)), WindowShape(2048, 0), vocab_size=1 << 16, eos_id=3)
    theirs = rival(prefix, 2048)
    found: dict[str, list[float]] = {"ours": [], "GPTDataset": []}
    for _ in range(rounds):
        found["ours"].append(microseconds(lambda number: mine.take(number, 1), 3000))
        if theirs:
            found["GPTDataset"].append(microseconds(theirs, 1000))
    ours = statistics.median(found["ours"])
    print(f"a window of 2,048 tokens with its document bounds: {ours:.0f} us")
    if theirs:
        other = statistics.median(found["GPTDataset"])
        print(f"  GPTDataset with document bounds (reset_position_ids): {other:.0f} us, {other / ours:.1f}x")


def objectives(prefix: str, model: str) -> None:
    special = Tokenizer.open(model).special
    random = np.random.Generator(np.random.PCG64(0))
    tokens = np.arange(1000, 1512)
    cost = microseconds(lambda _: span_example("span", tokens, 77, 26, special, random), 20_000)
    print(f"span corruption at 512 tokens: {cost:.0f} us, {1e6 / cost:,.0f} samples per CPU-second")
    data = DataConfig(
        tokenizer=model, corpora=(Corpus(prefix=prefix),), encoder_seq_length=2048, decoder_seq_length=2048
    )
    source = open_sources(RunConfig(model=ModelConfig(vocab_size=1 << 16), data=data)).train
    cost = microseconds(source.__getitem__, 1000)
    samples = [source[number] for number in range(min(2000, len(source)))]
    encoder, decoder = (
        np.mean([np.count_nonzero(getattr(sample.row, name)) for sample in samples]) / 2048
        for name in ("encoder_segments", "decoder_segments")
    )
    lost = sum(sample.lost_tokens for sample in samples)
    print(f"a packed row of 2,048 + 2,048: {cost:.0f} us; filled {encoder:.1%} and {decoder:.1%}, {lost} tokens lost")


def bijection() -> None:
    size = 10**7
    started = time.process_time()
    values = Permutation(size, 12345).many(np.arange(size))
    seconds = time.process_time() - started
    is_bijection = bool((np.bincount(values, minlength=size) == 1).all())
    single = microseconds(Permutation(GIGA, 1).__getitem__, 100_000)
    each = seconds / size * 1e9
    print(f"permutation of 10^7: bijection {is_bijection}, {each:.0f} ns a draw, one by one {single:.1f} us")


def start_of(document: int, length: int) -> int:
    """Return where a document of a made-up corpus begins: lengths vary, and their sums wander as those of texts do."""
    wander = 30_000 * length * math.sin(math.pi * document / GIGA) * math.sin(document / 1.7e7)  # sqrt(10^9) lengths
    return document * length + int(wander) + document * 7919 % (length // 2) if document else 0


def billion_documents(folder: Path, length: int = 1000) -> None:
    """A shard of 10^9 documents in sparse files: only the index entries that are read exist."""
    prefix = folder / "giga"
    pointers_at = HEADER_BYTES + 4 * GIGA
    with (folder / "giga.bin").open("wb") as file:
        file.truncate(2 * length * GIGA)
    with (folder / "giga.idx").open("wb") as file:
        file.write(header(np.uint16, GIGA, GIGA + 1))
        file.truncate(pointers_at + 8 * GIGA + 8 * (GIGA + 1))

    def fill(documents: set[int]) -> None:
        with (folder / "giga.idx").open("r+b") as file:
            for document in sorted(number for number in documents if 0 <= number < GIGA):
                place, following = start_of(document, length), start_of(document + 1, length)
                file.seek(HEADER_BYTES + 4 * document)
                file.write((following - place).to_bytes(4, "little"))
                file.seek(pointers_at + 8 * document)
                file.write((2 * place).to_bytes(8, "little"))
            file.seek(pointers_at + 8 * GIGA + 8 * GIGA)
            file.write(GIGA.to_bytes(8, "little"))

    permutation = Permutation(GIGA * length // 2048, 99)
    probed = {0, GIGA - 1}

    def noted(document: int) -> int:
        probed.add(document)
        return start_of(document, length)

    for number in range(200):  # the documents that a search for each window looks at
        found = last_not_above(noted, permutation[number] * 2048, 0, GIGA, GIGA * length)
        probed |= set(range(found - 1, found + 12))
    fill(probed)
    times = [microseconds(lambda _: IndexedShard(prefix), 1) for _ in range(20)]
    shard = IndexedShard(prefix)
    windows = Windows(shard, range(GIGA), WindowShape(2048, 0), vocab_size=1 << 16, eos_id=3)
    cold = microseconds(lambda number: windows.spans(permutation[number] * 2048), 200)
    warm = microseconds(lambda number: windows.spans(permutation[number] * 2048), 200)
    opened = statistics.median(times) / 1000
    print(f"10^9 documents: opened in {opened:.2f} ms, a sample in {cold:.0f} us cold, {warm:.0f} us warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True, help="a shard of real text")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    windows_against_megatron(arguments.prefix, arguments.rounds)
    objectives(arguments.prefix, arguments.tokenizer_model)
    bijection()
    with tempfile.TemporaryDirectory() as folder:
        billion_documents(Path(folder))


if __name__ == "__main__":
    main()
