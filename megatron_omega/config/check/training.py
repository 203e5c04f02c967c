"""Contradictions of a run's course: batch sizes, the schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_omega.config.check.words import divisors, nearest_multiples, one_of
from megatron_omega.config.schema import RunConfig


def batches(config: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel, batch = config.parallel, config.batch
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    dp = 1
    if world_size is not None:
        if world_size % (tp * pp):
            yield (
                f"{world_size} processes are not divisible by parallel.tensor_parallel_size={tp} x "
                f"parallel.pipeline_parallel_size={pp}; start {nearest_multiples(world_size, tp * pp)}"
            )
            return
        dp = world_size // (tp * pp)
    yield from _ramp_up(config)
    needed = batch.micro_batch_size * dp
    for size in ramp_up_sizes(config):
        name = "batch.global_batch_size" if size == batch.global_batch_size else "batch.ramp_up: the global batch size"
        if size % needed:
            replicas = f" x {dp} data-parallel replicas" if world_size is not None else ""
            yield (
                f"{name}={size} is not divisible by batch.micro_batch_size={batch.micro_batch_size}{replicas}; "
                f"use {nearest_multiples(size, needed)}"
            )
        elif parallel.pipeline_schedule == "dualpipev" and pp > 1 and size // needed < 2 * pp:
            yield (
                f"{name}={size} makes {size // needed} micro-batches for each replica, and parallel.pipeline_schedule="
                f"dualpipev needs at least {2 * pp} (2 x parallel.pipeline_parallel_size); "
                f"use at least {2 * pp * needed}"
            )


def traces(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Yield what is wrong with the steps and ranks of which a trace is wanted."""
    training = config.training
    if training.profile_steps is None:
        return
    first, last = training.profile_steps
    if not first <= last <= training.train_steps:
        yield (
            f"training.profile_steps=[{first}, {last}] must be a first and a last step within "
            f"training.train_steps={training.train_steps}; use steps such as [10, 12]"
        )
    strangers = [rank for rank in training.profile_ranks if world_size is not None and rank >= world_size]
    if strangers:
        yield f"training.profile_ranks names rank {strangers[0]} of {world_size} processes; the first is 0: name less"


def _ramp_up(config: RunConfig) -> Iterator[str]:
    ramp, final = config.batch.ramp_up, config.batch.global_batch_size
    if ramp is None:
        return
    if ramp.start >= final:
        yield (
            f"batch.ramp_up.start={ramp.start} is not below batch.global_batch_size={final}; "
            "start smaller, or leave batch.ramp_up out"
        )
    elif (final - ramp.start) % ramp.increment:
        steps = divisors(final - ramp.start)
        near = sorted(sorted(steps, key=lambda step: abs(step - ramp.increment))[:2])
        yield (
            f"batch.ramp_up.increment={ramp.increment} does not lead from {ramp.start} to batch.global_batch_size="
            f"{final}; use {one_of(near)}"
        )


def ramp_up_sizes(config: RunConfig) -> list[int]:
    """Return the global batch sizes a run goes through, smallest first; one size where there is no ramp-up."""
    final, ramp = config.batch.global_batch_size, config.batch.ramp_up
    if ramp is None or ramp.start >= final:
        return [final]
    return [*range(ramp.start, final, ramp.increment), final]


def schedule(config: RunConfig) -> Iterator[str]:
    schedule, steps = config.schedule, config.training.train_steps
    if schedule.warmup_steps > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is more than training.train_steps={steps}; "
            f"use at most {steps}"
        )
    elif schedule.decay == "wsd" and schedule.warmup_steps + round(schedule.decay_fraction * steps) > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_fraction={schedule.decay_fraction:g} "
            f"overlap within training.train_steps={steps}; use a fraction of at most "
            f"{1 - schedule.warmup_steps / steps:.2g}"
        )
    for name in ("beta1", "beta2"):
        if getattr(config.optimizer, name) == 1:
            yield f"optimizer.{name}=1 never forgets; use a decay below 1"


def checkpoints(config: RunConfig) -> Iterator[str]:
    if config.checkpoint.load_weights_only and config.checkpoint.load is None:
        yield "checkpoint.load_weights_only=true without checkpoint.load; say which checkpoint (--load PATH)"


def adapters(config: RunConfig) -> Iterator[str]:
    lora = config.lora
    if not lora.is_on:
        if lora.also:
            yield f"lora.also=[{', '.join(lora.also)}] without adapters; say their rank (--lora.rank 8)"
        return
    if not lora.targets:
        yield "lora.targets is empty; name at least one of qkv, out, gate_up, down or cross"
    for name, named in (("targets", lora.targets), ("also", lora.also)):
        if len({*named}) < len(named):
            yield f"lora.{name}=[{', '.join(named)}] names something more than once; name each once"
    if config.model.is_decoder_only and {*lora.targets} == {"cross"}:
        yield "lora.targets=[cross] with model.encoder_layers=0; a decoder-only model has no cross-attention: use qkv"
    if config.checkpoint.load is None:
        yield (
            f"lora.rank={lora.rank} without checkpoint.load; adapters stand beside trained weights: say which "
            "(--load PATH)"
        )
    if config.optimizer.name == "muon":
        yield f"lora.rank={lora.rank} with optimizer.name=muon, which moves whole matrices; use adamw"
