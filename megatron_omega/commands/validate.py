"""Measure the validation loss of a checkpoint, on as many ranks as it is started on, in any layout.

    srun megatron-omega evaluate --config examples/omega-1b/run.yaml [--load PATH] [--evaluation.num_batches 64]

Takes the command line of pretrain_omega.py; without --load it takes the run's newest checkpoint. Trains nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.host.environment import complete_environment


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    arguments = parse_arguments(argv, program="megatron-omega evaluate")
    place = complete_environment()
    from megatron_omega.run.validation import as_evaluation, evaluate  # torch comes in here

    report = evaluate(resolve_run(as_evaluation(arguments), place.world_size), place)
    if place.rank:
        return
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    print(
        f"loss {report.loss:.4f} (LM {report.lm_loss:.4f}, perplexity {math.exp(report.lm_loss):.2f}; "
        f"MLM {report.mlm_loss:.4f}) over {report.num_tokens:,} tokens"
    )
