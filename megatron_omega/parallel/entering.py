"""Products that enter the tensor-parallel region: the message of their backward pass runs while weights' gradients are
computed.

    forward     Y_i = X W_i^T, after an all-gather of X under sequence parallelism
    backward    dX = sum_i dY_i W_i         posted: all-reduce, or reduce-scatter, of dX
                dW_i = dY_i^T X             meanwhile
                                            awaited: dX

Several weights that take in the same hidden states share one message. A compiled layer has no message beside what it
computes: there torch orders both. Overlap of this kind: arXiv 2205.05198, section 4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from megatron_omega.parallel.products import product
from megatron_omega.parallel.tensor_parallel import TensorParallel


def enter_products(hidden: Tensor, parallel: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return X W^T for each weight, whose last axis is the input: [b, s or s/tp, in] outside -> [b, s, out/tp] each."""
    return _Products.apply(hidden, parallel, *weights)  # pyright: ignore[reportReturnType]


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(-1, weight.shape[-1])


class _Products(Function):
    @staticmethod
    def forward(context: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Without gradients torch's tracer compares the number of arguments with that of names here, and leaves out the
        # context if they match; with names for some of the arguments it would for two weights.
        hidden, parallel, *weights = arguments
        context.parallel = parallel
        entered = parallel.gather(hidden) if parallel.sequence_parallel else hidden
        context.save_for_backward(entered, *weights)
        return tuple(product(entered, _matrix(weight)) for weight in weights)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entered, *weights = context.saved_tensors
        d_hidden = product(gradients[0], _matrix(weights[0]).t())
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            d_hidden += product(gradient, _matrix(weight).t())
        arriving = context.parallel.start_leaving(d_hidden)
        inputs = entered.flatten(0, -2).t()
        is_needed = context.needs_input_grad[2:]  # a frozen weight has no gradient
        d_weights = [
            product(gradient.flatten(0, -2).t(), inputs).view(weight.shape) if needed else None
            for gradient, weight, needed in zip(gradients, weights, is_needed, strict=True)
        ]
        return arriving(), None, *d_weights
