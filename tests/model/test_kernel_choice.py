"""Optional CUDA libraries are picked up where they are installed, only on CUDA, and the choice is said."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_omega.config.layout import Layout
from megatron_omega.config.schema import ModelConfig, OptimizerConfig
from megatron_omega.engine.optimizer import build_optimizer
from megatron_omega.model import kernels
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import build_norm
from megatron_omega.parallel.lean import rms_norm, swiglu
from megatron_omega.parallel.parameters import declare_parameter
from megatron_omega.parallel.tensor_parallel import SERIAL
from megatron_omega.parallel.topology import create_topology


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Put a module of that name, and its parents, where imports look first."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            package = ModuleType(path)
            package.__path__ = []  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setitem(sys.modules, path, package)
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)


def test_without_libraries_torch_is_chosen_and_said() -> None:
    assert kernels.select_kernels("cpu") is kernels.PORTABLE
    chosen = kernels.select_kernels("cuda")
    assert chosen.gated_activation is swiglu
    assert (chosen.variable_length_attention is None) == ("varlen" not in chosen.choices[0])
    hidden, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.allclose(chosen.norm(hidden, weight, 1e-6), rms_norm(hidden, weight, 1e-6), atol=1e-6)
    assert all("torch" in choice for choice in chosen.choices)


def test_libraries_are_used_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(hidden: torch.Tensor, weight: torch.Tensor, shape: Any, eps: float) -> torch.Tensor:
        return 7 * hidden

    class Multiply:
        @staticmethod
        def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return gate + up

    def attention(query: torch.Tensor, *_: object, window_size: tuple[int, int], softmax_scale: float) -> torch.Tensor:
        assert query.shape == (5, 6, 24) and window_size == (7, 0) and softmax_scale == 20**-0.5
        return query

    install(monkeypatch, "apex.normalization", fused_rms_norm_affine=fused)
    install(monkeypatch, "liger_kernel.ops.swiglu", LigerSiLUMulFunction=Multiply)
    install(monkeypatch, "flash_attn", flash_attn_varlen_func=attention)
    assert kernels.select_kernels("cpu") is kernels.PORTABLE
    chosen = kernels.select_kernels("cuda")
    ones = torch.ones(2, 4)
    assert torch.equal(chosen.norm(ones, torch.ones(4), 1e-6), 7 * ones)
    assert torch.equal(chosen.gated_activation(ones), torch.full((2, 2), 2.0))
    query, bounds = torch.randn(5, 3, 2, 20), torch.tensor([0, 5])
    assert chosen.variable_length_attention is not None
    attended = chosen.variable_length_attention(query, query, query, bounds, bounds, 5, 5, (7, 0))
    assert torch.equal(attended, query), "padded to a multiple of 8 for the kernel, and cut again"
    layer = build_norm("test", ModelContext(ModelConfig(hidden_size=4, num_attention_heads=2), kernels=chosen))
    assert torch.equal(layer(ones), 7 * ones)
    assert [choice.split(":")[1].split()[0] for choice in chosen.choices] == ["flash-attn", "apex", "Liger"]


def test_apex_adam_is_used_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedAdam(torch.optim.Adam):
        def __init__(self, groups: Any, *, adam_w_mode: bool, **settings: Any) -> None:
            super().__init__(groups, **settings)

    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    parameter = declare_parameter("a", (2,), parallel=SERIAL, seed=0, std=1.0)
    on_gpu, choice = build_optimizer([parameter], OptimizerConfig(), create_topology(Layout()), device_type="cuda")
    on_cpu, _ = build_optimizer([parameter], OptimizerConfig(), create_topology(Layout()), device_type="cpu")
    assert isinstance(on_gpu, FusedAdam) and "apex" in choice and not isinstance(on_cpu, FusedAdam)


def test_another_package_called_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.apex_notice() is None
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"apex": "0.9.10"}[name])
    notice = kernels.apex_notice()
    assert notice is not None and "0.9.10" in notice and "not NVIDIA's" in notice
    install(monkeypatch, "apex.optimizers")
    assert kernels.apex_notice() is None


def test_attention_keeps_off_cudnn_and_repeats_itself_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def attention(query: torch.Tensor, *_: object, deterministic: bool = False, **__: object) -> torch.Tensor:
        asked.append(deterministic)
        return query

    install(monkeypatch, "flash_attn", flash_attn_varlen_func=attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        chosen = kernels.select_kernels("cuda").variable_length_attention
        assert not torch.backends.cuda.cudnn_sdp_enabled() and chosen is not None
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    query, bounds = torch.randn(5, 1, 2, 16), torch.tensor([0, 5])
    for is_repeatable in (False, True):
        with torch.random.fork_rng():
            torch.use_deterministic_algorithms(is_repeatable)
            chosen(query, query, query, bounds, bounds, 5, 5, (-1, -1))
            torch.use_deterministic_algorithms(mode=False)
    assert asked == [False, True]
