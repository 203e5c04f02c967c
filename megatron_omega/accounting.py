"""What a model costs: parameters, FLOPs, and where to cut its layer list into pipeline stages. Plain arithmetic.

This is the one place that counts. The pipeline's stage cuts, the MFU of a running job, `tools/plan.py` and
`tools/dry_run.py` all read it. It knows the shape of the model and of a sample; it knows nothing of ranks,
memory, time or hardware (those are `planner`'s), and it imports no torch.

Conventions: FLOPs count a multiply-add as two and only matrix products (what `FlopCounterMode` counts); "per
sample" is one sequence of each stream; parameters are global, not the slice of a tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_omega.config.schema import Branch, ModelConfig, RunConfig

BRIDGE_TOLERANCE = 0.03
"""A cut in front of the bridge is taken when it makes the largest stage at most this much larger."""


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

    @property
    def kind(self) -> str:
        """embedding, encoder, bridge, decoder, head or output."""
        return self.name.partition(".")[0]


# ---------------------------------------------------------------------------------------------- parameters


def inner_size(model: ModelConfig) -> int:
    """Width of all heads of one branch together, H x dh."""
    return model.num_attention_heads * model.resolved_head_dim


def attention_parameters(model: ModelConfig, branches: Sequence[Branch]) -> int:
    """Self-attention mix: one qkv, one output matrix, QK gains of every branch, tau and gate of a dynamic one."""
    inner, d = inner_size(model), model.hidden_size
    matrices = len(branches) * 4 * inner * d
    gains = len(branches) * 2 * inner
    dynamic = 2 * model.num_attention_heads * (d + 1) if "dynamic" in branches else 0
    return matrices + gains + dynamic


def cross_attention_parameters(model: ModelConfig) -> int:
    """Cross-attention of one decoder layer: q, k, v, output and QK gains."""
    inner = inner_size(model)
    return 4 * inner * model.hidden_size + 2 * inner


def feed_forward_parameters(model: ModelConfig) -> int:
    """SwiGLU: gate, up and down."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def encoder_layer_parameters(model: ModelConfig) -> int:
    """One encoder layer, its two norms included."""
    return attention_parameters(model, model.encoder_branches) + feed_forward_parameters(model) + 2 * model.hidden_size


def decoder_layer_parameters(model: ModelConfig) -> int:
    """One decoder layer with its norms; cross-attention (and its norm) only where there is an encoder."""
    cross = 0 if model.is_decoder_only else cross_attention_parameters(model) + model.hidden_size
    return (
        attention_parameters(model, model.decoder_branches)
        + cross
        + feed_forward_parameters(model)
        + 2 * model.hidden_size
    )


def table_parameters(model: ModelConfig) -> int:
    """The tied token table, padding included."""
    return model.padded_vocab_size * model.hidden_size


def head_parameters(model: ModelConfig) -> int:
    """The decoder's final norm, and the MLM transform (weight, bias, norm) with its output bias."""
    d = model.hidden_size
    mlm = d * d + 2 * d + model.padded_vocab_size if model.has_mlm_head else 0
    return d + mlm


def parameter_count(model: ModelConfig) -> int:
    """Trainable parameters of the whole model; 11,934,059,264 for the defaults."""
    bridge = 0 if model.is_decoder_only else model.hidden_size
    return (
        table_parameters(model)
        + model.encoder_layers * encoder_layer_parameters(model)
        + bridge
        + model.decoder_layers * decoder_layer_parameters(model)
        + head_parameters(model)
    )


# --------------------------------------------------------------------------------------------------- FLOPs


def attended_keys(model: ModelConfig, branch: Branch, length: int, *, causal: bool) -> float:
    """Keys that the kernel of `branch` multiplies with each query of a stream of `length` tokens, on average.

    Dense patterns compute every pair, whatever the mask; local ones their own and the neighbouring chunks; axial
    ones a row on the even heads and a column on the odd ones.
    """
    if branch == "local":
        return (2 if causal else 3) * model.local_window
    if branch == "axial":
        heads = model.num_attention_heads
        rows = (heads + 1) // 2
        columns = -(-length // model.axial_width)
        return (rows * model.axial_width + (heads - rows) * columns) / heads
    return length


def self_attention_flops(model: ModelConfig, branches: Sequence[Branch], length: int, *, causal: bool) -> int:
    """Projections and kernels of one self-attention mix, forward, one sample."""
    d, inner, heads = model.hidden_size, inner_size(model), model.num_attention_heads
    projections = 2 * length * d * inner * 4 * len(branches)
    dynamic = 2 * length * d * 2 * heads if "dynamic" in branches else 0
    kernels = sum(round(4 * length * inner * attended_keys(model, b, length, causal=causal)) for b in branches)
    return projections + dynamic + kernels


def cross_attention_flops(model: ModelConfig, length: int, memory_length: int) -> int:
    """q and output over the decoder stream, k and v over the memory, and the dense kernel; forward, one sample."""
    d, inner = model.hidden_size, inner_size(model)
    return 4 * length * d * inner + 4 * memory_length * d * inner + 4 * length * memory_length * inner


def feed_forward_flops(model: ModelConfig, length: int) -> int:
    """SwiGLU, forward, one sample."""
    return 6 * length * model.hidden_size * model.ffn_hidden_size


def encoder_layer_flops(config: RunConfig) -> int:
    """One encoder layer, forward, one sample."""
    model, length = config.model, config.data.encoder_seq_length
    mix = self_attention_flops(model, model.encoder_branches, length, causal=False)
    return mix + feed_forward_flops(model, length)


def decoder_layer_flops(config: RunConfig) -> int:
    """One decoder layer, forward, one sample."""
    model, length = config.model, config.data.decoder_seq_length
    mix = self_attention_flops(model, model.decoder_branches, length, causal=True)
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


# ---------------------------------------------------------------------------------- the layer list, and its cuts


def layer_names(model: ModelConfig) -> list[str]:
    """Names of the layer list, in order of execution."""
    decoder = [f"decoder.layers.{index}" for index in range(model.decoder_layers)]
    if model.is_decoder_only:
        return ["embedding", *decoder, "head", "output"]
    encoder = [f"encoder.layers.{index}" for index in range(model.encoder_layers)]
    return ["embedding", *encoder, "bridge", *decoder, "head", "output"]


def layer_costs(config: RunConfig) -> list[LayerCost]:
    """Parameters and forward FLOPs per sample of every entry of the layer list."""
    model = config.model
    table = table_parameters(model)
    kinds = {
        "embedding": (table, table, 0),
        "bridge": (model.hidden_size, table, 0),
        "head": (head_parameters(model), 0, head_flops(config)),
        "output": (0, table, output_flops(config)),
        "encoder": (
            encoder_layer_parameters(model),
            0,
            0 if model.is_decoder_only else encoder_layer_flops(config),
        ),
        "decoder": (decoder_layer_parameters(model), 0, decoder_layer_flops(config)),
    }
    return [LayerCost(name, *kinds[name.partition(".")[0]]) for name in layer_names(model)]


def stage_boundaries(
    costs: Sequence[LayerCost],
    num_stages: int,
    *,
    weight: Callable[[LayerCost], float] | None = None,
) -> tuple[int, ...]:
    """Cut the layer list into `num_stages` contiguous stages, the heaviest of which is as light as possible.

    Returns the index of the first layer of stages 1, 2, ... (num_stages - 1 numbers). Equal loads are decided by
    parameters, then by evenness with the lighter stages in front, where 1F1B keeps the most activations. Head and
    output stay together; the cut falls in front of the bridge where that costs at most `BRIDGE_TOLERANCE`, for a
    stage that sends memory and hidden state has two outputs to run its backward pass from. `weight` is the load of
    a layer (default: its forward FLOPs). Interleaved schedules ask for as many stages as they have chunks. Raises
    ValueError when there are fewer layers than stages.
    """
    kinds = [cost.kind for cost in costs]
    last = len(costs) - 1 if "output" in kinds else len(costs)  # output is glued to the head in front of it
    if not 1 <= num_stages <= last:
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages; use 1 to {last}")
    loads = [float(weight(cost) if weight else cost.forward_flops) for cost in costs]
    sizes = [float(cost.parameters) for cost in costs]
    if last < len(costs):
        loads[last - 1 :] = [loads[last - 1] + loads[last]]
        sizes[last - 1 :] = [sizes[last - 1] + sizes[last]]
    bridge = kinds.index("bridge") if "bridge" in kinds else None
    return _cut_at_bridge(tuple(loads), tuple(sizes), num_stages, bridge)


@lru_cache(maxsize=512)
def _cut_at_bridge(
    loads: tuple[float, ...],
    sizes: tuple[float, ...],
    num_stages: int,
    bridge: int | None,
) -> tuple[int, ...]:
    free = _cut(loads, sizes, num_stages)
    if bridge is None or num_stages == 1:
        return free
    fewest, most = (
        max(1, num_stages - (len(loads) - bridge)),
        min(bridge, num_stages - 1),
    )
    if fewest > most:
        return free

    def bottleneck(front: int) -> float:
        return max(
            _bottleneck(loads[:bridge], front),
            _bottleneck(loads[bridge:], num_stages - front),
        )

    front = min(range(fewest, most + 1), key=bottleneck)
    if bottleneck(front) > (1 + BRIDGE_TOLERANCE) * _bottleneck(loads, num_stages):
        return free
    encoder = _cut(loads[:bridge], sizes[:bridge], front)
    decoder = _cut(loads[bridge:], sizes[bridge:], num_stages - front)
    return (*encoder, bridge, *(bridge + cut for cut in decoder))


def _latest_starts(loads: Sequence[float], limit: float, sizes: Sequence[float], size_limit: float) -> list[int] | None:
    """Earliest layer at which the last k stages can begin under both limits, for k = 0, 1, ...; None: never the first.

    Filling stages from the back is optimal: a stage that starts earlier leaves a prefix that is no heavier.
    """
    starts = [len(loads)]
    while starts[-1] > 0:
        start, load, size = starts[-1], 0.0, 0.0
        while start > 0 and load + loads[start - 1] <= limit and size + sizes[start - 1] <= size_limit:
            start -= 1
            load, size = load + loads[start], size + sizes[start]
        if start == starts[-1]:
            return None
        starts.append(start)
    return starts


def _fits(
    loads: Sequence[float],
    limit: float,
    sizes: Sequence[float],
    size_limit: float,
    num_stages: int,
) -> bool:
    starts = _latest_starts(loads, limit, sizes, size_limit)
    return starts is not None and len(starts) - 1 <= num_stages


def _smallest(values: Sequence[float], fits: Callable[[float], bool]) -> float:
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle + 1, high)
    return values[low]


def _run_sums(values: Sequence[float]) -> list[float]:
    """Every sum a stage could have, ascending. Sums run from the back, as `_latest_starts` adds them."""
    sums: set[float] = set()
    for end in range(len(values), 0, -1):
        total = 0.0
        for value in reversed(values[:end]):
            total += value
            sums.add(total)
    return sorted(sums)


@lru_cache(maxsize=4096)
def _bottleneck(loads: tuple[float, ...], num_stages: int) -> float:
    """Load of the heaviest stage of the best cut. Sizes do not count."""
    nothing = [0.0] * len(loads)
    return _smallest(_run_sums(loads), lambda limit: _fits(loads, limit, nothing, 0.0, num_stages))


def _cut(loads: tuple[float, ...], sizes: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    limit = _bottleneck(loads, num_stages)
    size_limit = _smallest(_run_sums(sizes), lambda size: _fits(loads, limit, sizes, size, num_stages))
    starts = _latest_starts(loads, limit, sizes, size_limit)
    assert starts is not None  # both limits were found feasible
    cuts: list[int] = []
    begin = 0
    for stage in range(num_stages - 1):
        behind = num_stages - 1 - stage
        earliest = max(begin + 1, starts[min(behind, len(starts) - 1)])
        target = sum(loads[begin:]) / (behind + 1)
        end = begin
        load = size = 0.0
        while end < len(loads) - behind:
            within = load + loads[end] <= limit * (1 + 1e-12) and size + sizes[end] <= size_limit * (1 + 1e-12)
            if end >= earliest and (not within or load + loads[end] > target):
                break
            load, size, end = load + loads[end], size + sizes[end], end + 1
        cuts.append(end)
        begin = end
    return tuple(cuts)
