"""Matrix products, by oneDNN where that is faster.

On a CPU torch multiplies fp32 matrices by MKL, which uses AVX-512 on Intel's processors alone. oneDNN comes with torch
as well, and uses AVX-512 wherever it is: on AMD's it computes 2.3 times as fast. Elsewhere MKL is the faster one: by a
sixth to a third on Intel's, by a twentieth to a third on AMD's that have AVX2 alone. For fp32 torch offers oneDNN only
as an operator without a gradient, so our own functions, whose backward pass is written out, ask for it. A call takes
10 microseconds, so small products stay with torch.

In inference mode it is oneDNN on every processor: a row's result does not depend on how many rows there are (above
FEWEST_ROWS), so that texts that are read together give each row what it would have alone. MKL's does on Intel's below
sixteen rows, so where MKL trains, oneDNN takes small products of answers as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SMALLEST = 2**14
"""Elements of the right matrix from which oneDNN is the faster one."""
FEWEST_ROWS = 4
"""Of the left matrix. Below, torch's own kernels round differently from one number of rows to the next."""

PACKED_ROWS = 16
"""The number of rows that a packed matrix is laid out for; it multiplies any."""

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # builds of torch without oneDNN lack it
_ONEDNN = _linear.default if _linear is not None and torch.backends.mkldnn.is_available() else None


def mkl_is_faster(description: str) -> bool:
    """Tell from the text of /proc/cpuinfo whether MKL multiplies as fast as the processor can."""
    first = description.partition("\n\n")[0]
    return "GenuineIntel" in first or "avx512f" not in first.split()


def _description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: there torch has no MKL, but for Windows
        return ""


MKL_IS_FASTER = torch.backends.mkl.is_available() and mkl_is_faster(_description())
"""For products of many rows. By what the processor is and not by a measurement, which would choose differently from one
start to the next: runs resume to the last bit."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """[..., k], [n, k] -> left right^T [..., n]. No gradient is recorded where oneDNN computes it."""
    is_traced = torch.compiler.is_compiling()
    if not (_is_worth_a_call(left, right) if is_traced else is_for_onednn(left, right)):
        return F.linear(left, right)
    rows = left.reshape(-1, left.shape[-1])
    # Inductor takes the operator's second argument for a packed constant, and knows nothing of ours.
    found = torch.ops.megatron_omega.product(rows, right) if is_traced else by_onednn(rows, right)
    return found.view(*left.shape[:-1], -1)


def is_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Tell whether oneDNN computes left [..., k] right [n, k]^T, now."""
    if not MKL_IS_FASTER:
        return _is_worth_a_call(left, right)
    return torch.is_inference_mode_enabled() and _is_possible(left, right)


def _is_worth_a_call(left: Tensor, right: Tensor) -> bool:
    return _is_possible(left, right) and right.numel() >= SMALLEST


def _is_possible(left: Tensor, right: Tensor) -> bool:
    return onednn_takes(left) and onednn_takes(right) and left.numel() >= FEWEST_ROWS * left.shape[-1]


def onednn_takes(matrix: Tensor) -> bool:
    """Tell whether a matrix is of the kind that this module leaves to oneDNN: fp32, on a CPU."""
    return _ONEDNN is not None and matrix.device.type == "cpu" and matrix.dtype == torch.float32


def pack(right: Tensor) -> Tensor:
    """Copy a matrix [n, k] into the layout in which `by_onednn` reads it fastest, for few rows above all."""
    return torch.ops.mkldnn._reorder_linear_weight(right.detach().contiguous(), PACKED_ROWS)


def by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """[m, k], [n, k] which may be packed -> left right^T [m, n], on a CPU in fp32."""
    assert _ONEDNN is not None
    return _ONEDNN(_dense(left), right if right.is_mkldnn else _dense(right), None, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Other strides than those of a dense matrix or its transpose would take oneDNN's slowest way."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _by_either(left: Tensor, right: Tensor) -> Tensor:
    """Choose when a compiled layer runs: a trace cannot ask for the inference mode."""
    return by_onednn(left, right) if is_for_onednn(left, right) else torch.mm(left, right.t())


_library = torch.library.Library("megatron_omega", "DEF")
_library.define("product(Tensor left, Tensor right) -> Tensor")
_library.impl("product", _by_either, "CPU")


@torch.library.register_fake("megatron_omega::product")
def _shape(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


@register_flop_formula([one for one in (_linear, torch.ops.megatron_omega.product) if one is not None])
def _flops(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """Let torch's FlopCounterMode count it, as it counts torch's own products."""
    return 2 * left.numel() * right[0]
