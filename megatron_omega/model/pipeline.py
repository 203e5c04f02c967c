"""The same layer list, cut into pipeline stages: one or several for each rank, in turns, or two folded like a V.

Stages are cut where we say, as indices into the layer list. A layer of the list may be several DeepSpeed specs, because
a tied module may hold only the tied weight. Knows nothing of optimizers or data.
"""

from __future__ import annotations

import contextlib
import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_omega.config.layout import Layout
from megatron_omega.model.context import ModelContext
from megatron_omega.model.loss import LOSS_PARTS, PretrainingLoss
from megatron_omega.model.omega import ModuleRecipe, State, Step, flow, leave_flow, omega_layers
from megatron_omega.model.parametrization import table_scales
from megatron_omega.parallel.layers import TokenTable

_TABLE = "token_table"


def build_pipeline(
    context: ModelContext, layout: Layout, boundaries: Sequence[int], *, schedule: str = "1f1b"
) -> PipelineModule:
    """Build this rank's stages. Collective: every rank calls it.

    `boundaries` are the first layers of the stages after the first: pipeline - 1 of them; under `interleaved` a
    multiple of pipeline, less one, where rank r holds stages r, r + pipeline, ...; under `dualpipev`
    2 * pipeline - 1, where rank r holds stages r and 2 * pipeline - 1 - r.
    """
    specs, starts = _specs(context)
    cuts = [0, *(starts[boundary] for boundary in boundaries), len(specs)]
    grid = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
    pipeline_class = _SCHEDULES[schedule]
    with contextlib.redirect_stdout(io.StringIO()):  # the engine prints its layer table from every constructor
        return pipeline_class(context, layers=specs, topology=grid, partition_method=cuts)


def _specs(context: ModelContext) -> tuple[list[LayerSpec], list[int]]:
    """Return the DeepSpeed specs, and for each layer of the list (and its end) the index of its first spec."""
    recipes = omega_layers(context)
    specs = [_spec(module, context) for recipe in recipes for module in recipe.modules]
    return specs, [0, *accumulate(len(recipe.modules) for recipe in recipes)]


def _spec(recipe: ModuleRecipe, context: ModelContext) -> LayerSpec:
    if recipe.is_token_table:
        model = context.model
        return TiedLayerSpec(
            _TABLE, TokenTable, model.padded_vocab_size, model.hidden_size, forward_fn=recipe.apply,
            parallel=context.parallel, seed=context.seed, scales=table_scales(model),
        )  # fmt: skip
    return LayerSpec(_Layer, recipe)


class _Layer(Step):
    """One layer, built when DeepSpeed asks for it."""

    def __init__(self, recipe: ModuleRecipe) -> None:
        super().__init__(recipe.build(), recipe.apply)


class _OmegaPipeline(PipelineModule):
    """A PipelineModule with explicit cuts, one backward pass per layer, and the partial losses on every rank."""

    def __init__(self, context: ModelContext, **arguments: Any) -> None:
        loss = PretrainingLoss(context)
        super().__init__(loss_fn=partial(self._loss_of, loss), **arguments)
        self._loss = loss
        self._kernels = context.kernels

    def _loss_of(self, loss: PretrainingLoss, outputs: State, labels: State) -> Tensor:
        table = cast(nn.Module, self.tied_modules[_TABLE])
        return loss(outputs, labels, cast(Tensor, table.weight))

    @property
    def loss_parts(self) -> dict[str, Tensor]:
        """The two losses of the last micro-batch, apart; on the last stage only."""
        return self._loss.parts

    def get_additional_losses(self) -> dict[str, Tensor]:
        """Name the losses the engine carries to every rank beside the total."""
        return {name: self._loss.parts.get(name, torch.zeros(())) for name in LOSS_PARTS}

    def _partition_layers(self, method: Sequence[int]) -> None:
        stages = cast(int, self.num_stages)
        assert len(method) == stages + 1, f"{stages} stages need {stages + 1} cuts"
        self.parts = list(method)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def forward(self, forward_input: State) -> State:
        outputs = super().forward(flow(forward_input, self._kernels))
        return _join(leave_flow(outputs))


class _InTurns(_OmegaPipeline):
    """One or several stages per rank, dealt out in turns. One of them is shown at a time."""

    def _partition_layers(self, method: Sequence[int]) -> None:
        ranks = cast(int, self.num_stages)
        self.chunks, rest = divmod(len(method) - 1, ranks)
        assert self.chunks and not rest, f"{ranks} ranks cannot share {len(method) - 1} stages evenly"
        self.parts = list(method)
        self._chunk_bounds = list(pairwise(method))[self.stage_id :: ranks]
        self._set_bounds(*self._chunk_bounds[0])

    def stage_owner(self, layer_idx: int) -> int:
        """Return the pipeline rank that holds a layer."""
        return (bisect_right(self.parts, layer_idx) - 1) % cast(int, self.num_stages)

    def _build(self) -> None:
        self._chunk_functions: list[list[Callable[..., Any]]] = []
        for bounds in self._chunk_bounds:
            self._set_bounds(*bounds)
            self.forward_funcs = []
            super()._build()
            self._chunk_functions.append(self.forward_funcs)
        self.activate_chunk(0)

    def activate_chunk(self, chunk: int) -> None:
        """Let the forward pass be that of this rank's stage number `chunk`."""
        self.forward_funcs = self._chunk_functions[chunk]
        self._set_bounds(*self._chunk_bounds[chunk])


class _DualPipeV(DualPipeVModule, _OmegaPipeline):
    """Two stages per rank, folded like a V."""


_SCHEDULES = {"1f1b": _InTurns, "interleaved": _InTurns, "dualpipev": _DualPipeV}


def _join(outputs: State) -> State:
    """Let one backward pass serve several outputs.

    The engine calls backward once for every floating-point output, in order, and layers that lead to two of them would
    run backward twice. So all but the last leave as detached leaves, where their gradients wait for the last one's.
    """
    floats = [index for index, output in enumerate(outputs) if output.requires_grad]
    if len(floats) < 2:
        return outputs
    joined = list(outputs)
    for index in floats[:-1]:
        joined[index] = outputs[index].detach().requires_grad_()
    leaves = [joined[index] for index in floats[:-1]]
    joined[floats[-1]] = _Join.apply(leaves, outputs[floats[-1]], *(outputs[index] for index in floats[:-1]))
    return tuple(joined)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, leaves: list[Tensor], last: Tensor, *_: Tensor) -> Tensor:
        context.leaves = leaves
        return last.view_as(last)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient, *(leaf.grad for leaf in context.leaves)
