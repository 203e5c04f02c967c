"""A run that is broken off and started again, beside the same run unbroken."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import arguments_for, parse_layout, train_rank


def unbroken_and_broken(
    config: Path, label: str, overrides: Sequence[Override], steps: int, folder: Path
) -> tuple[Path, Path]:
    """Return the folders of both runs. `overrides` says after how many steps a checkpoint is saved.

    The broken run is a copy of the other that lost its last checkpoint, and does the steps behind the one before again.
    """

    def train(into: Path) -> Path:
        layout = parse_layout(label)
        arguments = arguments_for(config, layout, [], steps=steps, folder=into)
        more = (*arguments.overrides, *overrides, Override("checkpoint.resume", "true"))
        run_ranks(train_rank, layout.world_size, Arguments(arguments.config, arguments.deepspeed_config, more))
        return into / label

    unbroken = train(folder / "unbroken")
    broken = folder / "broken" / label
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / f"checkpoints/step-{steps:08d}")
    return unbroken, train(folder / "broken")
