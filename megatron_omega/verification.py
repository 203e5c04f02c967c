"""Proof that layouts agree: train the same model on the same data under each, and compare every step's figures.

Each layout is a real run of `build.train` in processes of its own, started on this machine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import resolve_run
from megatron_omega.environment import complete_environment
from megatron_omega.errors import ConfigError
from megatron_omega.local_launch import run_ranks

COMPARED = ("loss", "lm_loss", "mlm_loss", "grad_norm")
FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 2.0**-6
"""bf16 keeps 8 significant bits: one rounding errs by up to 2^-9 of a value. Layouts round partial sums at different
places; a gradient is a product of a rounded activation and a rounded gradient, summed over parts that
are rounded again: a handful of roundings, bounded here by eight of them. Losses, fp32 means, stay far below."""

_PARTS = {
    "tp": re.compile(r"tp(\d+)(sp)?"),
    "pp": re.compile(r"pp(\d+)(v)?"),
    "dp": re.compile(r"dp(\d+)"),
    "zero": re.compile(r"zero([0-3])(offload)?"),
    "cut": re.compile(r"cut(\d+(?:\.\d+)*)"),
    "mb": re.compile(r"mb(\d+)"),
    "recompute": re.compile(r"(none|swiglu|ffn|full)"),
}


@dataclass(frozen=True)
class LayoutUnderTest:
    """One way to run a configuration."""

    label: str
    world_size: int
    settings: tuple[tuple[str, str], ...]
    """Overrides of the configuration."""
    zero: dict[str, Any]
    """DeepSpeed's zero_optimization."""


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from the reference, over all steps: the largest relative differences."""

    label: str
    differences: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(difference <= self.tolerance for difference in self.differences.values())


def parse_layout(label: str) -> LayoutUnderTest:
    """Read a layout such as tp2sp-pp2v-dp2-zero1-cut2.4-full; every part may be left out.

    tpN[sp]: tensor [sequence] parallel; ppN[v]: pipeline [DualPipeV]; dpN: replicas; zeroN[offload]; cutA.B.C: first
    layers of the stages after the first; mbN: micro-batch; none|swiglu|ffn|full: recompute.
    """
    found: dict[str, re.Match[str]] = {}
    for word in label.split("-"):
        part = next((name for name, pattern in _PARTS.items() if pattern.fullmatch(word)), None)
        match = _PARTS[part].fullmatch(word) if part else None
        if part is None or match is None:
            raise ConfigError(
                f"layout {label!r}: {word!r} is not known; write it like tp2sp-pp2v-dp2-zero1-cut2.4-full"
            )
        found[part] = match
    sizes = {axis: int(found[axis][1]) if axis in found else 1 for axis in ("tp", "pp", "dp")}
    settings = {
        "parallel.tensor_parallel_size": str(sizes["tp"]),
        "parallel.pipeline_parallel_size": str(sizes["pp"]),
        "parallel.sequence_parallel": "true" if "tp" in found and found["tp"][2] else "false",
        "parallel.pipeline_schedule": "dualpipev" if "pp" in found and found["pp"][2] else "1f1b",
    }
    if "cut" in found:
        settings["parallel.stage_boundaries"] = f"[{found['cut'][1].replace('.', ', ')}]"
    if "mb" in found:
        settings["batch.micro_batch_size"] = found["mb"][1]
    if "recompute" in found:
        settings["parallel.recompute"] = found["recompute"][1]
    zero: dict[str, Any] = {"stage": int(found["zero"][1]) if "zero" in found else 1}
    if "zero" in found and found["zero"][2]:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return LayoutUnderTest(label, sizes["tp"] * sizes["pp"] * sizes["dp"], tuple(settings.items()), zero)


def arguments_for(
    config: Path, layout: LayoutUnderTest, overrides: Iterable[Override], *, steps: int, folder: Path
) -> Arguments:
    """Write what `layout` needs under `folder`, and return the command line of its run."""
    run = folder / layout.label
    run.mkdir(parents=True, exist_ok=True)
    deepspeed = run / "deepspeed.json"
    deepspeed.write_text(json.dumps({"zero_optimization": layout.zero}))
    own = {
        "training.train_steps": str(steps),
        "schedule.warmup_steps": "0",
        "evaluation.interval_steps": "0",
        "checkpoint.interval_steps": "0",
        "checkpoint.resume": "false",
        "logging.run_directory": str(run),
        "logging.tensorboard": "false",
        "logging.progress_bar": "false",
    }
    words = [*overrides, *(Override(*pair) for pair in (own | dict(layout.settings)).items())]
    return Arguments(config=config, deepspeed_config=deepspeed, overrides=tuple(words))


def train_rank(arguments: Arguments) -> None:
    """Train as one rank of the run that `arguments` describe."""
    from megatron_omega.build import train

    place = complete_environment()
    train(resolve_run(arguments, place.world_size), place)


def measure(
    config: Path,
    layout: LayoutUnderTest,
    overrides: Iterable[Override] = (),
    *,
    steps: int,
    folder: Path,
    train: Callable[[Arguments], None] = train_rank,
) -> list[dict[str, float]]:
    """Train `steps` steps under `layout` and return what each step reported."""
    arguments = arguments_for(config, layout, overrides, steps=steps, folder=folder)
    resolve_run(arguments, layout.world_size)  # all that is wrong is told before a process starts
    run_ranks(train, layout.world_size, arguments)
    lines = (folder / layout.label / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare(
    label: str, reference: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], tolerance: float
) -> Verdict:
    """Return the largest relative difference of each figure over all steps; infinite where one is missing."""
    differences: dict[str, float] = dict.fromkeys(COMPARED, 0.0 if len(reference) == len(rows) else math.inf)
    for expected, found in zip(reference, rows, strict=False):
        for name in COMPARED:
            differences[name] = max(differences[name], _relative(expected[name], found[name]))
    return Verdict(label, differences, tolerance)


def _relative(expected: Any, found: Any) -> float:
    if expected == found:
        return 0.0
    numbers = isinstance(expected, float | int) and isinstance(found, float | int)
    return abs(expected - found) / max(abs(expected), 1e-30) if numbers else math.inf
