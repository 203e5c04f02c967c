"""Measure how well a model answers: exact match, F1 and loss on held-out pairs, beside two guesses.

    megatron-omega score --checkpoint runs/omega-tiny-finetuned                 on what its own run held out
    megatron-omega score --checkpoint runs/omega-tiny --tasks tasks.yaml --shots 4 --limit 200

The model may be a checkpoint of any layout, an export, or adapters, which are merged into their base. Answers are
generated greedily, all together. Intervals hold 95% of the means of resampled pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_omega.config import yaml_text
from megatron_omega.config.check.data import metrics as wrong_metrics
from megatron_omega.config.schema import DataConfig, Task
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging
from megatron_omega.tasks.finetuning import read_tasks

if TYPE_CHECKING:
    from megatron_omega.tasks.scoring import Score


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    parser.add_argument("--tasks", metavar="RECORDS|YAML", help="as for finetune (default: those of the model's run)")
    parser.add_argument("--shots", type=int, default=0, help="training pairs shown before each prompt (default 0)")
    parser.add_argument("--limit", type=int, help="pairs of each task, drawn by seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and examples that are drawn (default 0)")
    parser.add_argument("--examples", type=int, default=3, help="answers of each task to print (default 3)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--tokenizer", help="SentencePiece model (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, with every answer")
    arguments = parser.parse_args(argv)
    findings = [
        f"--{name} {value} must be {least} or more"
        for name, value, least in (("shots", arguments.shots, 0), ("limit", arguments.limit, 1))
        if value is not None and value < least
    ]
    if findings:
        raise ConfigError(*findings)
    return arguments


def tasks_of(text: str | None, own: Sequence[Task]) -> tuple[Task, ...]:
    """Return the tasks that were named, else those of the model's run."""
    if text is None:
        if not own:
            raise ConfigError("the model's run had no tasks; give --tasks (records, or a YAML list of tasks)")
        return tuple(own)
    values = yaml_text.parse(read_tasks(text).text, f"--tasks {text}")
    from pydantic import ValidationError

    try:
        tasks = DataConfig.model_validate({"tasks": values}).tasks
    except ValidationError as error:
        raise ConfigError(
            *(f"--tasks: {'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        ) from None
    if findings := list(wrong_metrics(tasks)):
        raise ConfigError(*findings)
    return tasks


def main(argv: Sequence[str]) -> None:
    """Score and print."""
    arguments = read_arguments(argv)
    configure_logging()
    from megatron_omega.export.loading import load_text_model  # torch comes in here
    from megatron_omega.tasks.metrics import require_metrics
    from megatron_omega.tasks.scoring import guesses, held_out, score

    model = load_text_model(arguments.checkpoint, arguments.device, tokenizer=arguments.tokenizer)
    tasks = tasks_of(arguments.tasks, model.config.data.tasks)
    data = model.config.data.model_copy(update={"tokenizer": model.tokenizer.path})
    config = model.config.model_copy(update={"data": data})
    chosen = {"limit": arguments.limit, "seed": arguments.seed}
    require_metrics([name for task in tasks for name in task.measured_by])
    for task, train, held in zip(tasks, *held_out(config, tasks), strict=True):
        if not len(held):
            continue
        asked = {"metrics": task.measured_by, **chosen}
        scores = [score(model, train, held, name=str(model.path), shots=arguments.shots, **asked)]
        scores += guesses(model, train, held, **asked)
        for one in scores:
            print(json.dumps(asdict(one)) if arguments.json else "\n".join(in_words(one, arguments.examples)))


def in_words(found: Score, examples: int) -> Iterator[str]:
    """Yield the lines of a score; examples of a model, not of a guess."""
    metrics = ", ".join(f"{name} {mean}" for name, mean in found.metrics.items())
    shots = f", {found.shots} shots" if found.shots else ""
    loss = f", loss {found.loss:.4f}" if found.loss == found.loss else ""
    yield f"{found.task}: {found.model}{shots}: {metrics}{loss} over {len(found.answers):,} pairs"
    if found.loss == found.loss or found.shots:
        for one in found.answers[:examples]:
            yield f"    {one.prompt[-60:]!r} -> {one.answer!r} (wanted {one.wanted!r}; {one.source})"
