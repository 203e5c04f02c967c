"""What a model costs: parameters and FLOPs of every layer, in closed form.

Conventions: FLOPs count a multiply-add as two and only matrix products (what `FlopCounterMode` counts); "per
sample" is one sequence of each stream; parameters are global, not the slice of a tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_omega.config.schema import Branch, Branches, ModelConfig, RunConfig, Stack


@dataclass(frozen=True)
class LayerCost:
    """One entry of the layer list: what it owns and what it computes."""

    name: str
    """As in the list: embedding, encoder.layers.3, bridge, decoder.layers.0, head, output."""
    parameters: int
    """Parameters it owns; the sum over the list is the model's. The tied table belongs to `embedding`."""
    tied_parameters: int
    """Parameters of the token table where the layer uses it: a stage without `embedding` holds a copy."""
    forward_flops: int
    """FLOPs of one forward pass over one sample."""

    kind: str
    """embedding, encoder, bridge, decoder, head or output; in a pattern with its branches: encoder [full, local].
    Layers of one kind cost the same, learned positions apart."""


# ---------------------------------------------------------------------------------------------- parameters


def inner_size(model: ModelConfig) -> int:
    """Width of all heads of one branch together, H x dh."""
    return model.num_attention_heads * model.resolved_head_dim


def attention_parameters(model: ModelConfig, branches: Branches) -> int:
    """Self-attention mix: one qkv, one output matrix, QK gains of every branch, tau and gate of a dynamic one."""
    inner, d = inner_size(model), model.hidden_size
    matrices = len(branches) * 4 * inner * d
    gains = len(branches) * 2 * inner
    dynamic = 2 * model.num_attention_heads * (d + 1) if "dynamic" in branches else 0
    return matrices + gains + dynamic + len(model.sinks(branches)) * inner


def cross_attention_parameters(model: ModelConfig) -> int:
    """Cross-attention of one decoder layer: q, k, v, output and QK gains."""
    inner = inner_size(model)
    return 4 * inner * model.hidden_size + 2 * inner


def feed_forward_parameters(model: ModelConfig) -> int:
    """SwiGLU: gate, up and down."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def encoder_layer_parameters(model: ModelConfig, branches: Branches) -> int:
    """One encoder layer, its two norms included."""
    return attention_parameters(model, branches) + feed_forward_parameters(model) + 2 * model.hidden_size


def decoder_layer_parameters(model: ModelConfig, branches: Branches) -> int:
    """One decoder layer with its norms; cross-attention (and its norm) only if there is an encoder."""
    cross = 0 if model.is_decoder_only else cross_attention_parameters(model) + model.hidden_size
    return attention_parameters(model, branches) + cross + feed_forward_parameters(model) + 2 * model.hidden_size


def stack_parameters(model: ModelConfig, stack: Stack) -> int:
    """All layers of a stack, learned positions apart."""
    one = encoder_layer_parameters if stack == "encoder" else decoder_layer_parameters
    layers = model.encoder_layers if stack == "encoder" else model.decoder_layers
    return sum(one(model, model.layer_branches(stack, layer)) for layer in range(layers))


def table_parameters(model: ModelConfig) -> int:
    """The tied token table, padding included."""
    return model.padded_vocab_size * model.hidden_size


def head_parameters(model: ModelConfig) -> int:
    """The decoder's final norm, and the MLM transform (weight, bias, norm) with its output bias."""
    d = model.hidden_size
    mlm = d * d + 2 * d + model.padded_vocab_size if model.has_mlm_head else 0
    return d + mlm


def position_parameters(model: ModelConfig, length: int) -> int:
    """Learned positions of one stack; they belong to its first layer."""
    return length * model.hidden_size if model.positions == "learned" else 0


def parameter_count(model: ModelConfig, *, encoder_seq_length: int = 0, decoder_seq_length: int = 0) -> int:
    """Trainable parameters of the whole model; 11,934,059,264 for the defaults.

    The lengths size learned positions, and count for nothing otherwise.
    """
    bridge = 0 if model.is_decoder_only else model.hidden_size
    positions = 0 if model.is_decoder_only else position_parameters(model, encoder_seq_length)
    return (
        positions
        + position_parameters(model, decoder_seq_length)
        + table_parameters(model)
        + stack_parameters(model, "encoder")
        + bridge
        + stack_parameters(model, "decoder")
        + head_parameters(model)
    )


# --------------------------------------------------------------------------------------------------- FLOPs


def attention_kernel_flops(
    model: ModelConfig, branch: Branch, length: int, *, causal: bool, heads: range | None = None
) -> int:
    """The two products of one branch over a stream of `length` tokens: scores, and scores times values; forward.

    Dense patterns compute every pair, whatever the mask. Local ones fill the stream to whole chunks, each of which
    meets itself and its neighbours; selected blocks are as many as there may be. Axial heads meet a row if their global
    index is even, else a column. `heads` are the global indices to count; all if it is not given.
    """
    heads = heads if heads is not None else range(model.num_attention_heads)
    head_dim, sink = model.resolved_head_dim, len(model.sinks((branch,)))
    if branch == "select":
        blocks = -(-length // model.axial_width)
        keys = (min(model.select_blocks, blocks) + 1) * model.axial_width
        return 4 * blocks * model.axial_width * keys * head_dim * len(heads)
    if branch == "local":
        window = model.local_window
        queries = -(-length // window) * window
        return 4 * queries * ((2 if causal else 3) * window + sink) * head_dim * len(heads)
    if branch == "axial":
        width = model.axial_width
        rows = -(-length // width)
        row_heads = sum(1 for head in heads if head % 2 == 0)
        keys = row_heads * (width + sink) + (len(heads) - row_heads) * (rows + sink)
        return 4 * rows * width * head_dim * keys
    return 4 * length * length * head_dim * len(heads)


def self_attention_flops(model: ModelConfig, branches: Branches, length: int, *, causal: bool) -> int:
    """Projections and kernels of one self-attention mix, forward, one sample."""
    d, inner, heads = model.hidden_size, inner_size(model), model.num_attention_heads
    projections = 2 * length * d * inner * 4 * len(branches)
    dynamic = 2 * length * d * 2 * heads if "dynamic" in branches else 0
    kernels = sum(attention_kernel_flops(model, branch, length, causal=causal) for branch in branches)
    return projections + dynamic + kernels + routing_flops(model, branches, length, heads)


def routing_flops(model: ModelConfig, branches: Branches, length: int, heads: int) -> int:
    """Scores of blocks for blocks in a select branch, over a stream of `length` tokens; they have no backward pass."""
    blocks = -(-length // model.axial_width)
    return 2 * blocks * blocks * model.resolved_head_dim * heads if "select" in branches else 0


def cross_attention_flops(model: ModelConfig, length: int, memory_length: int) -> int:
    """q and output over the decoder stream, k and v over the memory, and the dense kernel; forward, one sample."""
    d, inner = model.hidden_size, inner_size(model)
    return 4 * length * d * inner + 4 * memory_length * d * inner + 4 * length * memory_length * inner


def feed_forward_flops(model: ModelConfig, length: int) -> int:
    """SwiGLU, forward, one sample."""
    return 6 * length * model.hidden_size * model.ffn_hidden_size


def encoder_layer_flops(config: RunConfig, branches: Branches) -> int:
    """One encoder layer, forward, one sample."""
    model, length = config.model, config.data.encoder_seq_length
    mix = self_attention_flops(model, branches, length, causal=False)
    return mix + feed_forward_flops(model, length)


def decoder_layer_flops(config: RunConfig, branches: Branches) -> int:
    """One decoder layer, forward, one sample."""
    model, length = config.model, config.data.decoder_seq_length
    mix = self_attention_flops(model, branches, length, causal=True)
    cross = 0 if model.is_decoder_only else cross_attention_flops(model, length, config.data.encoder_seq_length)
    return mix + cross + feed_forward_flops(model, length)


def head_flops(config: RunConfig) -> int:
    """The MLM transform over the encoder stream, forward, one sample."""
    return 2 * config.data.encoder_seq_length * config.model.hidden_size**2 if config.model.has_mlm_head else 0


def output_flops(config: RunConfig) -> int:
    """Logits of both heads over the padded vocabulary, forward, one sample."""
    tokens = config.data.decoder_seq_length
    if config.model.has_mlm_head:
        tokens += config.data.encoder_seq_length
    return 2 * tokens * table_parameters(config.model)


def tokens_per_sample(config: RunConfig) -> int:
    """Tokens a sample consumes: both streams."""
    encoder = 0 if config.model.is_decoder_only else config.data.encoder_seq_length
    return encoder + config.data.decoder_seq_length


def forward_flops_per_sample(config: RunConfig) -> int:
    """FLOPs of one forward pass over one sample."""
    return sum(cost.forward_flops for cost in layer_costs(config))


def training_flops_per_sample(config: RunConfig) -> int:
    """Model FLOPs of forward and backward over one sample: three forwards, no recomputation. The numerator of MFU."""
    return 3 * forward_flops_per_sample(config)


def training_flops_per_token(config: RunConfig) -> float:
    """Model FLOPs of forward and backward per consumed token.

    A token visits one half of an encoder-decoder, so this is close to 6 N / 2 plus attention, not 6 N.
    """
    return training_flops_per_sample(config) / tokens_per_sample(config)


# -------------------------------------------------------------------------------------------------- the layer list


def layer_names(model: ModelConfig) -> list[str]:
    """Names of the layer list, in order of execution."""
    decoder = [f"decoder.layers.{index}" for index in range(model.decoder_layers)]
    if model.is_decoder_only:
        return ["embedding", *decoder, "head", "output"]
    encoder = [f"encoder.layers.{index}" for index in range(model.encoder_layers)]
    return ["embedding", *encoder, "bridge", *decoder, "head", "output"]


def layer_kind(stack: str, branches: Branches | None = None) -> str:
    """Return the name of a kind of layer; with the branches that tell it from others of its stack, if there are any."""
    return stack if branches is None else f"{stack} [{', '.join(branches)}]"


def stack_of(kind: str) -> str:
    """Return the kind without its branches: encoder, decoder, or what is neither."""
    return kind.partition(" ")[0]


def stack_kinds(model: ModelConfig, stack: Stack) -> dict[str, Branches]:
    """Return the kinds of layers of a stack with their branches; one where all layers are alike."""
    pattern = dict.fromkeys(model.branch_pattern(stack))
    return {layer_kind(stack, branches if len(pattern) > 1 else None): branches for branches in pattern}


def layer_costs(config: RunConfig) -> list[LayerCost]:
    """Parameters and forward FLOPs per sample of every entry of the layer list."""
    model, table = config.model, table_parameters(config.model)
    encoder = [] if model.is_decoder_only else [*_stack_costs(config, "encoder")]
    bridge = [] if model.is_decoder_only else [LayerCost("bridge", model.hidden_size, table, 0, "bridge")]
    return [
        LayerCost("embedding", table, table, 0, "embedding"),
        *encoder,
        *bridge,
        *_stack_costs(config, "decoder"),
        LayerCost("head", head_parameters(model), 0, head_flops(config), "head"),
        LayerCost("output", 0, table, output_flops(config), "output"),
    ]


def _stack_costs(config: RunConfig, stack: Stack) -> Iterator[LayerCost]:
    model, is_encoder = config.model, stack == "encoder"
    parameters = encoder_layer_parameters if is_encoder else decoder_layer_parameters
    flops = encoder_layer_flops if is_encoder else decoder_layer_flops
    kinds = {branches: kind for kind, branches in stack_kinds(model, stack).items()}
    costs = {branches: (parameters(model, branches), flops(config, branches)) for branches in kinds}
    length = config.data.encoder_seq_length if is_encoder else config.data.decoder_seq_length
    for layer in range(model.encoder_layers if is_encoder else model.decoder_layers):
        branches = model.layer_branches(stack, layer)
        count, computed = costs[branches]
        owned = count + (position_parameters(model, length) if layer == 0 else 0)
        yield LayerCost(f"{stack}.layers.{layer}", owned, 0, computed, kinds[branches])
