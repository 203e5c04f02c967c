"""Fine-tune a trained model on supervised tasks: whole, or with low-rank adapters (LoRA).

    megatron-omega finetune --load runs/omega-tiny --tasks pairs.jsonl
    megatron-omega finetune --load runs/omega-tiny --tasks tasks.yaml --lora.rank 8 \\
        --logging.run_directory runs/omega-tiny-lora
    deepspeed pretrain_omega.py --load runs/omega-tiny --tasks tasks.yaml        the same on several ranks

--tasks names records (.jsonl, .parquet; fields `prompt` and `target`) or a YAML list of tasks: path, prompt and target
templates, validation, weight; docs/tasks.md has examples. Model, tokenizer and layout are those of the checkpoint;
epochs, rate and streams have defaults of their own. Every setting of a run can be given as --section.field value, such
as --training.epochs 10; --help lists them, --dry-run shows what would run.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_omega.commands import train
from megatron_omega.config.arguments import Arguments, parse_arguments
from megatron_omega.tasks.finetuning import FineTuning, as_finetuning


def as_run(arguments: Arguments, world_size: int) -> FineTuning:
    """Return the run that fine-tunes."""
    return as_finetuning(train.with_tasks(arguments), world_size)


def main(argv: Sequence[str]) -> None:
    """Fine-tune; or, with --dry-run, print what would be trained."""
    train.start(parse_arguments(argv, about=__doc__), as_run)
