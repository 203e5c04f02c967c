"""Bytes a rank hands to its process groups in one optimizer step: tensor axis, other stages, replicas, tied table.

Bytes are those of the full tensor of each call, as the layers, DeepSpeed 0.19's pipeline and its ZeRO optimizers make
them; the norms, losses and token counts that the engine reduces, a few numbers each, are left out. A single replica
reduces to itself: the call is counted, nothing is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_omega.accounting import inner_size, stack_kinds, stack_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.activations import FP32, Shape
from megatron_omega.planner.candidates import Candidate
from megatron_omega.planner.memory import LIVE_PARAMETERS
from megatron_omega.planner.orthogonal import exchanged_bytes, moved_matrices
from megatron_omega.planner.stages import Stage
from megatron_omega.planner.work import Work, pipeline_messages, table_parameters

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole between steps (stage3_param_persistence_threshold)."""


def step_bytes(
    config: RunConfig,
    candidate: Candidate,
    stages: Sequence[Stage],
    works: Mapping[str, Work],
    rank: int,
    micro_batches: int,
) -> Counter[str]:
    """Return bytes by kind of call ("all_reduce", "all_gather", "reduce_scatter", "send"; Muon's
    "reduce" and "broadcast") of pipeline rank `rank`."""
    mine = [(index, stages[index]) for index in candidate.stages_of(rank)]
    total: Counter[str] = Counter()
    for index, stage in mine:
        for message, count in stage.messages(config, works).items():
            total[message.kind] += message.num_bytes * count * micro_batches
        if index + 1 < len(stages) and index + 1 not in dict(mine):
            forward = pipeline_messages(config, stage.kinds[-1], stages[index + 1].kinds[0])[0]
            total["send"] += sum(forward) * micro_batches
        if index and index - 1 not in dict(mine):
            backward = pipeline_messages(config, stages[index - 1].kinds[-1], stage.kinds[0])[1]
            total["send"] += sum(backward) * micro_batches
    table = table_parameters(config) if any(stage.has_table for _, stage in mine) else 0
    parameters = table + sum(stage.parameters(config, works) for _, stage in mine)
    kept = sum(persistent_parameters(config, stage, works) for _, stage in mine)
    total += data_bytes(config, candidate, parameters, micro_batches, persistent=kept)
    if table and len(tied_ranks(candidate, stages)) > 1:
        total["all_reduce"] += table * FP32
    total += exchanged_bytes(candidate, moved_matrices(config, [stage for _, stage in mine]))
    return +total


def data_bytes(
    config: RunConfig, candidate: Candidate, parameters: int, micro_batches: int, *, persistent: int = 0
) -> Counter[str]:
    """Return what replicas exchange in a step by kind of call, for `parameters` local parameters.

    Stages 0 and 1 reduce gradients once (bf16 in fp32), stage 2 at every micro-batch, stage 3 scatters them there.
    Stages 1 and 2 gather the new weights once; stage 3 for every micro-batch, forward and backward apart where not all
    may stay alive in between, but only once what it keeps whole (`persistent` parameters).
    """
    element, stage = Shape.of(config).element, candidate.zero_stage
    in_fp32 = stage <= 1 and config.precision.dtype == "bf16"
    gradients, weights = (FP32 if in_fp32 else element) * parameters, element * parameters
    total: Counter[str] = Counter()
    if stage < 3:
        total["all_reduce"] = gradients * (micro_batches if stage == 2 else 1)
    else:
        total["reduce_scatter"] = gradients * micro_batches
    if stage and candidate.data > 1:
        passes = micro_batches * (1 if parameters <= LIVE_PARAMETERS else 2) if stage == 3 else 1
        total["all_gather"] = passes * weights - (passes - 1) * persistent * element
    return total


def tied_ranks(candidate: Candidate, stages: Sequence[Stage]) -> list[int]:
    """Return the pipeline ranks that hold the token table."""
    ranks = range(candidate.pipeline)
    return [rank for rank in ranks if any(stages[s].has_table for s in candidate.stages_of(rank))]


def persistent_parameters(config: RunConfig, stage: Stage, works: Mapping[str, Work]) -> int:
    """Return the local parameters of `stage` in tensors of at most `PERSISTENT` elements."""
    table = table_parameters(config) if stage.has_table else 0
    large = (size for kind, count in stage.counts.items() for size in count * _matrices(config, kind))
    return stage.parameters(config, works) + table * (table <= PERSISTENT) - sum(s for s in large if s > PERSISTENT)


def _matrices(config: RunConfig, kind: str) -> list[int]:
    """Return the elements of each matrix of a layer on one rank."""
    model, tp = config.model, config.parallel.tensor_parallel_size
    d, inner = model.hidden_size, inner_size(model) // tp
    stack = stack_of(kind)
    if stack != "encoder" and stack != "decoder":
        return [d * d] if kind == "head" and model.has_mlm_head else []
    columns = inner * len(stack_kinds(model, stack)[kind])
    feed_forward = [2 * d * model.ffn_hidden_size // tp, d * model.ffn_hidden_size // tp]
    cross = [inner * d, 2 * inner * d, inner * d] if stack == "decoder" and not model.is_decoder_only else []
    return [3 * columns * d, columns * d, *feed_forward, *cross]
