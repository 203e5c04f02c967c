"""Say what a run learned: validation losses before and after, beside a uniform guess and the unigram entropy.

megatron-omega report --run runs/omega-tiny
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.objectives import IGNORED_LABEL
from megatron_omega.data.samples import open_sources
from megatron_omega.errors import DataError
from megatron_omega.host import run_folder
from megatron_omega.host.command_line import CommandLine


def validations(run: Path) -> list[dict[str, Any]]:
    """Return every validation of the run, oldest first."""
    try:
        lines = (run / run_folder.EVENTS).read_text().splitlines()
    except OSError as error:
        raise DataError(
            f"{run / run_folder.EVENTS} cannot be read: {error.strerror}; give the folder of a run"
        ) from None
    found = [event for event in map(json.loads, lines) if event["event"] == "evaluate"]
    if not found:
        raise DataError(f"{run} has no validation yet; set evaluation.interval_steps")
    return found


def validation_labels(config: RunConfig) -> Iterator[np.ndarray]:
    """Yield the tokens that one validation asks the decoder for."""
    source = open_sources(config).validation
    for index in range(config.evaluation.num_batches * config.batch.global_batch_size):
        labels = source[index].row.lm_labels
        yield labels[labels != IGNORED_LABEL]


def unigram_entropy(config: RunConfig) -> float:
    """Return the entropy, in nats, of the pieces of the validation text: the loss of knowing only their frequencies."""
    counts = np.bincount(np.concatenate(list(validation_labels(config))))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def main(argv: Sequence[str]) -> int:
    """Print the figures; return 1 where the model learned less than the frequencies of words."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_run()
    options = parser.parse_args(argv)
    config = load_config(options.run / run_folder.CONFIG)
    found = validations(options.run)
    first, last = found[0], found[-1]
    uniform, unigram = math.log(config.model.vocab_size), unigram_entropy(config)
    print(f"validation, nats per token     before    after {last['step']} steps")
    print(f"  language modelling        {first['lm_loss']:9.3f}{last['lm_loss']:9.3f}")
    print(f"  masked tokens             {first['mlm_loss']:9.3f}{last['mlm_loss']:9.3f}")
    for name, bound in (
        (f"a uniform guess, ln {config.model.vocab_size:,}:", uniform),
        ("unigram entropy of the text:", unigram),
    ):
        print(f"{name:<28}{bound:9.3f}   (the model is {bound - last['lm_loss']:.2f} below)")
    return 0 if last["lm_loss"] < min(uniform - 1.5, unigram) else 1
