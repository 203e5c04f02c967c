"""Contradictions of the layout: tensor-parallel shares, pipeline stages, ZeRO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import gcd

from megatron_omega.config.check.words import divisors, one_of
from megatron_omega.config.layout import num_pipeline_layers, num_stages
from megatron_omega.config.schema import RunConfig


def tensor_parallel(config: RunConfig) -> Iterator[str]:
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


def stages(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, num_pipeline_layers(config.model)
    stages = num_stages(config)
    pp = parallel.pipeline_parallel_size
    if parallel.pipeline_schedule != "1f1b" and pp == 1:
        yield (
            f"parallel.pipeline_schedule={parallel.pipeline_schedule} with parallel.pipeline_parallel_size=1; "
            "use 1f1b, or at least 2 pipeline stages"
        )
        return
    if (parallel.virtual_stages > 1) != (parallel.pipeline_schedule == "interleaved"):
        yield (
            f"parallel.virtual_stages={parallel.virtual_stages} with parallel.pipeline_schedule="
            f"{parallel.pipeline_schedule}; use interleaved with at least 2 virtual stages, or another schedule with 1"
        )
        return
    if stages > layers - 1:
        most = (layers - 1) // (stages // pp)
        virtual = f" x parallel.virtual_stages={parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
        yield (
            f"parallel.pipeline_parallel_size={pp}{virtual} cuts {layers} layers (embedding, bridge and heads counted) "
            f"into {stages} pieces; use at most {most}"
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


def zero(config: RunConfig, zero_stage: int) -> Iterator[str]:
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
