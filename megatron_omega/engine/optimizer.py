"""AdamW or Muon over parameter groups that the parameters themselves declare. Knows no model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_omega.config.schema import OptimizerConfig
from megatron_omega.engine.muon import Muon, is_matrix
from megatron_omega.parallel.parameters import Scales, describe
from megatron_omega.parallel.topology import Topology


def parameter_groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group parameters by their scales and by whether Muon moves them, in a fixed order.

    `lr_scale` is the factor on the scheduled rate. An orthogonal update is right at every width, so that Muon's rate is
    a fixed multiple of it, and its weight decay is not scaled.
    """
    groups: dict[tuple[bool, Scales], list[nn.Parameter]] = defaultdict(list)
    muon = Scales(learning_rate=config.muon_learning_rate / config.learning_rate)
    for parameter in parameters:
        info = describe(parameter)
        takes_muon = config.name == "muon" and is_matrix(info)
        groups[takes_muon, muon if takes_muon else info.scales].append(parameter)
    return [
        {
            "params": members,
            "lr_scale": scales.learning_rate,
            "weight_decay": config.weight_decay * scales.weight_decay,
            "eps": config.epsilon * scales.epsilon,
            "is_matrix": takes_muon,
        }
        for (takes_muon, scales), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    topology: Topology,
    *,
    device_type: str,
    clipper: Clipper | None = None,
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimizer, and one line for the log that says which implementation it is.

    `clipper` is given where no engine clips: the optimizer then does.
    """
    groups = parameter_groups(parameters, config)
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    if config.name == "muon":
        settings |= {"momentum": config.muon_momentum, "topology": topology}
        muon = ClippedMuon(groups, clipper=clipper, **settings) if clipper else Muon(groups, **settings)
        return muon, "Muon on hidden matrices, AdamW (torch, fused) on the rest"
    if clipper is not None:
        return ClippedAdamW(groups, clipper=clipper, **settings), "AdamW: torch, fused"
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


class Clipper:
    """Clips by the global gradient norm, and refuses gradients whose norm is not finite.

    For ZeRO stage 0, where DeepSpeed neither reports a norm nor skips. Gradients must be reduced already.
    """

    def __init__(self, topology: Topology, max_norm: float) -> None:
        self._tensor = topology.tensor
        self._max_norm = max_norm
        self.global_norm = 0.0
        self.skipped = False

    @torch.no_grad()
    def clip(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Scale the gradients of `groups`; return whether a step may be taken."""
        parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self.global_norm = self._norm(gradients)
        self.skipped = not math.isfinite(self.global_norm)
        if 0 < self._max_norm < self.global_norm and not self.skipped:
            for _, gradient in gradients:
                gradient.mul_(self._max_norm / (self.global_norm + 1e-6))
        return not self.skipped

    def _norm(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> float:
        """Replicated parameters count once, sharded ones on every tensor-parallel rank."""
        counted = [g for p, g in gradients if self._tensor.rank == 0 or describe(p).axis is not None]
        norms = torch.stack([gradient.float().square().sum() for gradient in counted])
        total = norms.sum()
        if self._tensor.size > 1:
            dist.all_reduce(total, group=self._tensor.handle)
        return math.sqrt(total.item()) if math.isfinite(total.item()) else math.nan


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips."""

    def __init__(self, groups: list[dict[str, Any]], *, clipper: Clipper, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._clipper = clipper

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._clipper.clip(self.param_groups):
            super().step()


class ClippedMuon(Muon):
    """Muon that clips."""

    def __init__(self, groups: list[dict[str, Any]], *, clipper: Clipper, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._clipper = clipper

    def step(self, closure: None = None) -> None:
        if self._clipper.clip(self.param_groups):
            super().step()
