"""One pipeline stage on one rank: the layers it holds, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from megatron_omega import accounting
from megatron_omega.config.schema import Branches, RunConfig, Stack
from megatron_omega.planner import activations
from megatron_omega.planner.activations import Shape
from megatron_omega.planner.candidates import Candidate
from megatron_omega.planner.hardware import BACKWARD_HOST, CHECKPOINT_HOST, Hardware
from megatron_omega.planner.memory import Moment
from megatron_omega.planner.work import (
    BACKWARD_LAUNCHES,
    BACKWARD_TRAFFIC,
    FORWARD_TRAFFIC,
    Collective,
    Messages,
    Work,
    table_parameters,
)

USES_TABLE = ("embedding", "bridge", "output")


@dataclass(frozen=True)
class Seconds:
    """Time of one kind of layer, or of a stage, for one micro-batch."""

    forward: float
    backward: float
    """Recomputation included."""
    communication: float
    """Share of both that is tensor-parallel communication."""


@dataclass(frozen=True)
class Stage:
    """Consecutive layers."""

    first: int
    """Index of its first layer in the layer list."""
    kinds: tuple[str, ...]
    learned_positions: tuple[int, ...] = ()
    """Lengths of the tables of learned positions that first layers in it own."""

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(self.kinds)

    @cached_property
    def has_table(self) -> bool:
        return any(kind in USES_TABLE for kind in self.kinds)

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal for stages that do the same."""
        return (*sorted(self.counts.items()), self.learned_positions)

    def describe(self) -> str:
        """Return its layers in words: `embedding + 24 encoder`."""
        return " + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in self.counts.items())

    def parameters(self, config: RunConfig, works: Mapping[str, Work]) -> int:
        """Local parameters, the token table apart."""
        positions = sum(self.learned_positions) * config.model.hidden_size
        return positions + sum(works[kind].parameters * count for kind, count in self.counts.items())

    def forward_flops(self, works: Mapping[str, Work]) -> int:
        return sum(works[kind].forward_flops * count for kind, count in self.counts.items())

    def total_flops(self, works: Mapping[str, Work]) -> int:
        """Forward, recomputed and backward FLOPs of one micro-batch."""
        return sum(works[kind].total_flops * count for kind, count in self.counts.items())

    def launches(self, works: Mapping[str, Work]) -> int:
        """Kernels of forward and backward of one micro-batch."""
        return sum(
            round((works[kind].launches * (1 + BACKWARD_LAUNCHES) + works[kind].recomputed_launches) * count)
            for kind, count in self.counts.items()
        )

    def messages(self, config: RunConfig, works: Mapping[str, Work]) -> Messages:
        """Tensor-parallel messages of forward and backward of one micro-batch."""
        total: Messages = Counter()
        if config.parallel.sequence_parallel:  # every rank looks up its own tokens' positions
            row = config.model.hidden_size * Shape.of(config).element
            total.update(Collective("all_reduce", length * row) for length in self.learned_positions)
        for kind, count in self.counts.items():
            for messages in (works[kind].forward_messages, works[kind].backward_messages):
                for message, number in messages.items():
                    total[message] += number * count
        return total

    def kept(self, config: RunConfig, works: Mapping[str, Work], shape: Shape) -> int:
        """Bytes kept for the backward pass of one micro-batch, shared tensors once."""
        kept = sum(works[kind].kept * count for kind, count in self.counts.items())
        counts = Counter(accounting.stack_of(kind) for kind in self.kinds)
        uses_memory = counts["decoder"] or (counts["head"] and config.model.has_mlm_head)
        if uses_memory:
            kept += activations.memory_between_layers(config, shape)
        kept += activations.facts(config, shape, self._branches(config, "encoder"), self._branches(config, "decoder"))
        return kept + sum(shape.micro_batch * length * activations.INT64 for length in self.learned_positions)

    def _branches(self, config: RunConfig, stack: Stack) -> Branches:
        """Return all branches of the stage's layers of one stack."""
        kinds = accounting.stack_kinds(config.model, stack)
        return tuple(dict.fromkeys(branch for kind in self.counts if kind in kinds for branch in kinds[kind]))

    def backward_moments(self, config: RunConfig, works: Mapping[str, Work], shape: Shape) -> Iterator[Moment]:
        """Yield the first and the last layer of every run of equal layers, in the order of a backward pass.

        In between everything is linear, so that one of these is the fullest.
        """
        kept = self.kept(config, works, shape)
        formed = sum(self.learned_positions) * config.model.hidden_size
        table, seen, uses = table_parameters(config), 0, sum(kind in USES_TABLE for kind in self.kinds)
        for kind, group in groupby(reversed(self.kinds)):
            work, count = works[kind], len(list(group))
            # The table's gradient waits until all that use it have added theirs.
            working = work.working + table * shape.element * (0 < seen < uses)
            yield Moment(kept, working, formed)
            if count > 1:
                yield Moment(kept - (count - 1) * work.kept, working, formed + (count - 1) * work.parameters)
            kept -= count * work.kept
            formed += count * work.parameters
            seen += kind in USES_TABLE
            formed += table * (seen == uses > 0 and kind in USES_TABLE)

    def seconds(self, times: Mapping[str, Seconds]) -> Seconds:
        """Add up the layers."""
        counts = self.counts.items()
        return Seconds(
            sum(times[kind].forward * count for kind, count in counts),
            sum(times[kind].backward * count for kind, count in counts),
            sum(times[kind].communication * count for kind, count in counts),
        )


def cut(config: RunConfig, candidate: Candidate, costs: Sequence[accounting.LayerCost]) -> list[Stage]:
    """Return the stages of `candidate`, in the order of the layers."""
    boundaries = config.parallel.stage_boundaries or accounting.stage_boundaries(costs, candidate.num_stages)
    edges = [0, *boundaries, len(costs)]
    return [_stage(config, first, costs[first:last]) for first, last in pairwise(edges)]


def _stage(config: RunConfig, first: int, costs: Sequence[accounting.LayerCost]) -> Stage:
    names = [cost.name for cost in costs]
    lengths = {"encoder.layers.0": config.data.encoder_seq_length, "decoder.layers.0": config.data.decoder_seq_length}
    is_learned = config.model.positions == "learned"
    learned = tuple(lengths[name] for name in names if is_learned and name in lengths)
    return Stage(first, tuple(cost.kind for cost in costs), learned)


@dataclass(frozen=True)
class Host:
    """What the host does for a layer beside launching its kernels one by one."""

    is_compiled: bool = False
    """Whether kernels are those that torch.compile fuses."""
    hooks: float = 0.0
    """What ZeRO-3 runs around a layer, forward and backward together, in launches."""


COMPILED_LAUNCHES = 0.31
"""Kernels of a compiled layer pair: 101 instead of 328, forward and backward (counted)."""
COMPILED_TRAFFIC = 0.77
"""Its saved bytes (counted), which stand for what element-wise kernels move."""


def layer_seconds(
    work: Work, hardware: Hardware, dtype: str, element: int, tensor: int, host: Host = Host()
) -> Seconds:  # fmt: skip
    """Time of one layer: its kernels one after the other, then its messages.

    A GPU is never faster than its host can launch; a CPU does one after the other. A product is computed once forward
    and twice backward; attention computes its scores again there (2.5 times). Messages of entering the tensor-parallel
    region run behind the gradients of the weights that take them in; on a CPU, whose cores send too, they do not.
    """
    is_fused = host.is_compiled and work.head_dim > 0  # of layers, not of embeddings and heads
    share_of = (COMPILED_TRAFFIC, COMPILED_LAUNCHES) if is_fused else (1.0, 1.0)

    def kernels(products: float, attention: float, traffic: float, launches: float) -> float:
        seconds = products + hardware.attention_seconds(attention, dtype, work.head_dim)
        seconds += hardware.traffic_seconds(share_of[0] * traffic)
        hooks = host.hooks / 2 if work.head_dim else 0.0
        launching = (launches * share_of[1] + hooks) * hardware.facts.launch_seconds
        return seconds + launching if hardware.facts.is_cpu else max(seconds, launching)

    def messages(counted: Messages) -> float:
        return sum(
            count * hardware.collective_seconds(message.kind, message.num_bytes, tensor, 1)
            for message, count in counted.items()
        )

    products = sum(p.count * hardware.product_seconds(p.m, p.n, p.k, dtype, element) for p in work.products)
    again = sum(p.count * hardware.product_seconds(p.m, p.n, p.k, dtype, element) for p in work.recomputed)
    share = work.expected
    launches_backward, checkpoint = BACKWARD_LAUNCHES, (0, 0)
    if hardware.facts.is_cpu:  # where nothing runs beside launching, its true cost counts
        launches_backward, checkpoint = BACKWARD_HOST, CHECKPOINT_HOST if work.is_checkpointed else (0, 0)
    products_backward = 0.0 if work.forms_gradients else 2 * products
    forward = kernels(
        (3 * products if work.forms_gradients else products) * share,
        work.attention_flops,
        work.traffic * share,
        work.launches + checkpoint[0],
    )
    backward = kernels(
        products_backward + again,
        2.5 * work.attention_flops + work.recomputed_attention_flops,
        work.traffic * share * BACKWARD_TRAFFIC / FORWARD_TRAFFIC + work.recomputed_traffic,
        work.launches * launches_backward + work.recomputed_launches + checkpoint[1],
    )
    sent_forward, sent_backward = messages(work.forward_messages), messages(work.backward_messages)
    sent_backward -= _hidden(work, hardware, products, tensor)
    return Seconds(forward + sent_forward, backward + sent_backward, sent_forward + sent_backward)


def _hidden(work: Work, hardware: Hardware, products: float, tensor: int) -> float:
    """Seconds of a layer's messages that run while it computes gradients of weights.

    `products` are the forward pass's seconds: as long as the weights' gradients, about two thirds of which belong to
    weights that take in the residual stream.
    """
    if hardware.facts.is_cpu or not work.entering:
        return 0.0
    scatters = [message for message in work.backward_messages if message.kind == "reduce_scatter"]
    whole = max(scatters or work.backward_messages, key=lambda message: message.num_bytes)
    message = hardware.collective_seconds(whole.kind, whole.num_bytes, tensor, 1)
    return work.entering * min(message, 2 / 3 * products / work.entering)
