"""Bytes that a layer keeps for its backward pass, tensor by tensor, for one micro-batch on one rank.

Mirrors what autograd saves in `model/`: every entry below is one storage, named after what it holds. It is checked
byte by byte by `megatron-omega dry-run`. `heads` is the number of this rank's heads, so any even split is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from megatron_omega.config.schema import Branch, Branches, RunConfig
from megatron_omega.config.schema.model import WHOLE

FP32 = 4
INT32 = 4
INT64 = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one micro-batch on one rank."""

    micro_batch: int
    encoder: int
    """Encoder tokens of a sample."""
    decoder: int
    """Decoder tokens of a sample."""
    hidden: int
    ffn: int
    """Columns of gate (and of up) on this rank."""
    heads: int
    """Heads of a branch on this rank."""
    head_dim: int
    element: int
    """Bytes of a number in the working format."""
    shards: int
    """Parts the residual stream is cut into: the tensor-parallel size under sequence parallelism, else 1."""
    tensor: int
    """Tensor-parallel size."""

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        model, parallel, tp = config.model, config.parallel, config.parallel.tensor_parallel_size
        return cls(
            micro_batch=config.batch.micro_batch_size,
            encoder=0 if model.is_decoder_only else config.data.encoder_seq_length,
            decoder=config.data.decoder_seq_length,
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size // tp,
            heads=model.num_attention_heads // tp,
            head_dim=model.resolved_head_dim,
            element=FP32 if config.precision.dtype == "fp32" else 2,
            shards=tp if parallel.sequence_parallel else 1,
            tensor=tp,
        )

    @property
    def inner(self) -> int:
        """Columns of one projection of one branch on this rank."""
        return self.heads * self.head_dim

    def stream(self, length: int) -> int:
        """Bytes of this rank's part of the residual stream."""
        return self.micro_batch * length // self.shards * self.hidden * self.element

    def whole(self, length: int) -> int:
        """Bytes of the stream inside the tensor-parallel region, all tokens."""
        return self.micro_batch * length * self.hidden * self.element

    def norm(self, length: int) -> int:
        """Bytes an RMSNorm over this rank's part of the stream keeps."""
        tokens = self.micro_batch * length // self.shards
        return tokens * (self.hidden * self.element + FP32)


def encoder_layer(config: RunConfig, shape: Shape, branches: Branches) -> int:
    """Bytes one encoder layer keeps, the shared facts of its stream apart."""
    if config.parallel.recompute == "full":
        return shape.stream(shape.encoder)
    mix = sum(self_attention(config, shape, branches, shape.encoder, causal=False))
    return mix + sum(feed_forward(config, shape, shape.encoder))


def decoder_layer(config: RunConfig, shape: Shape, branches: Branches) -> int:
    """Bytes one decoder layer keeps, the shared facts of its streams and the memory apart."""
    if config.parallel.recompute == "full":
        return shape.stream(shape.decoder)
    mix = sum(self_attention(config, shape, branches, shape.decoder, causal=True))
    cross = 0 if config.model.is_decoder_only else sum(cross_attention(shape))
    return mix + cross + sum(feed_forward(config, shape, shape.decoder))


def self_attention(config: RunConfig, shape: Shape, branches: Branches, length: int, *, causal: bool) -> Iterator[int]:
    """Yield the bytes of each saved tensor of a self-attention mix with its norm."""
    count, tokens, e = len(branches), shape.micro_batch * length, shape.element
    yield shape.norm(length)
    yield shape.whole(length)  # input of the projection
    yield 3 * count * tokens * shape.inner * e  # the projection: v is a view of it
    yield 2 * count * tokens * shape.heads * FP32  # reciprocal roots
    is_filled = {"axial": length % config.model.axial_width, "local": length % config.model.local_window}
    is_filled["select"] = is_filled["axial"]
    if any(not is_filled.get(branch) for branch in branches):  # what is filled to whole chunks or rows is copied
        yield 2 * count * tokens * shape.inner * e  # normalised, rotated q and k, all branches
    for branch in branches:
        yield from _branch(config, shape, branch, length, causal=causal)
    if count > 1 or branches[0] not in ("full", "causal"):  # what these attend is that already
        yield count * tokens * shape.inner * e  # input of the output projection


def _branch(config: RunConfig, shape: Shape, branch: Branch, length: int, *, causal: bool) -> Iterator[int]:
    b, heads, e = shape.micro_batch, shape.heads, shape.element
    part = b * length * shape.inner * e  # q, k, v or the attended values of one branch
    if branch == "local":
        yield from _local(config, shape, length, causal=causal)
    elif branch == "axial":
        yield from _axial(config, shape, length)
    elif branch == "select":
        yield from _select(config, shape, length)
    else:
        yield b * length * heads * FP32
        yield part
        if branch == "dynamic":
            yield 2 * b * length * 2 * heads * e  # sigmoid and its double


def _axial(config: RunConfig, shape: Shape, length: int) -> Iterator[int]:
    b, heads, e = shape.micro_batch, shape.heads, shape.element
    filled = ceil(length / config.model.axial_width) * config.model.axial_width
    part = b * filled * shape.inner * e
    yield 3 * part if filled > length else 0  # q, k and v on the grid are copied to fill it
    columns = part * (heads // 2) // heads
    if config.model.attention_sinks:  # keys and values are copied to put one behind those of every line
        width = config.model.axial_width
        yield 2 * (part - columns) * (width + 1) // width
        yield 2 * columns * (filled // width + 1) // (filled // width)
        yield columns if b > 1 else 0
    else:
        yield 3 * columns if b > 1 else 0  # columns of several samples are copied
    yield b * filled * heads * FP32  # log-sum-exp
    yield part


def _local(config: RunConfig, shape: Shape, length: int, *, causal: bool) -> Iterator[int]:
    b, window, e = shape.micro_batch, config.model.local_window, shape.element
    chunks = ceil(length / window)
    padded = (chunks + 1 + (not causal)) * window
    keys = chunks * (2 if causal else 3) * window
    if config.model.attention_sinks:
        keys += chunks
    elif b == 1:
        keys = padded  # overlapping views of one sample
    yield 2 * b * keys * shape.inner * e
    yield b * chunks * window * shape.inner * e * (1 + (chunks * window > length))  # attended values; q if filled
    yield b * chunks * window * shape.heads * FP32


def _select(config: RunConfig, shape: Shape, length: int) -> Iterator[int]:
    b, heads, e, width = shape.micro_batch, shape.heads, shape.element, config.model.axial_width
    blocks = ceil(length / width)
    keys = min(config.model.select_blocks, blocks) + 1
    part = b * blocks * width * shape.inner * e
    yield 2 * keys * part  # the chosen blocks of k and v
    yield b * blocks * heads * keys * INT64  # which they are
    yield b * blocks * width * heads * FP32  # log-sum-exp
    yield part * (1 + (blocks * width > length))  # attended values; q if filled


def stream_facts(config: RunConfig, shape: Shape, branches: Branches, length: int, *, causal: bool) -> Iterator[int]:
    """Yield the bytes of each tensor that all layers of a stack share on a stage: rotary tables, spans, masks."""
    b, e, width, window = shape.micro_batch, shape.element, config.model.axial_width, config.model.local_window
    sink = int(config.model.attention_sinks)
    if config.model.positions == "rotary":
        yield 2 * b * length * shape.head_dim * FP32
    if WHOLE & {*branches}:
        yield _spans(b * length)
    if "local" in branches:
        yield b * ceil(length / window) * window * ((2 if causal else 3) * window + sink) * e
    if "axial" in branches:
        rows = ceil(length / width)
        yield b * rows * width * (width + sink) * e
        if shape.heads > 1 or config.parallel.recompute == "full":  # one head of the first rank attends rows only
            yield b * width * rows * (rows + sink) * e
    if "select" in branches:
        blocks = ceil(length / width)
        yield b * blocks * width * (min(config.model.select_blocks, blocks) + 1) * width * e
        if config.parallel.recompute == "full":  # a recomputed layer keeps its arguments
            yield b * blocks * blocks


def _spans(tokens: int) -> int:
    """Bytes of the spans of documents: room for as many as there are tokens, five int32 each, and their number."""
    return (1 + tokens) * 5 * INT32


def facts(config: RunConfig, shape: Shape, encoder: Branches, decoder: Branches) -> int:
    """Bytes of what the layers of a stage share for one micro-batch, given all branches of its stacks."""
    kept = 0
    if encoder:
        kept += sum(stream_facts(config, shape, encoder, shape.encoder, causal=False))
    if decoder:
        kept += sum(stream_facts(config, shape, decoder, shape.decoder, causal=True))
        kept += 0 if config.model.is_decoder_only else _spans(shape.micro_batch * shape.decoder)  # of both streams
    return kept


def cross_attention(shape: Shape) -> Iterator[int]:
    """Yield the bytes of each saved tensor of cross-attention with its norm; the memory itself apart."""
    b, e = shape.micro_batch, shape.element
    yield shape.norm(shape.decoder)
    yield shape.whole(shape.decoder)  # input of the q projection
    for length in (shape.decoder, shape.encoder):
        yield b * length * shape.heads * FP32  # reciprocal roots
        yield b * length * shape.inner * e  # normalised q, k
    yield b * shape.decoder * shape.inner * e  # q before QK-norm
    yield 2 * b * shape.encoder * shape.inner * e  # the k, v projection
    yield b * shape.decoder * shape.heads * FP32
    yield b * shape.decoder * shape.inner * e  # attended values, as the output projection takes them


def feed_forward(config: RunConfig, shape: Shape, length: int) -> Iterator[int]:
    """Yield the bytes of each saved tensor of a feed-forward block with its norm."""
    tokens, recompute = shape.micro_batch * length, config.parallel.recompute
    yield shape.norm(length)
    if recompute == "ffn":
        yield shape.stream(length)
        return
    yield shape.whole(length)
    yield 2 * tokens * shape.ffn * shape.element  # gate and up
    if recompute != "swiglu":
        yield tokens * shape.ffn * shape.element  # silu(gate) * up


def embedding(shape: Shape, length: int) -> int:
    """Bytes a lookup in the token table keeps: ids; with tensor parallelism local ids and whose they are."""
    tokens = shape.micro_batch * length
    return tokens * INT64 if shape.tensor == 1 else tokens * (INT64 + 1)


def bridge(shape: Shape) -> int:
    """Bytes of the encoder's final norm and the decoder's lookup; the memory apart."""
    return shape.norm(shape.encoder) + embedding(shape, shape.decoder)


def head(config: RunConfig, shape: Shape) -> int:
    """Bytes of the decoder's final norm and the MLM transform; the memory apart."""
    kept = shape.norm(shape.decoder)
    if config.model.has_mlm_head:
        tokens = shape.micro_batch * shape.encoder
        kept += tokens * shape.hidden * shape.element  # input of the GELU
        kept += tokens * (FP32 + shape.hidden * shape.element)  # reciprocal roots and input of the norm
    return kept


def output(config: RunConfig, shape: Shape) -> int:
    """Bytes of the losses: gradients of hidden states, table and bias, formed in the forward pass."""
    rows = config.model.padded_vocab_size // shape.tensor
    kept = shape.whole(shape.decoder) + rows * shape.hidden * shape.element + 2 * FP32  # and both loss factors
    if config.model.has_mlm_head:
        kept += shape.whole(shape.encoder) + rows * shape.hidden * shape.element + rows * shape.element
    return kept


def memory_between_layers(config: RunConfig, shape: Shape) -> int:
    """Bytes of the encoder's output, which all decoder layers of a stage share."""
    return shape.whole(shape.encoder) if not config.model.is_decoder_only else 0
