"""Train a configured run, as one of its processes (under deepspeed, torchrun, srun or `launch`), or alone.

    megatron-omega train --config run.yaml
    torchrun --nproc-per-node 4 -m megatron_omega train --config omega-tiny --deepspeed_config zero1

--help lists every setting; --dry-run shows what would run (on WORLD_SIZE ranks, else on one replica). With --tasks it
fine-tunes, as `finetune` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_omega.config.arguments import Arguments, parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.config.schema import RunConfig
from megatron_omega.host.environment import announced_world_size, complete_environment, has_gpu
from megatron_omega.run.claims import notice_of_completion
from megatron_omega.tasks.finetuning import FineTuning, as_finetuning, read_tasks, settings_of, with_epochs

if TYPE_CHECKING:
    from megatron_omega.checkpoint.initial import InitialWeights

AsRun = Callable[[Arguments, int], FineTuning]
"""From what a user said and the number of processes to an ordinary run."""


def measure_machine() -> None:
    """Measure this machine for the forecast, once; the other ranks wait for rank 0 meanwhile."""
    from megatron_omega.studies.quick_calibration import calibrate_once

    if (seconds := calibrate_once()) is not None:
        print(f"measured this machine for the forecast, once, in {seconds:.0f} s", file=sys.stderr)


def with_tasks(arguments: Arguments) -> Arguments:
    """Return the arguments with --tasks read."""
    if arguments.tasks is None:
        return arguments
    return replace(arguments, tasks=None, overrides=(*arguments.overrides, read_tasks(arguments.tasks)))


def as_run(arguments: Arguments, world_size: int) -> FineTuning:
    """Return the run that was asked for: fine-tuning with --tasks, else pretraining."""
    if arguments.tasks is not None:
        return as_finetuning(with_tasks(arguments), world_size)
    return with_epochs(arguments, world_size)


def start(arguments: Arguments, as_run: AsRun) -> None:
    """Check and train; or, with --dry-run, print what would be trained."""
    if arguments.dry_run:
        from megatron_omega.run.preview import describe

        world_size = announced_world_size()
        run = as_run(arguments, world_size or 1)
        print(describe(resolve_run(run.arguments, world_size), as_json=arguments.json))
        return
    place = complete_environment()
    run = as_run(arguments, place.world_size)
    if run.told and place.rank == 0:
        print(settings_of(run.told), file=sys.stderr)
    resolved = resolve_run(run.arguments, place.world_size)
    if (notice := notice_of_completion(resolved.config)) is not None:
        if place.rank == 0:
            print(notice)
        return
    from megatron_omega.run.train import train  # torch starts only now: what is wrong above is told at once
    from megatron_omega.tasks.answering import Answers

    if place.rank == 0 and not has_gpu():
        measure_machine()
    train(resolved, place, initial=initial_of(resolved.config), answering=Answers)


def initial_of(config: RunConfig) -> InitialWeights | None:
    """Return the weights of checkpoint.load where those are an export or a folder of Transformers. Needs torch."""
    from megatron_omega.export.starting import require_no_adapters, starting_weights

    found = starting_weights(config.checkpoint.load)
    if found is not None and config.lora.is_on:
        require_no_adapters(found.path)
    return found


def main(argv: Sequence[str]) -> None:
    """Parse, check, and train; or, with --dry-run, print what would be trained."""
    start(parse_arguments(argv, about=__doc__), as_run)
