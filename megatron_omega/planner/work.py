"""What a micro-batch asks of a rank in each kind of layer: products, memory traffic, launches, messages, bytes kept.

All numbers are one rank's, exact where the dry run can count them (FLOPs, messages, bytes kept, parameters) and
estimates where only a clock can (memory traffic, kernel launches). Knows no hardware and no schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_omega import accounting
from megatron_omega.config.schema import Branch, Branches, ModelConfig, RunConfig
from megatron_omega.config.schema.model import WHOLE
from megatron_omega.planner import activations
from megatron_omega.planner.activations import FP32, INT64, Shape

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]
FORWARD_TRAFFIC = 2.5
"""Bytes that element-wise kernels move in a forward pass, per byte that a layer without recomputation keeps."""
BACKWARD_TRAFFIC = 5.0
BRANCH_LAUNCHES: dict[Branch, int] = {"full": 2, "causal": 2, "local": 3, "axial": 3, "dynamic": 7, "select": 19}
"""Kernels of a branch's forward pass, counted on the real code: rows of one document each, bf16."""
WHOLE_CALL = 2
"""Those of the call itself, which two branches that see whole documents share."""
BACKWARD_LAUNCHES = 1.67
"""Kernels of a backward pass per kernel of the forward."""


class Collective(NamedTuple):
    """One message along the tensor axis: what is called, and the bytes of the full tensor it is called on."""

    kind: CollectiveKind
    num_bytes: int


Messages = Counter[Collective]


class Product(NamedTuple):
    """`count` matrix products [m, k] x [k, n]."""

    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Work:
    """One layer, one micro-batch, one rank."""

    parameters: int = 0
    """Local, the token table apart."""
    products: tuple[Product, ...] = ()
    """Dense products of the forward pass; the backward pass has two for each."""
    attention_flops: int = 0
    """Of the attention kernels, forward."""
    routing_flops: int = 0
    """Of the attention kernels' scores of blocks: forward only."""
    recomputed: tuple[Product, ...] = ()
    """Dense products run again in the backward pass."""
    recomputed_attention_flops: int = 0
    traffic: int = 0
    """Bytes that element-wise kernels move in the forward pass."""
    recomputed_traffic: int = 0
    launches: int = 0
    """Kernels of the forward pass."""
    recomputed_launches: int = 0
    is_checkpointed: bool = False
    """Whether the whole layer is recomputed, by `torch.utils.checkpoint`."""
    forward_messages: Messages = field(default_factory=Counter)
    backward_messages: Messages = field(default_factory=Counter)
    kept: int = 0
    """Bytes kept for the backward pass; the facts of streams, memory and stage inputs apart."""
    entering: int = 0
    """Messages of the backward pass that run while gradients of weights are computed (parallel/entering.py)."""
    head_dim: int = 0
    """Of the attention kernels."""
    forms_gradients: bool = False
    """Whether the forward pass does the backward pass's products too."""
    expected: float = 1.0
    """Share of products and traffic that a real run does; a dry run does all."""
    working: int = 0
    """Bytes that exist while the layer runs backward, beside what it kept: recomputed activations and gradients."""

    @property
    def forward_flops(self) -> int:
        return sum(product.flops for product in self.products) + self.attention_flops + self.routing_flops

    @property
    def total_flops(self) -> int:
        """Forward, recomputed and backward: what `FlopCounterMode` counts."""
        recomputed = sum(product.flops for product in self.recomputed) + self.recomputed_attention_flops
        return 3 * self.forward_flops - 2 * self.routing_flops + recomputed


def layer_works(config: RunConfig, *, tensor_rank: int = 0) -> dict[str, Work]:
    """Return the work of each kind of layer: embedding, encoder, bridge, decoder, head, output.

    A stack whose layers differ has several kinds (`accounting.stack_kinds`).
    """
    shape = Shape.of(config)
    works = {"embedding": _embedding(config, shape), "head": _head(config, shape), "output": _output(config, shape)}
    for kind, branches in accounting.stack_kinds(config.model, "decoder").items():
        works[kind] = _layer(config, shape, branches, tensor_rank, encoder=False)
    if not config.model.is_decoder_only:
        works["bridge"] = _bridge(config, shape)
        for kind, branches in accounting.stack_kinds(config.model, "encoder").items():
            works[kind] = _layer(config, shape, branches, tensor_rank, encoder=True)
    return works


def table_parameters(config: RunConfig) -> int:
    """Local parameters of the token table, held once by every rank that has an embedding, bridge or output."""
    return accounting.table_parameters(config.model) // config.parallel.tensor_parallel_size


def _messages(*pairs: tuple[Collective, int]) -> Messages:
    return Counter({collective: count for collective, count in pairs if count})


def _enter_leave(config: RunConfig, shape: Shape, length: int) -> tuple[Collective, Collective]:
    """Return the messages of entering and of leaving the tensor-parallel region, forward."""
    whole = shape.whole(length)
    if config.parallel.sequence_parallel:
        return Collective("all_gather", whole), Collective("reduce_scatter", whole)
    return Collective("all_reduce", 0), Collective("all_reduce", whole)


def _region(config: RunConfig, shape: Shape, length: int, blocks: int) -> tuple[Messages, Messages]:
    """Return forward and backward messages of `blocks` residual blocks.

    A recomputed layer stops before its last block leaves: nothing behind that is needed again. A recomputed
    feed-forward block gathers its tokens again and leaves only once.
    """
    again = blocks - 1 if config.parallel.recompute == "full" else 0
    if shape.tensor == 1:
        return Counter(), Counter()
    whole = shape.whole(length)
    if not config.parallel.sequence_parallel:
        reduce = Collective("all_reduce", whole)
        return Counter({reduce: blocks}), _messages((reduce, blocks + again))
    gather, scatter = Collective("all_gather", whole), Collective("reduce_scatter", whole)
    norm = Collective("all_reduce", shape.hidden * shape.element)
    gathers_again = {"full": blocks, "ffn": 1}.get(config.parallel.recompute, 0)
    return (
        Counter({gather: blocks, scatter: blocks}),
        _messages((gather, blocks + gathers_again), (scatter, blocks + again), (norm, blocks)),
    )


def _layer(config: RunConfig, shape: Shape, branches: Branches, tensor_rank: int, *, encoder: bool) -> Work:
    model, recompute = config.model, config.parallel.recompute
    length = shape.encoder if encoder else shape.decoder
    has_cross = not encoder and not model.is_decoder_only
    products = [*_mix_products(shape, branches, length), *(_cross_products(shape) if has_cross else ())]
    first_head = tensor_rank * shape.heads
    attention = shape.micro_batch * sum(
        accounting.attention_kernel_flops(
            model, branch, length, causal=not encoder, heads=range(first_head, first_head + shape.heads)
        )
        for branch in branches
    )
    routing = shape.micro_batch * accounting.routing_flops(model, branches, length, shape.heads)
    if has_cross:
        attention += 4 * shape.micro_batch * shape.decoder * shape.encoder * shape.inner
    tokens = shape.micro_batch * length
    gate_up = Product(tokens, 2 * shape.ffn, shape.hidden)
    products += [gate_up, Product(tokens, shape.hidden, shape.ffn)]
    blocks = 3 if has_cross else 2
    forward, backward = _region(config, shape, length, blocks)
    everything = config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": "none"})})
    keep = activations.encoder_layer if encoder else activations.decoder_layer
    kept, whole = keep(config, shape, branches), keep(everything, shape, branches)
    launches = 35 + 30 * has_cross + _mix_launches(branches)
    is_full = recompute == "full"
    redone = {"none": [], "swiglu": [], "ffn": [gate_up], "full": products[:-1]}[recompute]
    return Work(
        parameters=_layer_parameters(config, branches, encoder=encoder),
        products=tuple(products),
        attention_flops=attention,
        recomputed=tuple(redone),
        routing_flops=routing,
        recomputed_attention_flops=attention + routing if is_full else 0,
        traffic=int(FORWARD_TRAFFIC * whole),
        recomputed_traffic=int(FORWARD_TRAFFIC * (whole - kept)),
        launches=launches,
        recomputed_launches=launches if is_full else 6 if recompute in ("ffn", "swiglu") else 0,
        is_checkpointed=is_full,
        forward_messages=forward,
        backward_messages=backward,
        entering=blocks if shape.tensor > 1 else 0,
        head_dim=shape.head_dim,
        kept=kept,
        working=whole - kept + _gradients(shape, length),
    )


def _mix_launches(branches: Branches) -> int:
    """Kernels of a mix's branches, and of joining what they attend, which one that sees whole documents needs not."""
    whole = sum(branch in WHOLE for branch in branches)
    shared = WHOLE_CALL if whole == 2 else 0
    return sum(BRANCH_LAUNCHES[branch] for branch in branches) - shared + (len(branches) > 1 or not whole)


def _gradients(shape: Shape, length: int) -> int:
    """Bytes of the largest gradients alive at once in a backward pass: those of gate and up, joined from two halves.

    What has been used is free by then: their product, and the halves of gate and up that are joined last.
    """
    tokens = shape.micro_batch * length
    return tokens * 2 * shape.ffn * shape.element + 3 * tokens * shape.hidden * shape.element


def _layer_parameters(config: RunConfig, branches: Branches, *, encoder: bool) -> int:
    """Local parameters: everything but the norms is sharded."""
    model, tp = config.model, config.parallel.tensor_parallel_size
    norms = (2 if encoder or model.is_decoder_only else 3) * model.hidden_size
    parameters = accounting.encoder_layer_parameters if encoder else accounting.decoder_layer_parameters
    count = parameters(model, branches)
    return (count - norms) // tp + norms


def _mix_products(shape: Shape, branches: Branches, length: int) -> Iterator[Product]:
    tokens, columns = shape.micro_batch * length, len(branches) * shape.inner
    yield Product(tokens, 3 * columns, shape.hidden)
    if "dynamic" in branches:
        yield Product(tokens, 2 * shape.heads, shape.hidden)
    yield Product(tokens, shape.hidden, columns)


def _cross_products(shape: Shape) -> Iterator[Product]:
    tokens = shape.micro_batch * shape.decoder
    yield Product(tokens, shape.inner, shape.hidden)
    yield Product(shape.micro_batch * shape.encoder, 2 * shape.inner, shape.hidden)
    yield Product(tokens, shape.hidden, shape.inner)


def _lookup(config: RunConfig, shape: Shape, length: int) -> tuple[Messages, Messages]:
    """Return forward and backward messages of a vocabulary-parallel lookup."""
    if shape.tensor == 1:
        return Counter(), Counter()
    _, leave = _enter_leave(config, shape, length)
    backward = (
        _messages((Collective("all_gather", leave.num_bytes), 1)) if config.parallel.sequence_parallel else Counter()
    )
    return Counter({leave: 1}), backward


def _embedding(config: RunConfig, shape: Shape) -> Work:
    length = shape.decoder if config.model.is_decoder_only else shape.encoder
    forward, backward = _lookup(config, shape, length)
    return Work(
        traffic=2 * shape.whole(length),
        launches=4,
        forward_messages=forward,
        backward_messages=backward,
        kept=activations.embedding(shape, length),
        working=shape.whole(length),
    )


def _bridge(config: RunConfig, shape: Shape) -> Work:
    forward, backward = _lookup(config, shape, shape.decoder)
    if shape.tensor > 1:
        memory = shape.whole(shape.encoder)
        if config.parallel.sequence_parallel:
            forward = forward + Counter({Collective("all_gather", memory): 1})
            norm = Collective("all_reduce", shape.hidden * shape.element)
            backward = backward + Counter({Collective("reduce_scatter", memory): 1, norm: 1})
        else:
            backward = backward + Counter({Collective("all_reduce", memory): 1})
    return Work(
        parameters=config.model.hidden_size,
        traffic=4 * shape.whole(shape.encoder) + 2 * shape.whole(shape.decoder),
        launches=12,
        forward_messages=forward,
        backward_messages=backward,
        kept=activations.bridge(shape),
        working=2 * shape.whole(shape.encoder),
    )


def _head(config: RunConfig, shape: Shape) -> Work:
    model = config.model
    forward: Messages = Counter()
    backward: Messages = Counter()
    if shape.tensor > 1:
        decoded, encoded = shape.whole(shape.decoder), shape.whole(shape.encoder)
        if config.parallel.sequence_parallel:
            forward[Collective("all_gather", decoded)] += 1
            backward[Collective("reduce_scatter", decoded)] += 1
            backward[Collective("all_reduce", shape.hidden * shape.element)] += 1
        else:
            backward[Collective("all_reduce", decoded)] += 1
        if model.has_mlm_head:
            backward[Collective("all_reduce", encoded)] += 1
    tokens = shape.micro_batch * shape.encoder if model.has_mlm_head else 0
    sharded = model.padded_vocab_size if model.has_mlm_head else 0
    return Work(
        parameters=accounting.head_parameters(model) - sharded + sharded // shape.tensor,
        products=(Product(tokens, shape.hidden, shape.hidden),) if tokens else (),
        traffic=int(FORWARD_TRAFFIC * activations.head(config, shape)),
        launches=20,
        forward_messages=forward,
        backward_messages=backward,
        kept=activations.head(config, shape),
        working=4 * shape.whole(max(shape.encoder, shape.decoder)),
    )


def loss_chunks(config: RunConfig) -> list[int]:
    """Return the tokens of every chunk of logits of one micro-batch; all tokens of the encoder count as masked."""
    size, b = config.objective.loss_chunk_tokens, config.batch.micro_batch_size
    streams = [config.data.decoder_seq_length, *([config.data.encoder_seq_length] if config.model.has_mlm_head else [])]
    return [min(size, b * tokens - begin) for tokens in streams for begin in range(0, b * tokens, size)]


def _output(config: RunConfig, shape: Shape) -> Work:
    """The losses form their gradients in the forward pass, so the backward pass has no products of its own."""
    rows = config.model.padded_vocab_size // shape.tensor
    chunks = loss_chunks(config)
    forward: Messages = Counter()
    if shape.tensor > 1:
        for tokens in chunks:
            forward[Collective("all_reduce", tokens * FP32)] += 1  # row maxima
            forward[Collective("all_reduce", 2 * tokens * FP32)] += 1  # sums of exponentials and label logits
    logits = max(chunks) * rows
    return Work(
        products=tuple(Product(tokens, rows, shape.hidden) for tokens in chunks),
        traffic=10 * sum(chunks) * rows * FP32,
        launches=30 * len(chunks),
        forward_messages=forward,
        kept=activations.output(config, shape),
        forms_gradients=True,
        expected=_expected_labels(config),
        # Logits, their gradient, a chunk's product for the table, and the table's gradient in fp32 instead of kept.
        working=logits * (FP32 + shape.element) + rows * shape.hidden * FP32,
    )


def _expected_labels(config: RunConfig) -> float:
    """Return the share of tokens whose logits a real run computes: of the encoder's, only masked ones have a label."""
    if not config.model.has_mlm_head:
        return 1.0
    objective, data = config.objective, config.data
    weights = objective.prefix_lm + objective.span_corruption + objective.masked_prefix + objective.in_context
    masked = objective.mask_rate * objective.masked_prefix / weights if weights else 0.0
    tokens = data.decoder_seq_length + masked * data.encoder_seq_length
    return tokens / (data.decoder_seq_length + data.encoder_seq_length)


def pipeline_messages(config: RunConfig, kind_before: str, kind_after: str) -> tuple[list[int], list[int]]:
    """Return bytes of each tensor that crosses a cut between two layers: activations forward, gradients back.

    In front of the bridge travel the encoder's hidden state, its segments, the decoder's ids and segments; behind it
    the memory, the decoder's hidden state and both segments. Integers get no gradient.
    """
    shape = Shape.of(config)
    kind_before, kind_after = accounting.stack_of(kind_before), accounting.stack_of(kind_after)
    ids = {part: shape.micro_batch * length * INT64 for part, length in (("e", shape.encoder), ("d", shape.decoder))}
    model: ModelConfig = config.model
    if model.is_decoder_only or (kind_before == "decoder" and kind_after == "head" and not model.has_mlm_head):
        floats = [shape.stream(shape.decoder)]
        return [*floats, ids["d"]], floats
    if kind_before in ("embedding", "encoder"):
        floats = [shape.stream(shape.encoder)]
        return [*floats, ids["e"], ids["d"], ids["d"]], floats
    floats = [shape.whole(shape.encoder), shape.stream(shape.decoder)]
    return [*floats, ids["e"], ids["d"]], floats
