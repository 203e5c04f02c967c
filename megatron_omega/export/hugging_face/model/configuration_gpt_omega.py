"""Settings of GPT-Omega for Transformers: the architecture under the names it was trained with."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

VOCABULARY_MULTIPLE = 128


class GPTOmegaConfig(PreTrainedConfig):
    """The architecture, the ids of special tokens, and the longest texts the model was trained on.

    `*_branches` is a list of attention branches for all layers, or a list of such lists: layer i has list i modulo
    their number. `encoder_layers=0` is a decoder-only model. `decoder_start="prefix"`: the decoder begins with the last
    `decoder_overlap` tokens of the encoder's text; "begin": with the begin token.
    """

    model_type = "gpt_omega"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the name and form are the library's
    attribute_map = {"num_hidden_layers": "decoder_layers"}  # noqa: RUF012

    vocab_size: int = 32768
    hidden_size: int = 960
    ffn_hidden_size: int = 16384
    num_attention_heads: int = 48
    head_dim: int | None = None
    encoder_layers: int = 96
    decoder_layers: int = 96
    encoder_branches: list[Any] | tuple[Any, ...] = ("full", "local", "axial", "dynamic")
    decoder_branches: list[Any] | tuple[Any, ...] = ("causal", "local", "axial")
    local_window: int = 128
    axial_width: int = 32
    select_blocks: int = 4
    attention_sinks: bool = False
    positions: str = "rotary"
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-6
    depth_base: int = 1
    width_base: int = 128
    output_multiplier: float = 0.5
    table_multiplier: float = 3.0
    parametrization: int = 2
    mlm_head: bool = True
    decoder_start: str = "prefix"
    decoder_overlap: int = 16
    shared_mode_token: bool = False

    max_encoder_length: int = 2048
    max_decoder_length: int = 2048
    prefix_mode_token_id: int | None = None
    """Opens the encoder's text where the decoder is to continue it."""
    mask_mode_token_id: int | None = None
    """Opens the encoder's text where masks are to be filled."""
    tokenizer_sha256: str | None = None
    """Of the SentencePiece model it was trained with."""

    is_encoder_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    decoder_start_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.is_encoder_decoder = self.encoder_layers > 0
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the stored configuration; one that lacks `decoder_overlap` was written when it was one token."""
        return super().from_dict({"decoder_overlap": 1, **config_dict}, **kwargs)

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table; those behind `vocab_size` stand for nothing."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def logit_multiplier(self) -> float:
        """Factor on the logits of the tied table."""
        width = self.width_base / self.hidden_size
        return self.output_multiplier * (1.0 if self.parametrization == 1 else width**0.5)

    def residual_multiplier(self, layers: int) -> float:
        """Return the factor on what a layer adds to the residual stream, in a stack of so many layers."""
        depth = self.encoder_layers + self.decoder_layers if self.parametrization == 1 else layers
        return self.depth_base / depth

    def layer_branches(self, stack: str, layer: int) -> tuple[str, ...]:
        """Return the attention branches of one layer of the encoder or the decoder."""
        given = self.encoder_branches if stack == "encoder" else self.decoder_branches
        return tuple(given[layer % len(given)] if isinstance(given[0], list | tuple) else given)
