"""How the run is laid out over processes: the section `parallel`."""

from __future__ import annotations

from typing import Literal

from megatron_omega.config.schema.base import NonNegative, Positive, Section


class ParallelConfig(Section):
    """The layout. data_parallel_size is what remains of the number of processes."""

    tensor_parallel_size: Positive = 1
    """Ranks that share each layer (adjacent ranks)."""
    pipeline_parallel_size: Positive = 1
    """Stages that share the layer list."""
    sequence_parallel: bool = False
    """Shard the residual stream along the sequence between tensor-parallel ranks (Megatron sequence parallelism)."""
    pipeline_schedule: Literal["1f1b", "interleaved", "dualpipev"] = "1f1b"
    """1f1b; interleaved: rank r holds virtual_stages stages, r, r+P, ...; dualpipev: stages r and 2P-1-r of 2P."""
    virtual_stages: Positive = 1
    """Stages that each rank holds under pipeline_schedule: interleaved."""
    stage_boundaries: tuple[NonNegative, ...] | None = None
    """First layer of every stage after the first, as indices into the layer list; cut by cost if it is not given."""
    recompute: Literal["none", "swiglu", "ffn", "full"] = "full"
    """Activations computed again in the backward pass: none; swiglu (gate, up are kept); the FFN; the whole layer."""
    timeout_seconds: Positive = 1800
    """How long a collective may wait before the run is ended."""
