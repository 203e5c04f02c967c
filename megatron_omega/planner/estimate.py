"""From a configuration, a layout and a machine to memory, step time and messages. No torch, no measurement.

The step time is a roofline: every stage's kernels at stated efficiencies, tensor-parallel messages behind them, the
pipeline on a virtual clock (or its closed form, for ranking), then gradients, tied table and optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_omega import accounting
from megatron_omega.config.interleaving import Interleaving, fullest_moment
from megatron_omega.config.schema import RunConfig
from megatron_omega.planner import pipeline_schedule as schedule
from megatron_omega.planner.activations import FP32, Shape
from megatron_omega.planner.candidates import Candidate
from megatron_omega.planner.hardware import COPIES, CPU_STEP_SECONDS, PARTITION_HOST, CollectiveKind, Hardware
from megatron_omega.planner.memory import InFlight, Memory, Moment, States, fullest
from megatron_omega.planner.messages import data_bytes, persistent_parameters, tied_ranks
from megatron_omega.planner.orthogonal import STEPS, exchanged_bytes, moved_matrices, moved_parameters
from megatron_omega.planner.stages import Host, Seconds, Stage, cut, layer_seconds
from megatron_omega.planner.work import Work, layer_works, pipeline_messages, table_parameters

EXACT_INSTRUCTIONS = 40_000
"""Largest schedule (ranks x micro-batches) that is executed on the virtual clock; larger ones use the closed form."""
ACCUMULATED = 18
"""Bytes per parameter and micro-batch that adding up bf16 gradients in fp32 moves."""


@dataclass(frozen=True)
class Breakdown:
    """Where the seconds of a step go, on the slowest path."""

    compute: float
    tensor_communication: float
    bubble: float
    """Waiting for other stages, transfers between stages included."""
    data_communication: float
    """Gradients and weights between replicas, what is not hidden behind the backward pass; tied table."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor_communication + self.bubble + self.data_communication + self.optimizer


@dataclass(frozen=True)
class Estimate:
    """What one layout costs on one machine."""

    config: RunConfig
    """With the layout applied."""
    candidate: Candidate
    hardware: Hardware
    stages: tuple[Stage, ...]
    seconds: tuple[Seconds, ...]
    """Per stage, one micro-batch."""
    ranks: tuple[Memory, ...]
    """Memory of each pipeline rank."""
    breakdown: Breakdown
    launches: int
    """Kernels of the busiest rank in a step."""

    @property
    def step_seconds(self) -> float:
        return self.breakdown.total

    @property
    def interval(self) -> tuple[float, float]:
        """Step time with its error bar."""
        spread = self.hardware.facts.efficiency.spread
        return self.step_seconds / (1 + spread), self.step_seconds * (1 + spread)

    @property
    def peak_memory(self) -> int:
        return max(rank.total for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.hardware.memory_bytes

    @property
    def micro_batches(self) -> int:
        return self.config.batch.global_batch_size // (self.candidate.micro_batch * self.candidate.data)

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch.global_batch_size * accounting.tokens_per_sample(self.config) / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over peak, recomputation not counted."""
        flops = accounting.training_flops_per_sample(self.config) * self.config.batch.global_batch_size
        peak = self.hardware.peak(self.config.precision.dtype) * self.candidate.world_size
        return flops / (self.step_seconds * peak)

    @property
    def bubble(self) -> float:
        """Share of the step in which the slowest path waits for other stages."""
        return self.breakdown.bubble / self.step_seconds

    @cached_property
    def timeline(self) -> schedule.Timeline:
        """One step on the virtual clock."""
        candidate = self.candidate
        instructions = schedule.instructions(
            candidate.schedule, candidate.pipeline, self.micro_batches, candidate.virtual_stages
        )
        forward, backward = [s.forward for s in self.seconds], [s.backward for s in self.seconds]
        return schedule.execute(instructions, forward, backward, transfer_seconds(self))


class Planner:
    """Estimates layouts of one configuration on one machine; remembers what layouts have in common."""

    hides_sums = True
    """Whether the sum over replicas of bf16 gradients runs behind the last micro-batch (engine/early_sums.py)."""

    def __init__(self, config: RunConfig, hardware: Hardware, *, hooks: float = PARTITION_HOST) -> None:
        """`hooks`: what ZeRO-3 costs a GPU's host per layer and micro-batch, in launches."""
        self.config, self.hardware, self.hooks = config, hardware, hooks
        self._costs = accounting.layer_costs(config)
        self._works: dict[tuple[object, ...], tuple[dict[str, Work], dict[str, Seconds], Shape]] = {}
        self._stages: dict[tuple[int, object], list[Stage]] = {}
        self._moments: dict[tuple[object, ...], tuple[int, tuple[Moment, ...]]] = {}

    def estimate(self, candidate: Candidate, *, exact: bool = False) -> Estimate:
        """Return the estimate of one legal layout; `exact` runs its schedule on the virtual clock."""
        config = candidate.apply(self.config)
        works, times, shape = self._common(config, candidate)
        stages = self._cut(config, candidate)
        seconds = tuple(stage.seconds(times) for stage in stages)
        ranks = tuple(self._memory(config, candidate, stages, rank, works, shape) for rank in range(candidate.pipeline))
        launches = max(
            sum(stages[s].launches(works) for s in candidate.stages_of(rank)) for rank in range(candidate.pipeline)
        )
        estimate = Estimate(
            config, candidate, self.hardware, tuple(stages), seconds, ranks, Breakdown(0, 0, 0, 0, 0), 0
        )
        estimate = replace(estimate, launches=launches * estimate.micro_batches)
        return replace(estimate, breakdown=self._breakdown(estimate, works, exact=exact))

    def works(self, candidate: Candidate) -> dict[str, Work]:
        """Return what each kind of layer asks of a rank of `candidate`."""
        return self._common(candidate.apply(self.config), candidate)[0]

    def layer_works(self, config: RunConfig) -> dict[str, Work]:
        """Return the work of each kind of layer of `config`, a layout applied."""
        return layer_works(config)

    def _common(self, config: RunConfig, c: Candidate) -> tuple[dict[str, Work], dict[str, Seconds], Shape]:
        is_hooked = c.zero_stage == 3 and not self.hardware.facts.is_cpu
        key = (c.tensor, c.sequence_parallel, c.micro_batch, c.recompute, is_hooked)
        if key not in self._works:
            works, shape = self.layer_works(config), Shape.of(config)
            host = Host(config.training.compile == "layers", self.hooks if is_hooked else 0.0)
            dtype = config.precision.dtype
            times = {
                kind: layer_seconds(work, self.hardware, dtype, shape.element, c.tensor, host)
                for kind, work in works.items()
            }
            self._works[key] = works, times, shape
        return self._works[key]

    def _cut(self, config: RunConfig, candidate: Candidate) -> list[Stage]:
        key = (candidate.num_stages, config.parallel.stage_boundaries)
        if key not in self._stages:
            self._stages[key] = cut(config, candidate, self._costs)
        return self._stages[key]

    def _memory(
        self, config: RunConfig, c: Candidate, stages: list[Stage], rank: int, works: dict[str, Work], shape: Shape
    ) -> Memory:
        mine = [stages[index] for index in c.stages_of(rank)]
        micro_batches = config.batch.global_batch_size // (c.micro_batch * c.data)
        parameters = sum(stage.parameters(config, works) for stage in mine)
        if any(stage.has_table for stage in mine):
            parameters += table_parameters(config)
        is_cpu = self.hardware.facts.is_cpu
        persistent = sum(persistent_parameters(config, stage, works) for stage in mine) if c.zero_stage == 3 else 0
        matrices = moved_parameters(moved_matrices(config, mine), c.tensor)
        states = States(parameters, config.precision.dtype, c.zero_stage, c.data, persistent, matrices, is_cpu)
        moments = [self._stage_moments(config, c, stages, index, works, shape) for index in c.stages_of(rank)]
        counts = in_flight(c, micro_batches, rank)
        parts = [InFlight(count, *each) for count, each in zip(counts, moments, strict=True)]
        return fullest(states, parts, micro_batches)

    def _stage_moments(
        self, config: RunConfig, c: Candidate, stages: list[Stage], index: int, works: dict[str, Work], shape: Shape
    ) -> tuple[int, tuple[Moment, ...]]:
        """Return what a stage received and waits to have sent for one micro-batch, and its turns in a backward pass."""
        ends = (
            stages[index - 1].kinds[-1] if index else None,
            stages[index + 1].kinds[0] if index + 1 < len(stages) else None,
        )
        key = (c.tensor, c.sequence_parallel, c.micro_batch, c.recompute, stages[index].signature, ends)
        if key not in self._moments:
            stage, travelling = stages[index], 0
            if index:
                travelling += sum(pipeline_messages(config, stages[index - 1].kinds[-1], stage.kinds[0])[0])
            if index + 1 < len(stages):
                travelling += sum(pipeline_messages(config, stage.kinds[-1], stages[index + 1].kinds[0])[0])
            self._moments[key] = travelling, tuple(stage.backward_moments(config, works, shape))
        return self._moments[key]

    def _breakdown(self, estimate: Estimate, works: dict[str, Work], *, exact: bool) -> Breakdown:
        c, m = estimate.candidate, estimate.micro_batches
        per_rank = [[estimate.seconds[s] for s in c.stages_of(rank)] for rank in range(c.pipeline)]
        busiest = max(per_rank, key=lambda parts: sum(s.forward + s.backward for s in parts))
        busy = m * sum(s.forward + s.backward for s in busiest)
        communication = m * sum(s.communication for s in busiest)
        exact = exact and c.pipeline > 1 and c.num_stages * m <= EXACT_INSTRUCTIONS
        span = estimate.timeline.makespan if exact else _makespan(estimate)
        span = max(span, _shared_cores_seconds(estimate, per_rank))
        table, dp_seconds, optimizer = table_parameters(estimate.config), 0.0, 0.0
        for rank in range(c.pipeline):
            mine = [estimate.stages[s] for s in c.stages_of(rank)]
            parameters = sum(stage.parameters(estimate.config, works) for stage in mine)
            parameters += table if any(stage.has_table for stage in mine) else 0
            behind = sum(part.backward for part in per_rank[rank]) if self.hides_sums else 0.0
            sending = _data_seconds(estimate, parameters, busy, behind) + _partition_seconds(estimate, mine)
            dp_seconds = max(dp_seconds, sending)
            own = _optimizer_seconds(estimate, parameters) + _accumulation_seconds(estimate, parameters)
            optimizer = max(optimizer, own + _muon_seconds(estimate, mine))
        tied = tied_ranks(c, estimate.stages)
        if len(tied) > 1:
            stride = c.tensor * c.data * max(1, (max(tied) - min(tied)) // (len(tied) - 1))
            dp_seconds += self.hardware.collective_seconds("all_reduce", table * FP32, len(tied), stride)
        return Breakdown(busy - communication, communication, max(0.0, span - busy), dp_seconds, optimizer)


@lru_cache(maxsize=4096)
def _fullest_moment(shape: Interleaving, rank: int) -> tuple[int, ...]:
    return tuple(fullest_moment(shape, rank))


def in_flight(candidate: Candidate, micro_batches: int, rank: int) -> list[int]:
    """Return the micro-batches in flight in each stage of a rank when it holds most.

    2P to 1 along a V, P to 1 under 1F1B; of interleaved stages, at the first moment when it holds most of all together.
    """
    c = candidate
    if c.schedule == "dualpipev":
        return [min(2 * c.pipeline - stage, micro_batches) for stage in c.stages_of(rank)]
    if c.schedule == "interleaved":
        return list(_fullest_moment(Interleaving(c.pipeline, c.virtual_stages, micro_batches), rank))
    return [schedule.in_flight("1f1b", c.pipeline, micro_batches, rank)]


def transfer_seconds(estimate: Estimate) -> list[float]:
    """Seconds of a transfer over each cut; nothing where both stages are on one rank."""
    c, stages, hardware = estimate.candidate, estimate.stages, estimate.hardware
    seconds: list[float] = []
    known: dict[tuple[str, str], float] = {}
    for index in range(len(stages) - 1):
        if c.schedule == "dualpipev" and index == c.pipeline - 1:
            seconds.append(0.0)
            continue
        ends = stages[index].kinds[-1], stages[index + 1].kinds[0]
        if ends not in known:
            num_bytes = sum(pipeline_messages(estimate.config, *ends)[0])
            known[ends] = hardware.collective_seconds("transfer", num_bytes, 2, c.tensor * c.data)
        seconds.append(known[ends])
    return seconds


def _shared_cores_seconds(estimate: Estimate, per_rank: list[list[Seconds]]) -> float:
    """Seconds that the cores need for the work of all ranks of a node, if there are fewer cores than ranks.

    Beside the layers, they take turns at what the host does once a step in each rank.
    """
    facts, c = estimate.hardware.facts, estimate.candidate
    if facts.cores is None:
        return 0.0
    work = estimate.micro_batches * sum(s.forward + s.backward for parts in per_rank for s in parts)
    if c.world_size > facts.cores:
        work += c.pipeline * CPU_STEP_SECONDS
    return work * c.tensor * c.data / (facts.cores * max(1, c.world_size // facts.per_node))


def _makespan(estimate: Estimate) -> float:
    """Closed form of the pipeline's time: exact for equal stages, an estimate for unequal ones."""
    c, m, seconds = estimate.candidate, estimate.micro_batches, estimate.seconds
    if c.pipeline == 1:
        return m * sum(s.forward + s.backward for s in seconds)
    transfers = transfer_seconds(estimate)
    exchange = 4 * max(transfers)
    if c.schedule == "1f1b":
        slowest = max(s.forward + s.backward for s in seconds)
        loop = 2 * max(transfers)  # there and back between two ranks that hand each other every second pass
        return sum(s.forward + s.backward for s in seconds) + 2 * sum(transfers) + (m - 1) * (slowest + loop / 2)
    ranks = [[seconds[s] for s in c.stages_of(rank)] for rank in range(c.pipeline)]
    slowest = max(sum(s.forward + s.backward for s in parts) for parts in ranks)
    if c.schedule == "interleaved":  # a rank's first stage fills the pipeline, its last empties it
        ramp = sum(s.forward + s.backward for s in seconds) / len(seconds) + 2 * max(transfers)
        idle = max(0, c.pipeline - m) * (c.virtual_stages - 1)  # a round of fewer micro-batches than ranks
        return m * slowest + (c.pipeline - 1 + idle) * ramp
    forward = sum(s.forward for s in seconds) / len(seconds)
    backward = sum(s.backward for s in seconds) / len(seconds)
    return m * (slowest + exchange) + (c.pipeline - 1) * (forward + 2 * backward + exchange) - forward


def _data_seconds(estimate: Estimate, parameters: int, busy: float, behind: float) -> float:
    """Seconds of data-parallel communication that computation does not hide.

    Stages 2 and 3 send while the backward pass runs (stage 3: and the forward pass), stage 1 in bf16 while the last
    micro-batch's does, which takes `behind`; the last piece after its end. On a CPU nothing is hidden: the core that
    sends is the one that computes.
    """
    c, m = estimate.candidate, estimate.micro_batches
    sent = data_bytes(estimate.config, c, parameters, m)
    copying = 0.0
    if estimate.hardware.facts.is_cpu:
        busy = 0.0
        copying = estimate.hardware.traffic_seconds(COPIES[c.zero_stage] * 2 * sum(sent.values()))

    def seconds(kind: CollectiveKind) -> float:
        return estimate.hardware.collective_seconds(kind, sent[kind], c.data, c.tensor)

    gather = seconds("all_gather") if sent["all_gather"] else 0.0
    if c.zero_stage <= 1:
        reduced, is_early = seconds("all_reduce"), c.zero_stage == 1 and estimate.config.precision.dtype == "bf16"
        hidden = min(behind, 0.9 * reduced) if is_early and not estimate.hardware.facts.is_cpu else 0.0
        return reduced - hidden + gather
    if c.zero_stage == 2:
        reduced = seconds("all_reduce")
        return max(reduced - busy / 2, reduced / m * 0.1) + gather + copying
    return max(seconds("reduce_scatter") + gather - busy, 0.0) + gather / m * 0.1 + copying


def _partition_seconds(estimate: Estimate, stages: Sequence[Stage]) -> float:
    """Seconds that ZeRO-3 costs the host of a rank, which a CPU does not hide: its hooks around every module."""
    if estimate.candidate.zero_stage < 3 or not estimate.hardware.facts.is_cpu:
        return 0.0
    layers = sum(accounting.stack_of(kind) in ("encoder", "decoder") for stage in stages for kind in stage.kinds)
    return layers * estimate.micro_batches * PARTITION_HOST * estimate.hardware.facts.launch_seconds


def _muon_seconds(estimate: Estimate, stages: Sequence[Stage]) -> float:
    """Seconds of making matrices orthogonal, shared by the replicas, and of carrying them there and back."""
    c, hardware = estimate.candidate, estimate.hardware
    matrices = moved_matrices(estimate.config, stages)
    seconds = sum(
        STEPS * (2 * hardware.product_seconds(short, short, long, "fp32", FP32)
                 + hardware.product_seconds(short, short, short, "fp32", FP32)) * matrix.count
        for matrix in matrices for short, long in [sorted((matrix.rows, matrix.columns))]
    )  # fmt: skip
    sent = exchanged_bytes(c, matrices)
    carried = hardware.collective_seconds("all_gather", sent["reduce"] + sent["broadcast"], c.data, c.tensor)
    return seconds / c.data + carried + hardware.collective_seconds("all_reduce", sent["all_reduce"], c.tensor, 1)


def _accumulation_seconds(estimate: Estimate, parameters: int) -> float:
    """Seconds in which bf16 gradients are added to fp32 ones in every backward pass (BF16_Optimizer, ZeRO-1).

    Read, widened, added: 18 bytes a parameter. Every stage of a rank has its own parameters, so interleaved stages cost
    no more.
    """
    c = estimate.candidate
    if c.zero_stage != 1 or estimate.config.precision.dtype != "bf16" or estimate.hardware.facts.is_cpu:
        return 0.0
    return estimate.micro_batches * estimate.hardware.traffic_seconds(ACCUMULATED * parameters)


def _optimizer_seconds(estimate: Estimate, parameters: int) -> float:
    """Seconds of AdamW: read gradient, master and moments, write master, moments and weight; and the norm."""
    share = parameters / (estimate.candidate.data if estimate.candidate.zero_stage else 1)
    return estimate.hardware.traffic_seconds(40 * share + 4 * parameters)
