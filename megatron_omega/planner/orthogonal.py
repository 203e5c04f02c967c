"""What Muon asks of a rank in a step: matrices without a second moment, gathered, made orthogonal and handed back.

Follows `engine/muon.py`. Which replica computes which matrix is taken to be even.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_omega.accounting import inner_size, stack_kinds, stack_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.activations import FP32
from megatron_omega.planner.candidates import Candidate
from megatron_omega.planner.stages import Stage

STEPS = 5
"""Of the iteration: in each the Gram matrix, its square, and the product with it."""


class Matrices(NamedTuple):
    """`count` matrices of one shape."""

    rows: int
    columns: int
    count: int = 1
    is_sharded: bool = True

    @property
    def elements(self) -> int:
        return self.rows * self.columns * self.count


def moved_matrices(config: RunConfig, stages: Sequence[Stage]) -> list[Matrices]:
    """Return the whole matrices that Muon moves in `stages`; none with another optimizer."""
    if config.optimizer.name != "muon":
        return []
    return [matrix for stage in stages for kind in stage.kinds for matrix in _of_layer(config, kind)]


def _of_layer(config: RunConfig, kind: str) -> Iterator[Matrices]:
    model, stack = config.model, stack_of(kind)
    d, inner, ffn = model.hidden_size, inner_size(model), model.ffn_hidden_size
    if stack == "head" and model.has_mlm_head:
        yield Matrices(d, d, is_sharded=False)
    if stack != "encoder" and stack != "decoder":
        return
    modules = len(stack_kinds(model, stack)[kind]) + (stack == "decoder" and not model.is_decoder_only)
    yield Matrices(inner, d, 3 * modules)
    yield Matrices(d, inner, modules)
    yield Matrices(ffn, d, 2)
    yield Matrices(d, ffn)


def moved_parameters(matrices: Sequence[Matrices], tensor: int) -> int:
    """Return the local parameters of `matrices`."""
    return sum(matrix.elements // (tensor if matrix.is_sharded else 1) for matrix in matrices)


def exchanged_bytes(candidate: Candidate, matrices: Sequence[Matrices]) -> Counter[str]:
    """Return bytes by kind of call: parts to the replica that computes, slices joined there, the update to all."""
    local, data = moved_parameters(matrices, candidate.tensor), candidate.data
    total: Counter[str] = Counter()
    if data > 1:
        total["broadcast"] = local * FP32
        total["reduce"] = local * FP32 if candidate.zero_stage else 0
    if candidate.tensor > 1:
        total["all_reduce"] = sum(matrix.elements for matrix in matrices if matrix.is_sharded) * FP32 // data
    return +total
