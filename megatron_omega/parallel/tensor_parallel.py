"""The conjugate collectives of tensor parallelism, each the backward of another.

    forward                                backward                   where
    -------------------------------------  -------------------------  -------------------------------------
    enter: copy                            all-reduce                 before a column-parallel layer
    leave: all-reduce                      copy                       after a row-parallel layer
    enter, sequence-parallel: all-gather   reduce-scatter             before a column-parallel layer
    leave, sequence-parallel: red.-scatter all-gather                 after a row-parallel layer
    share_gradient: copy                   divide by the group size   a replicated use of a tensor whose
                                                                      gradient is kept as partial sums

Between `enter` and `leave` a tensor is inside the tensor-parallel region: every rank holds its own part of the
features of all tokens. Outside it every rank holds all features of all tokens or, under Megatron sequence
parallelism (arXiv 2205.05198), all features of its own part of the tokens. Inputs are never changed in place, but one:
`leave` adds up in the partial sum it is given, which its maker has no more use for (autograd sees to that).
Megatron-LM's tensor parallelism: arXiv 1909.08053.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE_DIM = 1  # of [b, s, d]

# torch 2.13 renamed both; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TensorParallel:
    """What a layer needs to know of the ranks that share it: the group, its own place, how it talks to them."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False

    def enter(self, hidden: Tensor) -> Tensor:
        """Bring `hidden` [b, s or s/tp, d] into the tensor-parallel region: [b, s, d]."""
        if self.size == 1:
            return hidden
        return _Gather.apply(hidden, self) if self.sequence_parallel else _Copy.apply(hidden, self)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum the ranks' partial results [b, s, d]; returns [b, s, d], or [b, s/tp, d] under sequence parallelism.

        Without sequence parallelism `partial` itself becomes the sum.
        """
        if self.size == 1:
            return partial
        return _ReduceScatter.apply(partial, self) if self.sequence_parallel else _Reduce.apply(partial, self)

    def gather(self, hidden: Tensor) -> Tensor:
        """Return all tokens of what each rank holds a part of: [b, s/tp, d] -> [b, s, d]. Outside autograd."""
        return _all_gather(hidden, self)

    def start_leaving(self, partial: Tensor) -> Callable[[], Tensor]:
        """Start to sum the ranks' partial results, which may be overwritten; the result is there when called for.

        Outside autograd. [b, s, d], or [b, s/tp, d] under sequence parallelism.
        """
        if torch.compiler.is_compiling():  # there a message is an operation like others, and torch orders them
            total = _reduce_scatter(partial, self) if self.sequence_parallel else _all_reduce(partial, self)
            return lambda: total
        if self.sequence_parallel:
            parts, part = _scattered(partial, self)
            return _Arriving(_reduce_scatter_single(part, parts, group=self.group, async_op=True), (part, parts))
        return _Arriving(dist.all_reduce(partial, group=self.group, async_op=True), (partial,))

    def copy(self, tensor: Tensor) -> Tensor:
        """Use a replicated tensor inside the region: its gradient is summed over the ranks."""
        return tensor if self.size == 1 else _Copy.apply(tensor, self)

    def share_gradient(self, tensor: Tensor) -> Tensor:
        """Use, on every rank alike, a tensor whose gradient the ranks sum later: each contributes its share."""
        return tensor if self.size == 1 else _ShareGradient.apply(tensor, self)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place, outside autograd."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def shard(self, total: int) -> tuple[int, int]:
        """Return this rank's half-open range of `total` items; sizes differ by at most one.

        >>> [TensorParallel(None, rank, 3).shard(8) for rank in range(3)]
        [(0, 2), (2, 5), (5, 8)]
        """
        return total * self.rank // self.size, total * (self.rank + 1) // self.size


SERIAL = TensorParallel()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, parallel: TensorParallel) -> Tensor:
        context.parallel = parallel
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, context.parallel), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, parallel: TensorParallel) -> Tensor:
        if torch.compiler.is_compiling() or tensor.is_leaf or tensor._is_view() or not tensor.is_contiguous():
            return _all_reduce(tensor, parallel)
        context.mark_dirty(tensor)
        dist.all_reduce(tensor, group=parallel.group)
        return tensor

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, parallel: TensorParallel) -> Tensor:
        context.parallel = parallel
        return _all_gather(tensor, parallel)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient, context.parallel), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, parallel: TensorParallel) -> Tensor:
        context.parallel = parallel
        return _reduce_scatter(tensor, parallel)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, context.parallel), None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, parallel: TensorParallel) -> Tensor:
        context.parallel = parallel
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / context.parallel.size, None


def _all_reduce(tensor: Tensor, parallel: TensorParallel) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=parallel.group)
    return total


def _all_gather(tensor: Tensor, parallel: TensorParallel) -> Tensor:
    gathered = tensor.new_empty((parallel.size * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_single(gathered, tensor.contiguous(), group=parallel.group)
    parts = gathered.unflatten(0, (parallel.size, -1))  # [tp, b, s/tp, d]
    return parts.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1)


def _reduce_scatter(tensor: Tensor, parallel: TensorParallel) -> Tensor:
    parts, part = _scattered(tensor, parallel)
    _reduce_scatter_single(part, parts, group=parallel.group)
    return part


def _scattered(tensor: Tensor, parallel: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return the tensor with each rank's part in one piece, and room for one."""
    parts = tensor.unflatten(SEQUENCE_DIM, (parallel.size, -1)).movedim(SEQUENCE_DIM, 0).flatten(0, 1)  # [tp * b, ...]
    return parts.contiguous(), parts.new_empty((tensor.shape[0], *parts.shape[1:]))


@dataclass(frozen=True)
class _Arriving:
    """A collective under way, with the tensors it works on."""

    work: Any
    tensors: tuple[Tensor, ...]

    def __call__(self) -> Tensor:
        """Wait; return the first of the tensors."""
        self.work.wait()
        return self.tensors[0]
