"""A run for a number of parameters, tokens and devices: a model of that size, batches, steps, and the best layout.

Pure planning; `commands/configure` writes the result as a commented file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_omega import accounting
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.planner.estimate import Estimate
from megatron_omega.planner.hardware import Hardware
from megatron_omega.planner.ranking import nothing_fits, rank

TOKENS_PER_PARAMETER = 20
"""Tokens for each parameter if none are named: what Chinchilla found to use compute best."""
ASPECT = 64
"""Width over the depth of a stack that is aimed at."""
WIDTH_STEP = 64
MOST_LAYERS = 96
SMALLEST_BATCH, LARGEST_BATCH = 2**12, 2**22
"""Tokens of a step."""
CPU_SHARE = 8


@dataclass(frozen=True)
class Wish:
    """What a user asks for."""

    parameters: float
    devices: int
    tokens: float | None = None
    """None: `TOKENS_PER_PARAMETER` for each."""
    vocab_size: int = 32768
    is_decoder_only: bool = False


@dataclass(frozen=True)
class Proposal:
    """A configuration that does it."""

    values: dict[str, dict[str, Any]]
    """What is worth writing down; the rest is derived or default."""
    estimate: Estimate
    parameters: int

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return self.estimate.step_seconds * self.values["training"]["train_steps"]


def propose(wish: Wish, hardware: Hardware) -> Proposal:
    """Return the run that comes nearest to `wish` on `hardware`, in the fastest layout that fits.

    Raises:
        ConfigError: the wish makes no sense, or nothing fits.
    """
    _check(wish)
    values = _nearest_model(wish)
    values["precision"] = {
        "dtype": "bf16" if "bf16" in hardware.facts.peak_flops and not hardware.facts.is_cpu else "fp32"
    }
    config = _as_config(values)
    parameters = _count(config)
    tokens = wish.tokens or TOKENS_PER_PARAMETER * parameters
    wanted = _batch_tokens(parameters, is_cpu=hardware.facts.is_cpu)
    samples = _samples(wanted / accounting.tokens_per_sample(config), wish.devices)
    steps = max(1, round(tokens / (samples * accounting.tokens_per_sample(config))))
    values["batch"] = {"global_batch_size": samples}
    values["training"] = {"train_steps": steps}
    config = _as_config(values)
    ranking = rank(config, hardware, wish.devices)
    if not ranking.fitting:
        raise nothing_fits(config, hardware, wish.devices, ranking)
    best = ranking.fitting[0]
    values["batch"]["micro_batch_size"] = best.candidate.micro_batch
    values["parallel"] = _layout(best)
    return Proposal(values, best, parameters)


def _check(wish: Wish) -> None:
    findings = [
        f"--{name} {value:g} is not positive"
        for name, value in (("parameters", wish.parameters), ("gpus", wish.devices), ("tokens", wish.tokens or 1))
        if not value > 0
    ]
    if findings:
        raise ConfigError(*findings)


def _nearest_model(wish: Wish) -> dict[str, dict[str, Any]]:
    """Return the shape whose count is nearest to the wish, and whose width and depth are in proportion."""

    def distance(values: dict[str, dict[str, Any]]) -> float:
        model = values["model"]
        aspect = model["hidden_size"] / model["decoder_layers"] / ASPECT
        return abs(math.log(_count(_as_config(values)) / wish.parameters)) + 0.1 * abs(math.log(aspect))

    return min(_shapes(wish), key=distance)


def _shapes(wish: Wish) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield models of every width, each as deep as comes nearest to the wished size."""
    for hidden in range(WIDTH_STEP, 128 * WIDTH_STEP + 1, WIDTH_STEP):
        shallow, deeper = (_model(wish, hidden, layers) for layers in (1, 2))
        first, second = _count(_as_config(shallow)), _count(_as_config(deeper))
        layers = round(1 + (wish.parameters - first) / (second - first))
        yield _model(wish, hidden, min(MOST_LAYERS, max(1, layers)))
        if first > 2 * wish.parameters:
            return


def _model(wish: Wish, hidden: int, layers: int) -> dict[str, dict[str, Any]]:
    model = {"hidden_size": hidden, "decoder_layers": layers, "vocab_size": wish.vocab_size}
    return {"model": model | ({"encoder_layers": 0} if wish.is_decoder_only else {"encoder_layers": layers})}


def _as_config(values: dict[str, dict[str, Any]]) -> RunConfig:
    return load_config(values)


def _count(config: RunConfig) -> int:
    data = config.data
    return accounting.parameter_count(
        config.model, encoder_seq_length=data.encoder_seq_length, decoder_seq_length=data.decoder_seq_length
    )


def _batch_tokens(parameters: int, *, is_cpu: bool) -> float:
    """Return the tokens of a step: they grow with the root of the model's size; a CPU takes smaller steps."""
    wanted = 2**19 * math.sqrt(parameters / 1e9) / (CPU_SHARE if is_cpu else 1)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, wanted))


def _samples(wanted: float, devices: int) -> int:
    """Return the samples of a step: a power of two times the devices."""
    return devices * 2 ** max(0, round(math.log2(wanted / devices))) if wanted > devices else devices


def _layout(best: Estimate) -> dict[str, Any]:
    candidate = best.candidate
    found: dict[str, Any] = {
        "tensor_parallel_size": candidate.tensor,
        "pipeline_parallel_size": candidate.pipeline,
        "recompute": candidate.recompute,
    }
    if candidate.sequence_parallel:
        found["sequence_parallel"] = True
    if candidate.schedule != "1f1b":
        found["pipeline_schedule"] = candidate.schedule
    return found
