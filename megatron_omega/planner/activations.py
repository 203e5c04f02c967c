"""Bytes that a layer keeps for its backward pass, tensor by tensor, for one micro-batch on one rank.

Mirrors what autograd saves in `model/`: every entry below is one storage, named after what it holds. It is checked
byte by byte by `megatron-omega dry-run`. On the CPU an RMSNorm keeps its input and its normalised input in fp32; on a
GPU it keeps the input it was given. `heads` is the number of this rank's heads, so any even split is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from megatron_omega.config.schema import Branch, Branches, RunConfig

FP32 = 4
INT64 = 8
COPYING: set[Branch] = {"local", "axial"}
"""Branches whose kernels keep copies of q, k and v in their own order."""


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
    fused_norms: bool
    """Whether norms keep their input only (GPU) or two fp32 copies (CPU)."""

    @classmethod
    def of(cls, config: RunConfig, *, fused_norms: bool = False) -> Shape:
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
            fused_norms=fused_norms,
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
        if self.fused_norms:
            return tokens * (self.hidden * self.element + FP32)
        return tokens * (2 * self.hidden * FP32 + FP32)


def encoder_layer(config: RunConfig, shape: Shape, branches: Branches) -> int:
    """Bytes one encoder layer keeps, its segments apart."""
    if config.parallel.recompute == "full":
        return shape.stream(shape.encoder)
    mix = sum(self_attention(config, shape, branches, shape.encoder, causal=False))
    return mix + sum(feed_forward(config, shape, shape.encoder))


def decoder_layer(config: RunConfig, shape: Shape, branches: Branches) -> int:
    """Bytes one decoder layer keeps, segments and the shared memory apart."""
    if config.parallel.recompute == "full":
        return shape.stream(shape.decoder)
    mix = sum(self_attention(config, shape, branches, shape.decoder, causal=True))
    cross = 0 if config.model.is_decoder_only else sum(cross_attention(shape))
    return mix + cross + sum(feed_forward(config, shape, shape.decoder))


def self_attention(config: RunConfig, shape: Shape, branches: Branches, length: int, *, causal: bool) -> Iterator[int]:
    """Yield the bytes of each saved tensor of a self-attention mix with its norm."""
    count, tokens, e = len(branches), shape.micro_batch * length, shape.element
    query_key = 2 * count * tokens * shape.inner
    yield shape.norm(length)
    yield shape.whole(length)  # input of the projection
    if e != FP32:
        yield query_key * FP32  # before QK-norm, in fp32
        yield 2 * count * shape.inner * FP32  # gains in fp32
    yield 2 * count * tokens * shape.heads * FP32  # reciprocal roots
    yield query_key * FP32  # normalised
    if config.model.positions == "rotary":
        yield 2 * tokens * (shape.head_dim // 2) * e
    has_views = not {*branches} <= COPYING  # of q, k and v, so that all of them stay
    if has_views:
        yield query_key * e  # rotated q and k, all branches
    if has_views or e == FP32:
        yield 3 * count * tokens * shape.inner * e  # the projection: v is a view of it, q and k before QK-norm too
    for branch in branches:
        yield from _branch(config, shape, branch, length, causal=causal)
    yield count * tokens * shape.inner * e  # input of the output projection


def _branch(config: RunConfig, shape: Shape, branch: Branch, length: int, *, causal: bool) -> Iterator[int]:
    b, heads, e = shape.micro_batch, shape.heads, shape.element
    part = b * length * shape.inner * e  # q, k, v or the attended values of one branch
    if branch == "local":
        yield from _local(config, shape, length, causal=causal)
    elif branch == "axial":
        width = config.model.axial_width
        rows, row_heads, column_heads = length // width, (heads + 1) // 2, heads // 2
        yield 3 * part  # q, k, v on the grid
        yield b * rows * width * width * e  # mask of the rows
        if column_heads:
            yield b * width * rows * rows * e  # mask of the columns
            yield 3 * part * column_heads // heads if b > 1 else 0  # columns of several samples are copied
        yield b * length * heads * FP32  # log-sum-exp
        yield part * (row_heads + column_heads) // heads
    else:
        yield b * length * length * e  # mask
        yield b * length * heads * FP32
        yield part
        if branch == "dynamic":
            yield 2 * b * length * 2 * heads * e  # sigmoid and its double
            yield part  # q times temperature


def _local(config: RunConfig, shape: Shape, length: int, *, causal: bool) -> Iterator[int]:
    b, window, e = shape.micro_batch, config.model.local_window, shape.element
    chunks = ceil(length / window)
    reach = (2 if causal else 3) * window
    padded = (chunks - 1) * window + reach
    keys = chunks * reach if b > 1 else padded  # overlapping views of one sample, copies for several
    yield b * chunks * window * reach * e  # mask
    yield 2 * b * keys * shape.inner * e
    yield 2 * b * chunks * window * shape.inner * e  # q, and the attended values
    yield b * chunks * window * shape.heads * FP32


def cross_attention(shape: Shape) -> Iterator[int]:
    """Yield the bytes of each saved tensor of cross-attention with its norm; the memory itself apart."""
    b, e = shape.micro_batch, shape.element
    yield shape.norm(shape.decoder)
    yield shape.whole(shape.decoder)  # input of the q projection
    for length in (shape.decoder, shape.encoder):
        elements = b * length * shape.inner
        if e != FP32:
            yield elements * FP32 + shape.inner * FP32  # before QK-norm and the gains, in fp32
        yield b * length * shape.heads * FP32
        yield elements * FP32  # normalised
        yield elements * e  # q, k
    if e == FP32:
        yield b * shape.decoder * shape.inner * e  # q before QK-norm
    yield 2 * b * shape.encoder * shape.inner * e  # the k, v projection
    yield b * shape.decoder * shape.encoder * e  # mask
    yield b * shape.decoder * shape.heads * FP32
    yield 2 * b * shape.decoder * shape.inner * e  # attended values; input of the output projection


def feed_forward(config: RunConfig, shape: Shape, length: int) -> Iterator[int]:
    """Yield the bytes of each saved tensor of a feed-forward block with its norm."""
    tokens, recompute = shape.micro_batch * length, config.parallel.recompute
    yield shape.norm(length)
    yield shape.whole(length)
    if recompute == "ffn":
        return
    yield 2 * tokens * shape.ffn * shape.element  # gate and up
    if recompute != "swiglu":
        yield tokens * shape.ffn * shape.element  # silu(gate)
    yield tokens * shape.ffn * shape.element  # their product


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
        kept += tokens * FP32 + (1 if shape.fused_norms else 2) * tokens * shape.hidden * (
            shape.element if shape.fused_norms else FP32
        )
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


def segments(shape: Shape, *, encoder: bool, decoder: bool) -> int:
    """Bytes of the segment numbers, which all layers of a stage share."""
    return shape.micro_batch * INT64 * (shape.encoder * encoder + shape.decoder * decoder)
