"""Learn a SentencePiece tokenizer with the mask, mode and sentinel ids that the objectives need.

megatron-omega train-tokenizer --input 'corpus/*.jsonl.gz' --output tokenizer.model --vocab-size 32768
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.corpus.sampling import RecordCount, TextSampler
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.host.command_line import CommandLine, output_file
from megatron_omega.log import configure_logging, get_logger

MAX_RECORD_BYTES = 64 << 20


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="jsonl, parquet, Arrow or text files, globs, folders")
    parser.add_argument("--output", type=output_file, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=32768, help="pieces, specials included (default 32768)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose text is read (default text)")
    parser.add_argument(
        "--megabytes", type=float, default=100.0, help="text to learn from, each file's share of it (default 100)"
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with pieces of their own"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="share of bad records that stops (default 0.01)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def sample(files: list[InputFile], arguments: argparse.Namespace) -> list[str]:
    """Return the texts to learn from; they are all read before learning starts, which would hide what is wrong."""
    logger = get_logger(__name__)
    count = RecordCount(arguments.max_bad_fraction)
    sampler = TextSampler(files, arguments.json_keys, MAX_RECORD_BYTES, count, logger.warning)
    budget = int(arguments.megabytes * 1e6)
    found: list[str] = []
    with tqdm(total=budget, unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()) as bar:
        for _, text in sampler.texts(budget):
            found.append(text)
            bar.update(len(text))
    if not found:
        keys = " ".join(arguments.json_keys)
        raise DataError(f"the input holds no text (key {keys}); give files that have some, or set --json-keys")
    if count.reasons:
        listed = ", ".join(f"{number} {reason}" for reason, number in sorted(count.reasons.items()))
        logger.warning("skipped %d bad records of %d (%s)", count.reasons.total(), count.records, listed)
    return found


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    if not 0 <= arguments.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {arguments.max_bad_fraction} is not between 0 and 1")
    if not 1e-6 <= arguments.megabytes <= 1e7:
        raise ConfigError(f"--megabytes {arguments.megabytes} is not between 0.000001 and 10000000")
    found = sample(expand_inputs(arguments.input), arguments)
    model = train_tokenizer(
        found,
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
