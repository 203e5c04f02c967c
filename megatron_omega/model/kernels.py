"""Which implementation computes attention, norms and the gated activation: torch's own, or a CUDA library's if present.

apex, flash-attn and Liger are optional. They are looked for on CUDA only, and the choice is described for the log.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.parallel.layers import Norm
from megatron_omega.parallel.lean import rms_norm, swiglu

VariableLengthAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, tuple[int, int]], Tensor]
"""From q, k, v [tokens, branches, h, head_dim], int32 cumulative bounds of queries and of keys, the longest that
queries and keys can be, and how many keys before and after it a query sees (-1 = all), to what q attends, shaped so."""
HEAD_MULTIPLE = 8
"""Head sizes that flash kernels take are multiples of it; others are padded."""


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations."""

    norm: Norm = rms_norm
    gated_activation: Callable[[Tensor], Tensor] = swiglu
    variable_length_attention: VariableLengthAttention | None = None
    """On CUDA: flash-attn's where it is installed, else torch's (since 2.10). Takes bf16 and fp16."""
    choices: tuple[str, ...] = ("attention: torch SDPA", "norms: torch", "SwiGLU: torch")
    """One line per choice, for the log."""


PORTABLE = Kernels()


def select_kernels(device_type: str) -> Kernels:
    """Return the fastest implementations found for `device_type` ("cpu", "cuda")."""
    if device_type != "cuda":
        return PORTABLE
    pin_attention()
    norm, norm_choice = _norm()
    activation, activation_choice = _gated_activation()
    attention, attention_choice = _variable_length_attention()
    return Kernels(norm, activation, attention, (attention_choice, norm_choice, activation_choice))


def pin_attention() -> None:
    """Keep torch's masked attention off cuDNN, which torch prefers on an H100.

    Its backward pass gives NaN for lengths of 64 modulo 128 when a row's scores are all very low (torch 2.11 to 2.13,
    issue 196678): the axial branch's columns are such rows.
    """
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def apex_notice() -> str | None:
    """Say what is wrong with an installed package named apex that is not NVIDIA's; None where all is well."""
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return None
    if _import("apex.optimizers") is not None:
        return None
    return (
        f"the installed package apex {version} is not NVIDIA's apex (an unrelated project on the registry bears that "
        "name) and is ignored; uninstall it, and build NVIDIA's from source if you want its fused kernels"
    )


def _import(module: str) -> object | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _norm() -> tuple[Norm, str]:
    fused = getattr(_import("apex.normalization"), "fused_rms_norm_affine", None)
    if fused is None:
        has_kernel = hasattr(torch.ops.aten, "_fused_rms_norm")  # since torch 2.9; before, it is spelled out
        return (_torch_norm, "norms: torch, fused") if has_kernel else (rms_norm, "norms: torch")

    def apex_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return fused(hidden, weight, weight.shape, eps=epsilon)

    return apex_norm, "norms: apex fused RMSNorm"


def _torch_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def _gated_activation() -> tuple[Callable[[Tensor], Tensor], str]:
    function = getattr(_import("liger_kernel.ops.swiglu"), "LigerSiLUMulFunction", None)
    if function is None:
        return swiglu, "SwiGLU: torch"
    return (lambda gate_up: function.apply(*gate_up.chunk(2, dim=-1))), "SwiGLU: Liger"


def _variable_length_attention() -> tuple[VariableLengthAttention | None, str]:
    flash = getattr(_import("flash_attn"), "flash_attn_varlen_func", None)
    if flash is not None:
        return _variable_length(flash, "softmax_scale"), "attention: flash-attn for all but axial (SDPA without cuDNN)"
    function = getattr(_import("torch.nn.attention.varlen"), "varlen_attn", None)
    if function is None or "window_size" not in inspect.signature(function).parameters:
        return None, "attention: torch SDPA without cuDNN"
    return _variable_length(function, "scale"), "attention: torch varlen for all but axial (SDPA without cuDNN)"


def _variable_length(function: Callable[..., Tensor], scale: str) -> VariableLengthAttention:
    """Wrap a flash kernel: head sizes that it does not take are padded, with the scale kept; branches become heads.

    Its backward pass adds up in any order unless it is asked not to (training.deterministic).
    """
    can_repeat = "deterministic" in inspect.signature(function).parameters

    def attention(
        query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_bounds: Tensor,
        longest_query: int, longest_key: int, window: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        branches, head_dim = query.shape[1], query.shape[-1]
        if head_dim % HEAD_MULTIPLE:
            query, key, value = (F.pad(part, (0, -head_dim % HEAD_MULTIPLE)) for part in (query, key, value))
        options = {"window_size": window, scale: head_dim**-0.5}
        if can_repeat and torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        parts = (part.flatten(1, 2) for part in (query, key, value))
        attended = function(*parts, query_bounds, key_bounds, longest_query, longest_key, **options)
        return attended[..., :head_dim].unflatten(1, (branches, -1))

    return attention


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of [b, h, s, head_dim]; `mask` broadcasts to [b, h, s_q, s_k], True = attend.

    CUDA's fused masked kernels need a head size that is a multiple of 8: others are padded, with the scale kept.
    """
    head_dim = query.shape[-1]
    if not (query.is_cuda and mask is not None and head_dim % 8):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    pad = (0, -head_dim % 32)
    query, key, value = F.pad(query, pad), F.pad(key, pad), F.pad(value, pad)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head_dim**-0.5)
    return attended[..., :head_dim]
