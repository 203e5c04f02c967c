"""GPT-Omega: the layer list, and its execution in order.

The public model card fixes width 960, feed-forward width 16,384, 96 layers, 48 heads, 11.9 billion parameters, an
encoder and a decoder, and names the parts. It does not say how they combine. That here are 96 encoder and 96 decoder
layers, a gated feed-forward block, four attention modules in each layer (the decoder's fourth is cross-attention) and
one tied token table is an inference: the reading under which the parts add up to the card's total, 11,934,059,264.

`omega_layers` returns the recipe of every layer. What passes from one to the next is a flat tuple of tensors, floats
first, so that the same list runs here in order and in `model.pipeline` across stages:

    encoder   (hidden [b,s_e,d], encoder segments [b,s_e], decoder ids [b,s_d], decoder segments [b,s_d])
    decoder   (memory [b,s_e,d], hidden [b,s_d,d], encoder segments, decoder segments); decoder-only (hidden, segments)
    output    (decoder hidden,) or (decoder hidden, encoder hidden, MLM bias), ready for the tied table

While the layers of one stage run, segments are `Stream`s, which keep what the layers' facts are made of: `flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from megatron_omega.model.adapters import with_adapters
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import Kernels
from megatron_omega.model.layers import DecoderLayer, EncoderLayer, EncoderNorm, Head
from megatron_omega.model.loss import PretrainingLoss, VocabularyHeads
from megatron_omega.model.parametrization import table_scales
from megatron_omega.model.stream import Stream
from megatron_omega.parallel.layers import TokenTable

State = tuple[Tensor, ...]
"""What travels between stages."""
Flow = tuple[Any, ...]
"""What travels between the layers of one stage: a `State` whose segments are `Stream`s."""


@dataclass(frozen=True)
class ModuleRecipe:
    """How to build one module, and how it acts on what travels between layers."""

    build: Callable[[], nn.Module]
    apply: Callable[[nn.Module, Flow], Flow]
    is_token_table: bool = False


@dataclass(frozen=True)
class LayerRecipe:
    """One entry of the layer list: the unit that pipeline stages are cut between."""

    name: str
    modules: tuple[ModuleRecipe, ...]


class Step(nn.Module):
    """A built module with its place in the flow."""

    def __init__(self, module: nn.Module, apply: Callable[[nn.Module, Flow], Flow]) -> None:
        super().__init__()
        self.module = module
        self._apply_to = apply

    def forward(self, state: Flow) -> Flow:
        return self._apply_to(self.module, state)


def flow(state: State, kernels: Kernels) -> Flow:
    """Turn what a stage receives into what its layers take: integers that follow floats or ids become streams."""
    if len(state) == 2:
        return state[0], Stream(state[1], kernels)
    first, second, third, fourth = state
    if second.is_floating_point():
        return first, second, Stream(third, kernels), Stream(fourth, kernels)
    return first, Stream(second, kernels), third, Stream(fourth, kernels)


def leave_flow(state: Flow) -> State:
    """Turn what the last layer of a stage returns into what the next stage receives."""
    return tuple(part.segments if isinstance(part, Stream) else part for part in state)


def build_token_table(context: ModelContext) -> TokenTable:
    """Build the table that the input, the bridge and both heads share."""
    model = context.model
    return TokenTable(
        model.padded_vocab_size, model.hidden_size, parallel=context.parallel, seed=context.seed,
        scales=table_scales(model),
    )  # fmt: skip


def omega_layers(context: ModelContext) -> list[LayerRecipe]:
    """Return the recipe of every layer, from token ids to what the loss takes."""
    encoder = [] if context.model.is_decoder_only else _encoder_recipes(context)
    head = LayerRecipe("head", (ModuleRecipe(lambda: Head("head", context), _apply_head),))
    output = _table("output", context, lambda _, state: state)
    return [_table("embedding", context, _on_first), *encoder, *_decoder_recipes(context), head, output]


def _encoder_recipes(context: ModelContext) -> list[LayerRecipe]:
    norm = ModuleRecipe(lambda: EncoderNorm("encoder.norm", context), _on_first)
    embed = _table("bridge", context, _embed_decoder).modules
    layers = [
        LayerRecipe(name, (ModuleRecipe(_encoder_builder(name, index, context), _apply_encoder),))
        for index, name in enumerate(_names("encoder", context.model.encoder_layers))
    ]
    return [*layers, LayerRecipe("bridge", (norm, *embed))]


def _decoder_recipes(context: ModelContext) -> list[LayerRecipe]:
    count = context.model.decoder_layers
    layers = []
    for index, name in enumerate(_names("decoder", count)):
        # A float tensor that no later layer uses would travel on without a gradient, which the pipeline refuses.
        drops_memory = index == count - 1 and not context.model.has_mlm_head
        apply = _apply_last_decoder if drops_memory else _apply_decoder
        layers.append(LayerRecipe(name, (ModuleRecipe(_decoder_builder(name, index, context), apply),)))
    return layers


def _names(stack: str, count: int) -> list[str]:
    return [f"{stack}.layers.{index}" for index in range(count)]


def _encoder_builder(name: str, index: int, context: ModelContext) -> Callable[[], nn.Module]:
    length = context.encoder_seq_length if _adds_positions(index, context) else None
    branches = context.model.layer_branches("encoder", index)
    return lambda: with_adapters(EncoderLayer(name, context, branches, max_positions=length), context)


def _decoder_builder(name: str, index: int, context: ModelContext) -> Callable[[], nn.Module]:
    length = context.decoder_seq_length if _adds_positions(index, context) else None
    branches = context.model.layer_branches("decoder", index)
    return lambda: with_adapters(DecoderLayer(name, context, branches, max_positions=length), context)


def _adds_positions(index: int, context: ModelContext) -> bool:
    return index == 0 and context.model.positions != "rotary"


def _table(name: str, context: ModelContext, apply: Callable[[nn.Module, Flow], Flow]) -> LayerRecipe:
    return LayerRecipe(name, (ModuleRecipe(lambda: build_token_table(context), apply, is_token_table=True),))


def _on_first(module: nn.Module, state: Flow) -> Flow:
    first, *rest = state
    return (module(first), *rest)


def _embed_decoder(table: nn.Module, state: Flow) -> Flow:
    memory, encoder_stream, decoder_ids, decoder_stream = state
    return memory, table(decoder_ids), encoder_stream, decoder_stream


def _apply_encoder(layer: nn.Module, state: Flow) -> Flow:
    hidden, encoder_stream, *decoder = state
    return layer(hidden, encoder_stream), encoder_stream, *decoder


def _apply_decoder(layer: nn.Module, state: Flow) -> Flow:
    if len(state) == 2:
        hidden, stream = state
        return layer(hidden, stream), stream
    memory, hidden, encoder_stream, decoder_stream = state
    return memory, layer(hidden, decoder_stream, memory, encoder_stream), encoder_stream, decoder_stream


def _apply_last_decoder(layer: nn.Module, state: Flow) -> Flow:
    state = _apply_decoder(layer, state)
    return state if len(state) == 2 else (state[1], state[3])


def _apply_head(head: nn.Module, state: Flow) -> Flow:
    if len(state) == 2:
        return head(state[0])
    memory, hidden, *_ = state
    return head(hidden, memory)


class Omega(nn.Module):
    """The whole model in one process (or one tensor-parallel group): the layer list, run in order."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.context = context
        self.table = build_token_table(context)
        recipes = omega_layers(context)
        self.names = [recipe.name for recipe in recipes for _ in recipe.modules]
        self.steps = nn.ModuleList(
            Step(self.table if module.is_token_table else module.build(), module.apply)
            for recipe in recipes
            for module in recipe.modules
        )
        self.heads = VocabularyHeads(self.table.weight, PretrainingLoss(context))

    @property
    def loss_parts(self) -> dict[str, Tensor]:
        """The two losses of the last forward pass, apart."""
        return self.heads.loss.parts

    def forward(self, inputs: State, labels: State) -> Tensor:
        """Return the loss. inputs: (encoder ids, encoder segments, decoder ids, decoder segments), or the last two."""
        return self.heads(self.hidden(inputs), labels)

    def hidden(self, inputs: State) -> State:
        """Return what the tied table turns into logits."""
        state = flow(inputs, self.context.kernels)
        for step in self.steps:
            state = step(state)
        return state

    def module_named(self, name: str) -> nn.Module:
        """Return the (first) module of the layer called `name`."""
        return cast(Step, self.steps[self.names.index(name)]).module


def vocabulary_logits(model: Omega, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the fp32 logits of hidden states that a head has finished: [..., d] -> [..., vocab_size]."""
    size = model.context.model.vocab_size
    logits = (hidden @ model.table.weight[:size].t()).float() * model.context.model.logit_multiplier
    return logits if bias is None else logits + bias[:size].float()
