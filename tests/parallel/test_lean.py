"""Functions with a written backward pass against autograd in fp64, in value and gradient; and what they keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_omega.parallel.lean import add_and_norm, gated_linear, linear, rms_norm, swiglu

EPSILON = 1e-3
Function = Callable[..., tuple[Tensor, ...]]


def spelled_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def spelled_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def spelled_add_and_norm(hidden: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = hidden + 0.25 * update
    return total, spelled_norm(total, weight)


CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "linear, columns": (
        lambda x, w: (linear(x, w, 15),),
        lambda x, w: (x @ w.flatten(0, -2).t(),),
        [(2, 7, 8), (3, 5, 8)],
    ),
    "linear, rows": (lambda x, w: (linear(x, w, 5),), lambda x, w: (x @ w.flatten(1).t(),), [(2, 7, 8), (5, 2, 4)]),
    "norm": (lambda x, w: (rms_norm(x, w, EPSILON),), lambda x, w: (spelled_norm(x, w),), [(2, 7, 8), (8,)]),
    "norm by head": (lambda x, w: (rms_norm(x, w, EPSILON),), lambda x, w: (spelled_norm(x, w),), [(2, 7, 8), (7, 8)]),
    "add and norm": (
        lambda x, u, w: add_and_norm(x, u, 0.25, w, EPSILON),
        spelled_add_and_norm,
        [(2, 7, 8), (2, 7, 8), (8,)],
    ),
    "swiglu": (lambda x: (swiglu(x),), lambda x: (spelled_swiglu(x),), [(2, 7, 12)]),
    "gated linear": (
        lambda x, w: (gated_linear(x, w),),
        lambda x, w: (spelled_swiglu(x) @ w.t(),),
        [(2, 7, 12), (5, 6)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    function, reference, shapes = CASES[name]
    arguments = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    found, expected = function(*arguments), reference(*arguments)
    weights = [torch.randn_like(value) for value in expected]
    gradients = [torch.autograd.grad(values, arguments, weights) for values in (found, expected)]
    for left, right in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        assert torch.allclose(left, right, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: function(*given), arguments)


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_nearer_to_fp64_than_its_format_is_fine(name: str) -> None:
    function, reference, shapes = CASES[name]
    exact = [torch.randn(shape).bfloat16().double().requires_grad_() for shape in shapes]
    coarse = [value.detach().bfloat16().requires_grad_() for value in exact]
    expected, found = reference(*exact), function(*coarse)
    sum(value.sum() for value in expected).backward()  # pyright: ignore[reportAttributeAccessIssue]
    sum(value.sum() for value in found).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for left, right in zip(coarse, exact, strict=True):
        assert left.grad is not None and right.grad is not None and left.grad.dtype == torch.bfloat16
        assert (left.grad.double() - right.grad).norm() < 0.02 * right.grad.norm()


def kept(run: Callable[[], object]) -> list[Tensor]:
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return tensors


def test_a_linear_layer_keeps_the_parameter_itself_and_not_a_view_of_it() -> None:
    """ZeRO-3 swaps `parameter.data` behind the layer's back: what was gathered must not live on in the graph."""
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.nn.Parameter(torch.randn(2, 5, 8))
    matrix = weight.detach().clone().flatten(0, 1)
    output = linear(hidden, weight, 10)
    storage = weakref.ref(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert storage() is None
    weight.data = matrix.view(2, 5, 8)  # gathered again for the backward pass
    (d_hidden,) = torch.autograd.grad(output, hidden, torch.ones_like(output))
    assert torch.allclose(d_hidden, matrix.sum(dim=0).expand_as(hidden))


def test_frozen_weights_keep_no_input() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    assert [tensor.shape for tensor in kept(lambda: linear(hidden, weight, 4))] == [weight.shape]


def test_the_gate_keeps_gate_and_up_only() -> None:
    gate_up = torch.randn(3, 12, requires_grad=True)
    assert [tensor.shape for tensor in kept(lambda: swiglu(gate_up))] == [gate_up.shape]
