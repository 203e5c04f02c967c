"""The architecture: the section `model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Tag, model_validator

from megatron_omega.config.history import with_earlier_meaning
from megatron_omega.config.schema.base import NonNegative, Positive, PositiveFloat, Section

Branch = Literal["full", "causal", "local", "axial", "dynamic", "select"]
Branches = tuple[Branch, ...]
Stack = Literal["encoder", "decoder"]
ENCODER_BRANCHES: Branches = ("full", "local", "axial", "dynamic")
DECODER_BRANCHES: Branches = ("causal", "local", "axial")
LEGAL_BRANCHES: Mapping[Stack, Branches] = {
    "encoder": ENCODER_BRANCHES,
    "decoder": (*DECODER_BRANCHES, "select"),
}
HAS_SINK: frozenset[Branch] = frozenset({"local", "axial"})
"""Branches that see part of a text only."""
WHOLE: frozenset[Branch] = frozenset({"full", "causal", "dynamic"})
"""Branches whose tokens see a whole document, or all of it before them: two of them in a layer see the same keys."""
VOCABULARY_MULTIPLE = 128


def _form_of_branches(value: object) -> str:
    """Return which form a list of branches has: one for all layers, or a pattern of lists."""
    return "pattern" if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else "alike"


BRANCH_FORMS = ("alike", "pattern")
LayerBranches = Annotated[
    Annotated[Branches, Tag("alike")] | Annotated[tuple[Branches, ...], Tag("pattern")],
    Discriminator(_form_of_branches),
]


class ModelConfig(Section):
    """The architecture. Everything here is part of a checkpoint's identity."""

    hidden_size: Positive = 960
    """Width of the residual stream."""
    ffn_hidden_size: Positive = 16384
    """Width of the gated feed-forward block (gate and up each have this many columns)."""
    num_attention_heads: Positive = 48
    """Heads of every attention branch."""
    head_dim: Positive | None = None
    """Size of one head; hidden_size / num_attention_heads if it is not given. Must be even (rotary pairs)."""
    encoder_layers: NonNegative = 96
    """Encoder layers. 0 makes a decoder-only model."""
    decoder_layers: Positive = 96
    """Decoder layers."""
    encoder_branches: LayerBranches = ENCODER_BRANCHES
    """Parallel attention branches of the encoder layers, out of: full, local, axial, dynamic. A list of lists is a
    pattern: layer i has list i modulo their number."""
    decoder_branches: LayerBranches = DECODER_BRANCHES
    """Parallel self-attention branches of the decoder layers, out of: causal, local, axial, select; or a pattern."""
    vocab_size: Positive = 32768
    """Pieces of the tokenizer. The table is padded to a multiple of 128 in every layout; padded logits are masked."""
    local_window: Positive = 128
    """Reach W of the local branch: |i - j| < W in the encoder, 0 <= i - j < W in the decoder."""
    axial_width: Positive = 32
    """Row width w of the axial branch; constant, never derived from the length. Needs local_window >= axial_width."""
    select_blocks: Positive = 4
    """Earlier blocks of axial_width tokens that a block attends in the select branch, beside itself."""
    attention_sinks: bool = False
    """Whether local and axial heads have a learned key without a value, which every token sees: a place for attention
    that finds nothing in its window, row or column."""
    positions: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    """Positional encoding; a position is the index inside the document."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    depth_base: Positive = 1
    """Layers of a stack at which its residual multiplier is 1; it is depth_base / layers (CompleteP)."""
    width_base: Positive = 128
    """Width at which hidden matrices get the full learning rate: theirs is scaled by width_base / hidden_size."""
    output_multiplier: PositiveFloat = 0.5
    """Factor on the logits of the tied table at width_base; see docs/parametrization.md for other widths."""
    table_multiplier: PositiveFloat = 3.0
    """Factor on the learning rate of the token table."""
    parametrization: Literal[1, 2] = 2
    """How rates, epsilon, decay and multipliers follow width and depth: docs/parametrization.md says both versions."""
    mlm_head: bool = True
    """Whether the encoder output has a masked-language-modelling head (encoder-decoders only)."""
    decoder_start: Literal["prefix", "begin"] = "prefix"
    """First decoder input after a prefix: its last tokens, or the begin token. Without a prefix: the begin token."""
    decoder_overlap: Positive = 16
    """Last tokens of a prefix that the decoder reads before what it says (decoder_start: prefix)."""
    shared_mode_token: bool = False
    """Whether masked prefixes start with the mode token of plain ones."""

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def resolved_overlap(self) -> int:
        """Tokens of a prefix that the decoder reads too; 0: the begin token in their place."""
        return self.decoder_overlap if self.decoder_start == "prefix" else 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table; depends on nothing but the vocabulary."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def branch_pattern(self, stack: Stack) -> tuple[Branches, ...]:
        """Return the lists of branches that the layers of `stack` take in turn; one where all are alike."""
        given = self.encoder_branches if stack == "encoder" else self.decoder_branches
        return cast(tuple[Branches, ...], given if _form_of_branches(given) == "pattern" else (given,))

    def layer_branches(self, stack: Stack, layer: int) -> Branches:
        """Return the self-attention branches of one layer, counted from 0 in its stack."""
        pattern = self.branch_pattern(stack)
        return pattern[layer % len(pattern)]

    def sinks(self, branches: Branches) -> Branches:
        """Return those of a layer's branches that have a learned key."""
        return tuple(branch for branch in branches if self.attention_sinks and branch in HAS_SINK)

    @property
    def is_decoder_only(self) -> bool:
        return self.encoder_layers == 0

    @property
    def has_mlm_head(self) -> bool:
        return self.mlm_head and not self.is_decoder_only

    @property
    def width_multiplier(self) -> float:
        """Factor on the learning rate of hidden matrices."""
        return self.width_base / self.hidden_size

    @property
    def logit_multiplier(self) -> float:
        """Factor on the logits of the tied table."""
        return self.output_multiplier * (1.0 if self.parametrization == 1 else self.width_multiplier**0.5)

    def residual_multiplier(self, layers: int) -> float:
        """Return the factor on what a layer adds to the residual stream, in a stack of so many layers."""
        depth = self.encoder_layers + self.decoder_layers if self.parametrization == 1 else layers
        return self.depth_base / depth

    @model_validator(mode="before")
    @classmethod
    def _as_stored(cls, values: Any) -> Any:
        return with_earlier_meaning("model", values)
