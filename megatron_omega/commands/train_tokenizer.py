"""Learn a SentencePiece tokenizer with the mask, mode and sentinel ids that the objectives need.

megatron-omega train-tokenizer --input 'corpus/*.jsonl.gz' --output tokenizer.model --vocab-size 32768
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from megatron_omega.corpus.inputs import Document, InputFile, expand_inputs, plan_units, read_unit
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer
from megatron_omega.errors import DataError
from megatron_omega.host.command_line import CommandLine

MAX_RECORD_BYTES = 64 << 20


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="jsonl, parquet, Arrow or text files, globs, folders")
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=32768, help="pieces, specials included (default 32768)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose text is read (default text)")
    parser.add_argument(
        "--megabytes", type=float, default=100.0, help="text to learn from, taken evenly from the input (default 100)"
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with pieces of their own"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def texts(files: list[InputFile], keys: list[str], budget: int) -> Iterator[str]:
    """Yield up to `budget` bytes of text: the beginning of evenly spaced parts of the input."""
    tasks = plan_units(files, 1 << 20)
    total = sum(file.size for file in files)
    step = max(1, int(total / max(1, budget)))
    left = budget
    with tqdm(
        total=min(budget, total), unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()
    ) as bar:
        for unit in (unit for task in tasks[::step] for unit in task):
            for record in read_unit(files[unit.file], unit, keys, MAX_RECORD_BYTES):
                if not isinstance(record, Document):
                    continue
                for text in record.texts:
                    yield text
                    size = len(text.encode())
                    left -= size
                    bar.update(size)
                if left <= 0:
                    return


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    found = texts(expand_inputs(arguments.input), arguments.json_keys, int(arguments.megabytes * 1e6))
    first = next(found, None)
    if first is None:
        keys = " ".join(arguments.json_keys)
        raise DataError(f"the input holds no text (key {keys}); give files that have some, or set --json-keys")
    model = train_tokenizer(
        chain([first], found),
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        num_threads=arguments.workers,
        character_coverage=arguments.character_coverage,
    )
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(model)
        partial.replace(arguments.output)
    except OSError as error:
        raise DataError(
            f"{arguments.output} cannot be written ({error.strerror}); free space or choose another place"
        ) from None
    tokenizer = Tokenizer.open(arguments.output)
    result = {
        "tokenizer": str(arguments.output),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{arguments.output}: {tokenizer.vocab_size:,} pieces ({arguments.model_type}), "
            f"fingerprint {tokenizer.fingerprint[:12]}"
        )
