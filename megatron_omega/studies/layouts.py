"""Proof that layouts agree: train the same model on the same data under each, and compare every step's figures.

Each layout is a real run of `build.train` in processes of its own, started on this machine.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import resolve_run
from megatron_omega.config.schema import ModelConfig, RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.environment import complete_environment
from megatron_omega.host.json_lines import read_objects
from megatron_omega.launching.local_ranks import run_ranks

COMPARED = ("loss", "lm_loss", "mlm_loss", "grad_norm")
FP32_TOLERANCE = 1e-5
BF16_ROUNDING = 0.42 * 2.0**-8
"""Root-mean-square relative error of one rounding to bf16. It keeps 8 significant bits: a value m 2^e, m in [1, 2),
is off by at most 2^-8 2^e, evenly spread. That is 2^-8 / (m sqrt 3) of the value, and 0.42 x 2^-8 over all m."""


def tolerance_of(config: RunConfig) -> float:
    """Return the largest relative difference between layouts that rounding explains: 1e-5 in fp32; bf16 is derived.

    Layouts round at different places: where tensor-parallel ranks add up, each part has been rounded before. A value
    and its gradient pass 2 such sums in an encoder and 3 in a decoder layer, each way. Independent errors add up by
    their squares, so a gradient is off by about BF16_ROUNDING x sqrt(passes) of its norm; the norm by no more than
    that, and a loss, moved by the same gradients, by less. Allowed is twice that, two standard deviations: 0.015 for
    2 + 2 layers.
    """
    if config.precision.dtype == "fp32":
        return FP32_TOLERANCE
    passes = 2 * (2 * config.model.encoder_layers + 3 * config.model.decoder_layers)
    return 2 * BF16_ROUNDING * math.sqrt(passes)


def every_layout(model: ModelConfig) -> list[str]:
    """Return the layouts that together prove a model, of any number of processes up to 8.

    Each axis alone and with the others; every ZeRO stage; an uneven split; stages cut inside the encoder and inside
    the decoder; both schedules; sequence parallelism; recomputation; other micro-batches. A model may be too small for
    some.
    """
    axes = [[f"{name}{size}" for name, size in zip(("tp", "pp", "dp"), sizes, strict=True) if size > 1]
            for sizes in product((1, 2), repeat=3)]  # fmt: skip
    bridge = model.encoder_layers + 1
    cuts = (1 + model.encoder_layers // 2, bridge + 1, bridge + 1 + model.decoder_layers // 2)
    zeros = ["zero0", "dp2-zero0", "dp2-zero2", "dp2-zero3", "dp2-zero3offload", "tp2-dp2-zero3"]
    inner = [] if model.is_decoder_only else [f"pp4-cut{'.'.join(map(str, cuts))}"]
    others = ["tp3", *inner, "tp2-pp2v-dp2", "pp2i2-dp2", "tp2-pp2i3", "tp2sp", "tp2sp-pp2-dp2", "pp2-full", "mb4"]
    return [*("-".join(parts) for parts in axes if parts), *zeros, *others]


_PARTS = {
    "tp": re.compile(r"tp(\d+)(sp)?"),
    "pp": re.compile(r"pp(\d+)(v|i(\d+))?"),
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
class Comparison:
    """How far a layout is from the reference, over all steps: the largest relative differences."""

    label: str
    differences: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(difference <= self.tolerance for difference in self.differences.values())


def parse_layout(label: str) -> LayoutUnderTest:
    """Read a layout such as tp2sp-pp2v-dp2-zero1-cut2.4-full; every part may be left out.

    tpN[sp]: tensor [sequence] parallel; ppN[v|iM]: pipeline [DualPipeV, or interleaved with M stages a rank]; dpN:
    replicas; zeroN[offload]; cutA.B.C: first layers of the stages after the first; mbN: micro-batch;
    none|swiglu|ffn|full: recompute.
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
        **_schedule(found.get("pp")),
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


def _schedule(pipeline: re.Match[str] | None) -> dict[str, str]:
    if pipeline is None or pipeline[2] is None:
        return {}
    if pipeline[2] == "v":
        return {"parallel.pipeline_schedule": "dualpipev", "batch.micro_batch_size": "1"}  # it needs many
    return {"parallel.pipeline_schedule": "interleaved", "parallel.virtual_stages": pipeline[3]}


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
        # What a run does about differences between ranks and about odd losses would hide what is measured here.
        "resilience.integrity_interval_steps": "0",
        "resilience.spike_z_score": "0",
        "logging.progress_bar": "false",
    }
    words = [*overrides, *(Override(*pair) for pair in (own | dict(layout.settings)).items())]
    return Arguments(config=config, deepspeed_config=deepspeed, overrides=tuple(words))


def check_layout(
    config: Path, layout: LayoutUnderTest, overrides: Iterable[Override] = (), *, steps: int, folder: Path
) -> RunConfig:
    """Return the configuration that `layout` runs; raise `ConfigError`, naming it, if the model cannot be run so."""
    arguments = arguments_for(config, layout, overrides, steps=steps, folder=folder)
    try:
        return resolve_run(arguments, layout.world_size).config
    except ConfigError as error:
        raise ConfigError(*(f"layout {layout.label}: {finding}" for finding in error.findings)) from None


def train_rank(arguments: Arguments) -> None:
    """Train as one rank of the run that `arguments` describe. DeepSpeed prints to stdout, which is the tool's own."""
    from megatron_omega.run.train import train

    place = complete_environment()
    with redirect_stdout(sys.stderr):
        train(resolve_run(arguments, place.world_size), place)


def measure(
    config: Path,
    layout: LayoutUnderTest,
    overrides: Iterable[Override] = (),
    *,
    steps: int,
    folder: Path,
    train: Callable[[Arguments], None] = train_rank,
    timeout_seconds: float = 600.0,
) -> list[dict[str, float]]:
    """Train `steps` steps under `layout` and return what each step reported. Raises as `run_ranks` does."""
    arguments = arguments_for(config, layout, overrides, steps=steps, folder=folder)
    run_ranks(train, layout.world_size, arguments, timeout_seconds=timeout_seconds)
    return [*read_objects(folder / layout.label / run_folder.METRICS)]


def compare(
    label: str, reference: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], tolerance: float
) -> Comparison:
    """Return the largest relative difference of each figure over all steps; infinite if one is missing."""
    differences: dict[str, float] = dict.fromkeys(COMPARED, 0.0 if len(reference) == len(rows) else math.inf)
    for expected, found in zip(reference, rows, strict=False):
        for name in COMPARED:
            if name == "mlm_loss" and expected[name] is None and found[name] is None:
                continue  # the step had no masked token
            differences[name] = max(differences[name], _relative(expected[name], found[name]))
    return Comparison(label, differences, tolerance)


def _relative(expected: Any, found: Any) -> float:
    if any(not isinstance(value, float | int) or not math.isfinite(value) for value in (expected, found)):
        return math.inf
    return 0.0 if expected == found else abs(expected - found) / max(abs(expected), 1e-30)
