"""AdamW over parameter groups that the parameters themselves declare. Knows no model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_omega.config.schema import OptimizerConfig
from megatron_omega.parallel.parameters import Scales, describe
from megatron_omega.parallel.topology import Topology


def parameter_groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group parameters by their scales, in a fixed order. The scale of the learning rate is kept as `lr_scale`."""
    groups: dict[Scales, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[describe(parameter).scales].append(parameter)
    return [
        {
            "params": members,
            "lr_scale": scales.learning_rate,
            "weight_decay": config.weight_decay * scales.weight_decay,
            "eps": config.epsilon * scales.epsilon,
        }
        for scales, members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, device_type: str, clip: Topology | None = None
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimizer, and one line for the log that says which implementation it is.

    `clip` is given where no engine clips: the optimizer then clips by the global norm over that topology, itself.
    """
    groups = parameter_groups(parameters, config)
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    if clip is not None:
        return ClippedAdamW(groups, topology=clip, max_norm=config.gradient_clipping, **settings), "AdamW: torch, fused"
    apex = _apex_adam() if device_type == "cuda" else None
    if apex is not None:
        return apex(groups, adam_w_mode=True, **settings), "AdamW: apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **settings), "AdamW: torch, fused"


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def _apex_adam() -> Any | None:
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global gradient norm, and skips a step whose norm is not finite.

    For ZeRO stage 0, where DeepSpeed neither reports a norm nor skips. Gradients must be reduced already.
    """

    def __init__(self, groups: list[dict[str, Any]], *, topology: Topology, max_norm: float, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._topology = topology
        self._max_norm = max_norm
        self.global_norm = 0.0
        self.skipped = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [
            (parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self.global_norm = self._norm(gradients)
        self.skipped = not math.isfinite(self.global_norm)
        if self.skipped:
            return
        if 0 < self._max_norm < self.global_norm:
            for _, gradient in gradients:
                gradient.mul_(self._max_norm / (self.global_norm + 1e-6))
        super().step()

    def _norm(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> float:
        """Replicated parameters count once, sharded ones on every tensor-parallel rank."""
        tensor = self._topology.tensor
        counted = [g for p, g in gradients if tensor.rank == 0 or describe(p).axis is not None]
        norms = torch.stack([gradient.float().square().sum() for gradient in counted])
        total = norms.sum()
        if tensor.size > 1:
            dist.all_reduce(total, group=tensor.handle)
        return math.sqrt(total.item()) if math.isfinite(total.item()) else math.nan
