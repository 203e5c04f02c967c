"""Tokenize text into memory-mapped shards (Megatron's .bin/.idx), on all cores, resumable at any moment.

    megatron-omega preprocess-data --input 'corpus/*.jsonl.gz' books/ --output-prefix data/omega \\
        --tokenizer-model tokenizer.model --append-eod --workers 16

writes data/omega_text_document.{bin,idx} with their sidecars. Killed, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from megatron_omega.corpus.options import Options, Result, Stream, Tally
from megatron_omega.corpus.preprocess import preprocess
from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.reading.hugging_face import hub_blocks, line_blocks, local_files
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.errors import ConfigError, Preempted
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging

STREAM_BLOCK_BYTES = 16 << 20


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("input")
    source.add_argument("--input", nargs="+", help="files, quoted globs or folders; - reads lines of JSON from stdin")
    source.add_argument("--dataset", help="Hugging Face data set: a local folder, or NAME[:CONFIGURATION] on the hub")
    source.add_argument("--dataset-split", default="train", help="split of --dataset (default train)")
    source.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys or columns, each its own shard (default text)"
    )
    source.add_argument("--input-format", choices=("jsonl", "parquet", "arrow", "text"), help="instead of by file name")
    source.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="share of bad records that stops (default 0.01)"
    )
    source.add_argument("--max-record-megabytes", type=float, default=64, help="longer records are bad (default 64)")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="shards are PREFIX_KEY_document.bin and .idx")
    output.add_argument("--tokenizer-model", required=True, help="SentencePiece model")
    output.add_argument("--tokenizer-type", choices=("SentencePieceTokenizer",), help=argparse.SUPPRESS)
    output.add_argument("--append-eod", action="store_true", help="end every document with the end token")
    output.add_argument(
        "--dedup", choices=("exact",), help="keep the first of documents with the same text (of this --shard)"
    )
    output.add_argument("--shuffle", type=int, metavar="SEED", help="put the documents into a random order")
    output.add_argument(
        "--shard", default="0/1", metavar="I/N", help="do part I (from 0) of N; merge them with merge-shards"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an output that was made otherwise")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    work.add_argument("--chunk-megabytes", type=float, help="input of one part (default: 16, more above 64 GB)")
    work.add_argument("--sentencepiece", action="store_true", help="encode with SentencePiece itself, not the shortcut")
    work.add_argument("--json", action="store_true", help="print the result as one JSON object")
    work.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def to_options(arguments: argparse.Namespace) -> Options:
    findings: list[str] = []
    index, _, count = arguments.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        findings.append(f"--shard {arguments.shard} is not I/N with 0 <= I < N; use for example 0/16 to 15/16")
    if bool(arguments.input) == bool(arguments.dataset):
        findings.append("give either --input or --dataset")
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        findings.append(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    if arguments.workers < 1:
        findings.append(f"--workers {arguments.workers} must be at least 1")
    for name in ("chunk_megabytes", "max_record_megabytes"):
        value = getattr(arguments, name)
        if value is not None and not 1e-6 <= value <= 1e6:
            findings.append(f"--{name.replace('_', '-')} {value} is not between 0.000001 and 1000000")
    if not 0 <= arguments.max_bad_fraction <= 1:
        findings.append(f"--max-bad-fraction {arguments.max_bad_fraction} is not between 0 and 1")
    if findings:
        raise ConfigError(*findings)
    return Options(
        output_prefix=arguments.output_prefix,
        tokenizer_model=arguments.tokenizer_model,
        keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        is_deduplicated=arguments.dedup == "exact",
        shuffle_seed=arguments.shuffle,
        shard=(int(index), int(count)),
        max_record_bytes=int(arguments.max_record_megabytes * 1e6),
        max_bad_fraction=arguments.max_bad_fraction,
        workers=arguments.workers,
        unit_bytes=int(arguments.chunk_megabytes * 1e6) if arguments.chunk_megabytes else None,
        is_native_allowed=not arguments.sentencepiece,
        is_overwriting=arguments.overwrite,
    )


def open_inputs(arguments: argparse.Namespace, options: Options) -> list[InputFile] | Stream:
    block_bytes = options.unit_bytes or STREAM_BLOCK_BYTES
    if arguments.dataset:
        files = local_files(arguments.dataset, arguments.dataset_split)
        name = f"{arguments.dataset}/{arguments.dataset_split}"
        blocks = hub_blocks(arguments.dataset, arguments.dataset_split, options.keys, block_bytes)
        return Stream(name, blocks, is_known_by_name=True) if files is None else files
    if arguments.input == ["-"]:
        return Stream("<stdin>", line_blocks(sys.stdin.buffer, block_bytes))
    return expand_inputs(arguments.input, arguments.input_format)


def run(inputs: list[InputFile] | Stream, options: Options, *, is_quiet: bool) -> tuple[Result, Tally]:
    """Preprocess under a progress bar; return the result and the counts of this run."""
    total = None if isinstance(inputs, Stream) else sum(file.size for file in inputs) // options.shard[1]
    started = time.monotonic()
    counts = Tally()
    with tqdm(
        total=total, unit="B", unit_scale=True, disable=is_quiet or not sys.stderr.isatty(), smoothing=0.1
    ) as bar:

        def show(tally: Tally) -> None:
            nonlocal counts
            counts = tally
            seconds = max(1e-3, time.monotonic() - started)
            rates = f"{tally.documents / seconds:,.0f} docs/s, {tally.tokens / seconds / 1e6:.2f} Mtokens/s"
            bar.set_postfix_str(f"{rates}, {tally.bad} bad", refresh=False)
            bar.update(tally.input_bytes - bar.n)

        try:
            return preprocess(inputs, options, show), counts
        except KeyboardInterrupt:
            raise Preempted("stopped; finished parts are kept, the same command goes on from there") from None


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    options = to_options(arguments)
    started = time.monotonic()
    result, counts = run(open_inputs(arguments, options), options, is_quiet=arguments.quiet)
    seconds = time.monotonic() - started
    if arguments.json:
        rate = round(counts.input_bytes / seconds / 1e6, 2)
        print(json.dumps({**dataclasses.asdict(result), "seconds": round(seconds, 3), "megabytes_per_second": rate}))
        return
    for prefix, tokens in zip(result.prefixes, result.tokens, strict=True):
        print(f"{prefix}: {result.documents:,} documents, {tokens:,} tokens")
    if result.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.bad.items()))
        print(f"skipped {sum(result.bad.values())} bad records ({reasons}), listed in {options.bad_path}")
    if result.duplicates:
        print(f"left out {result.duplicates:,} duplicates")
    if result.was_finished:
        print("was finished already")
        return
    print(
        f"took {seconds:.1f} s with the {result.encoder} encoder: {counts.input_bytes / seconds / 1e6:,.1f} MB/s, "
        f"{result.documents / seconds:,.0f} documents/s, {sum(result.tokens) / seconds / 1e6:,.2f} Mtokens/s"
    )
