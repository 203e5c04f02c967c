"""Layers compiled by torch: one graph for each class of layer and kind of call, whatever the depth.

Compiled is what a layer computes from its facts. Outside stay the facts themselves, `full` recomputation, the engine's
hooks around a layer (ZeRO-3 gathers all weights of a layer before it is called), and the losses. Eager layers remain
the definition. Knows no run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics

from megatron_omega.model.layers import DecoderLayer, EncoderLayer

LAYERS: tuple[type[nn.Module], ...] = (EncoderLayer, DecoderLayer)


def compile_layers(model: nn.Module, *, backend: str = "inductor", refuse_breaks: bool = False) -> None:
    """Let torch.compile fuse what encoder and decoder layers compute. Nothing is compiled before the first call.

    `refuse_breaks`: a layer that cannot be one graph is an error, not several graphs.
    """
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            options: dict[str, Any] = {"backend": backend, "fullgraph": refuse_breaks, "dynamic": False}
            layer.compute = torch.compile(layer.compute, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


class Compilations:
    """What torch compiled since it was last asked."""

    def __init__(self) -> None:
        self._graphs = 0
        self._breaks = 0

    def new(self) -> list[str]:
        """Return the cause of every graph made, and of every break in one, since the last call."""
        graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
        made, self._graphs = graphs - self._graphs, graphs
        broken, self._breaks = sum(breaks.values()) - self._breaks, sum(breaks.values())
        known = get_compilation_metrics()[-made:] if made else []
        causes = [_cause(metrics) for metrics in known] or ["unknown"] * made
        return [*causes, *(f"a graph breaks: {reason}" for reason in list(breaks)[-broken:] if broken)]


def _cause(metrics: Any) -> str:
    reason = getattr(metrics, "recompile_reason", None)
    return " ".join(str(reason).split())[:400] if reason else "the first call of its kind"
