"""Contradictions between settings: every one of them, each in one sentence. Pure functions of a valid `RunConfig`.

A finding says what was found, what is needed and what to do. `notices` are legal but unwise. Nothing is read from disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import gcd

from megatron_omega.config.schema import DECODER_BRANCHES, ENCODER_BRANCHES, Branch, ModelConfig, RunConfig, Stack


def findings(
    config: RunConfig, world_size: int | None, zero_stage: int | None, *, needs_corpus: bool = True
) -> list[str]:
    """Return every contradiction in `config`.

    Args:
        world_size: processes of the run; None leaves out what depends on it.
        zero_stage: the ZeRO stage that will run; None leaves out what depends on it.
        needs_corpus: whether a run without any corpus is a contradiction (a training run is, a tool's is not).
    """
    found = [*_architecture(config.model), *_streams(config), *_objective(config), *_tensor_parallel(config)]
    found += [*_stages(config), *_schedule(config), *_checkpoints(config)]
    if zero_stage is not None:
        found += _zero(config, zero_stage)
    found += _batches(config, world_size)
    if needs_corpus:
        found += _corpus(config)
    return found


def notices(config: RunConfig) -> list[str]:
    """Return what is legal but probably not meant."""
    return [*_unwise(config)]


def branches_used(model: ModelConfig, stack: Stack) -> set[Branch]:
    """Return the branches of all layers of `stack`."""
    return {branch for branches in model.branch_pattern(stack) for branch in branches}


def num_pipeline_layers(model: ModelConfig) -> int:
    """Return the entries of the layer list: embedding, encoder layers, bridge, decoder layers, head, output.

    A decoder-only model has no bridge.
    """
    return model.decoder_layers + 3 if model.is_decoder_only else model.encoder_layers + model.decoder_layers + 4


def num_stages(config: RunConfig) -> int:
    """Return the pieces the layer list is cut into: two for each rank of a V, one otherwise."""
    stages = config.parallel.pipeline_parallel_size
    return 2 * stages if config.parallel.pipeline_schedule == "dualpipev" else stages


def ramp_up_sizes(config: RunConfig) -> list[int]:
    """Return the global batch sizes a run goes through, smallest first; one size where there is no ramp-up."""
    final, ramp = config.batch.global_batch_size, config.batch.ramp_up
    if ramp is None or ramp.start >= final:
        return [final]
    return [*range(ramp.start, final, ramp.increment), final]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def one_of(choices: Sequence[int | str]) -> str:
    """Return `1, 2 or 4`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _architecture(model: ModelConfig) -> Iterator[str]:
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads="
            f"{model.num_attention_heads}; change one of them or give model.head_dim"
        )
    elif model.resolved_head_dim % 2:
        origin = "" if model.head_dim else " (model.hidden_size / model.num_attention_heads)"
        even = model.resolved_head_dim + 1
        yield f"model.head_dim={model.resolved_head_dim}{origin} is odd; rotary pairs need an even one, such as {even}"
    if model.positions == "sinusoidal" and model.hidden_size % 2:
        yield f"model.hidden_size={model.hidden_size} is odd; model.positions=sinusoidal needs sine and cosine pairs"
    if not model.is_decoder_only:
        yield from _branches(model, "encoder", ENCODER_BRANCHES)
    yield from _branches(model, "decoder", DECODER_BRANCHES)


def _branches(model: ModelConfig, stack: Stack, legal: Sequence[Branch]) -> Iterator[str]:
    name, pattern = f"model.{stack}_branches", model.branch_pattern(stack)
    for index, branches in enumerate(pattern):
        place = name if len(pattern) == 1 else f"{name}[{index}]"
        shown = f"{place}=[{', '.join(branches)}]"
        if not branches:
            yield f"{place} is empty; name at least one of {one_of(legal)}"
        for branch in sorted({*branches} - {*legal}):
            yield f"{shown} has {branch}, which no {stack} can use; use {one_of(legal)}"
        for branch in sorted({branch for branch in branches if branches.count(branch) > 1}):
            yield f"{shown} names {branch} more than once; name each branch once"
    if {"local", "axial"} <= branches_used(model, stack) and model.local_window < model.axial_width:
        yield (
            f"model.local_window={model.local_window} is smaller than model.axial_width={model.axial_width} "
            f"(in {name}): parts of the text would never be seen; use a window of at least {model.axial_width}"
        )


def _streams(config: RunConfig) -> Iterator[str]:
    model, data, tp = config.model, config.data, config.parallel.tensor_parallel_size
    if model.is_decoder_only and data.encoder_seq_length:
        yield (
            f"data.encoder_seq_length={data.encoder_seq_length} with model.encoder_layers=0; "
            "a decoder-only model has no encoder stream: use 0"
        )
    if not model.is_decoder_only and not data.encoder_seq_length:
        yield (
            f"data.encoder_seq_length=0 with model.encoder_layers={model.encoder_layers}; give the encoder stream a "
            "length, or use model.encoder_layers=0"
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel=true with parallel.tensor_parallel_size=1; it shards between tensor-parallel "
            "ranks: use false, or at least 2 ranks"
        )
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        name, length = f"data.{stack}_seq_length", getattr(data, f"{stack}_seq_length")
        if "axial" in branches_used(model, stack) and length % model.axial_width:
            yield (
                f"{name}={length} is not a multiple of model.axial_width={model.axial_width} (the axial branch works "
                f"on whole rows); use {_nearest_multiples(length, model.axial_width)}"
            )
        if config.parallel.sequence_parallel and length % tp:
            yield (
                f"{name}={length} is not divisible by parallel.tensor_parallel_size={tp}, which sequence parallelism "
                f"needs; use {_nearest_multiples(length, tp)}"
            )


def _objective(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    weights = (objective.prefix_lm, objective.span_corruption, objective.masked_prefix)
    if not config.model.is_decoder_only and sum(weights) == 0:
        yield (
            "objective.prefix_lm=0, objective.span_corruption=0 and objective.masked_prefix=0 leave nothing to train; "
            "give at least one a positive weight"
        )
    if objective.span_corruption and not 0 < objective.span_rate < 1:
        yield f"objective.span_rate={objective.span_rate:g} is not between 0 and 1; or use objective.span_corruption=0"
    if objective.span_corruption and objective.span_mean_length < 1:
        yield f"objective.span_mean_length={objective.span_mean_length:g} is less than a token; use at least 1"
    if objective.masked_prefix and config.model.has_mlm_head and objective.mask_rate == 0:
        yield "objective.mask_rate=0 masks nothing; use a positive rate, or objective.masked_prefix=0"


def _tensor_parallel(config: RunConfig) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_parallel_size
    heads, ffn = model.num_attention_heads, model.ffn_hidden_size
    if heads % tp:
        yield (
            f"model.num_attention_heads={heads} is not divisible by parallel.tensor_parallel_size={tp}; "
            f"use {one_of(divisors(heads))}"
        )
    if ffn % tp:
        yield (
            f"model.ffn_hidden_size={ffn} is not divisible by parallel.tensor_parallel_size={tp}; "
            f"use {one_of(divisors(gcd(heads, ffn)))} (these divide the heads too)"
        )


def _stages(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, num_pipeline_layers(config.model)
    stages = num_stages(config)
    pp = parallel.pipeline_parallel_size
    if parallel.pipeline_schedule == "dualpipev" and pp == 1:
        yield (
            "parallel.pipeline_schedule=dualpipev with parallel.pipeline_parallel_size=1; "
            "use 1f1b, or at least 2 pipeline stages"
        )
        return
    if stages > layers - 1:
        most = (layers - 1) // (stages // pp)
        yield (
            f"parallel.pipeline_parallel_size={pp} cuts {layers} layers (embedding, bridge and heads counted) into "
            f"{stages} pieces; use at most {most}"
        )
    if parallel.stage_boundaries is not None:
        yield from _boundaries(parallel.stage_boundaries, stages, layers)


def _boundaries(boundaries: Sequence[int], stages: int, layers: int) -> Iterator[str]:
    shown = f"parallel.stage_boundaries=[{', '.join(map(str, boundaries))}]"
    if len(boundaries) != stages - 1:
        yield (
            f"{shown} has {len(boundaries)} entries for {stages} stages; give {stages - 1}, the first layer of every "
            "stage after the first"
        )
    if any(first >= second for first, second in pairwise(boundaries)):
        yield f"{shown} is not ascending; every stage needs at least one layer"
    outside = [boundary for boundary in boundaries if not 1 <= boundary <= layers - 2]
    if outside:
        yield (
            f"{shown} has {one_of(outside)} outside 1 to {layers - 2}; the layer list has {layers} entries, and its "
            "last two (head and output) stay together"
        )


def _zero(config: RunConfig, zero_stage: int) -> Iterator[str]:
    pp = config.parallel.pipeline_parallel_size
    if pp > 1 and zero_stage != 1:
        why = (
            "does not combine with pipeline stages"
            if zero_stage > 1
            else "clips the gradients of pipeline stages wrongly"
        )
        yield (
            f"zero_optimization.stage={zero_stage} (DeepSpeed configuration) with parallel.pipeline_parallel_size="
            f"{pp}: it {why}; use ds_configs/zero1.json, or parallel.pipeline_parallel_size=1"
        )


def _batches(config: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel, batch = config.parallel, config.batch
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    dp = 1
    if world_size is not None:
        if world_size % (tp * pp):
            yield (
                f"{world_size} processes are not divisible by parallel.tensor_parallel_size={tp} x "
                f"parallel.pipeline_parallel_size={pp}; start {_nearest_multiples(world_size, tp * pp)}"
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
                f"use {_nearest_multiples(size, needed)}"
            )
        elif parallel.pipeline_schedule == "dualpipev" and pp > 1 and size // needed < 2 * pp:
            yield (
                f"{name}={size} makes {size // needed} micro-batches for each replica, and parallel.pipeline_schedule="
                f"dualpipev needs at least {2 * pp} (2 x parallel.pipeline_parallel_size); "
                f"use at least {2 * pp * needed}"
            )


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


def _schedule(config: RunConfig) -> Iterator[str]:
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


def _checkpoints(config: RunConfig) -> Iterator[str]:
    if config.checkpoint.load_weights_only and config.checkpoint.load is None:
        yield "checkpoint.load_weights_only=true without checkpoint.load; say which checkpoint (--load PATH)"


def _corpus(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.corpora:
        yield "data.corpora is empty; name at least one: --data.corpora '[{prefix: PATH}]'"
    if not data.tokenizer:
        yield "data.tokenizer is not set; give the path of the SentencePiece model the corpus was encoded with"
    yield from _reweights(config)
    train, validation, _ = data.split
    if train == 0:
        yield f"data.split={list(data.split)} has no train part; its first number must be positive"
    if validation == 0 and config.evaluation.interval_steps:
        yield (
            f"data.split={list(data.split)} has no validation part, but evaluation.interval_steps="
            f"{config.evaluation.interval_steps}; use evaluation.interval_steps=0, or give it a share"
        )


def _reweights(config: RunConfig) -> Iterator[str]:
    data = config.data
    for change in data.reweight:
        if len(change.weights) != len(data.corpora):
            yield (
                f"data.reweight from sample {change.from_sample} has {len(change.weights)} weights for "
                f"{len(data.corpora)} corpora; give one for each entry of data.corpora"
            )
        elif sum(change.weights) == 0:
            yield f"data.reweight from sample {change.from_sample} leaves out every corpus; keep one above 0"
    if any(first.from_sample >= second.from_sample for first, second in pairwise(data.reweight)):
        yield "data.reweight is not ascending in from_sample; sort its entries"


def _unwise(config: RunConfig) -> Iterator[str]:
    model, objective = config.model, config.objective
    if "axial" in (decoder := branches_used(model, "decoder")) and not {"causal", "local"} & decoder:
        yield "model.decoder_branches has axial alone: no position can see all of its past; add local or causal"
    stacks: tuple[tuple[Stack, int], ...] = (("encoder", model.encoder_layers), ("decoder", model.decoder_layers))
    for stack, layers in stacks:
        if 0 < layers < (lists := len(model.branch_pattern(stack))):
            yield f"model.{stack}_branches has {lists} lists for {layers} layers; only the first {layers} are used"
    if not model.is_decoder_only and objective.masked_prefix and objective.mlm_weight and not model.mlm_head:
        yield "objective.masked_prefix masks tokens that nothing predicts, since model.mlm_head=false"
    if model.has_mlm_head and objective.mlm_weight and not objective.masked_prefix:
        yield "model.mlm_head=true is never trained, since objective.masked_prefix=0"


def _nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return one_of([below, below + unit] if below else [unit])
