"""Published runs of another system, predicted with our hardware figures: the check that the roofline is not optimistic.

The runs are Megatron-LM's GPT models on A100, tensor parallelism 8 (arXiv 2205.05198, table 5): with sequence
parallelism and selective recomputation, and without, with full recomputation. Their layers are described here as that
paper describes them: four dense products, unfused attention, 34 bytes kept per token and column. Four efficiencies
were fitted to the selective runs; the full ones were not used for it. The same figures serve all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_omega.planner.hardware import Hardware
from megatron_omega.planner.work import BACKWARD_TRAFFIC, FORWARD_TRAFFIC

ELEMENT = 2
SEQUENCE = 2048
VOCABULARY = 51200
TENSOR = 8


@dataclass(frozen=True)
class PublishedRun:
    """A GPT model with its layout and measured iteration time."""

    name: str
    layers: int
    hidden: int
    heads: int
    pipeline: int
    interleaved: int
    """Pieces of the model on each pipeline rank."""
    micro_batch: int
    batch: int
    selective_seconds: float
    """Measured with sequence parallelism and selective recomputation, as published."""
    full_seconds: float
    """Measured without sequence parallelism, with full recomputation, as published."""

    @property
    def parameters(self) -> int:
        h = self.hidden
        return self.layers * (12 * h * h + 13 * h) + (VOCABULARY + SEQUENCE) * h

    @property
    def model_flops(self) -> float:
        """Forward and backward of one iteration, as the paper counts them."""
        h, layers = self.hidden, self.layers
        tokens = self.batch * SEQUENCE
        return 72 * tokens * layers * h * h * (1 + SEQUENCE / (6 * h) + VOCABULARY / (12 * h * layers))

    @property
    def activation_bytes_per_layer(self) -> float:
        """Kept by one layer on one rank: s b h (34 / t), the attention core recomputed (equation 6 of the paper)."""
        return SEQUENCE * self.micro_batch * self.hidden * 34 / TENSOR


RUNS = (
    PublishedRun("22B", 48, 6144, 64, 1, 1, 4, 4, 1.10, 1.42),
    PublishedRun("175B", 96, 12288, 96, 8, 3, 1, 64, 13.75, 18.13),
    PublishedRun("530B", 105, 20480, 128, 35, 3, 1, 280, 37.83, 49.05),
    PublishedRun("1T", 128, 25600, 160, 64, 1, 1, 512, 71.49, 94.42),
)


def iteration_seconds(run: PublishedRun, hardware: Hardware, *, selective: bool) -> float:
    """Predict the time of one iteration, with selective recomputation and sequence parallelism or with neither."""
    layers = run.layers / run.pipeline
    slot = layers * _layer_seconds(run, hardware, selective=selective)
    micro_batches = run.batch // run.micro_batch
    bubble = (run.pipeline - 1) / run.interleaved
    parameters = run.parameters / (TENSOR * run.pipeline)
    optimizer = hardware.traffic_seconds(40 * parameters + 4 * parameters)
    transfers = 4 * run.interleaved * _transfer_seconds(run, hardware) if run.pipeline > 1 else 0.0
    edge = _logits_seconds(run, hardware)
    return (micro_batches + bubble) * (slot + transfers) + micro_batches * edge / run.pipeline + optimizer


def _layer_seconds(run: PublishedRun, hardware: Hardware, *, selective: bool) -> float:
    h, t = run.hidden, TENSOR
    tokens = run.micro_batch * SEQUENCE
    head_dim = h // run.heads

    def product(m: int, n: int, k: int) -> float:
        return hardware.product_seconds(m, n, k, "bf16", ELEMENT)

    dense = product(tokens, 3 * h // t, h) + product(tokens, h, h // t)
    dense += product(tokens, 4 * h // t, h) + product(tokens, h, 4 * h // t)
    instances = run.micro_batch * run.heads // t
    core = instances * (product(SEQUENCE, SEQUENCE, head_dim) + product(SEQUENCE, head_dim, SEQUENCE))
    scores = 5 * instances * SEQUENCE * SEQUENCE
    kept = run.activation_bytes_per_layer
    forward = dense + core + hardware.traffic_seconds(FORWARD_TRAFFIC * (kept + scores))
    backward = 2 * (dense + core) + hardware.traffic_seconds(BACKWARD_TRAFFIC * (kept + scores))
    whole = tokens * h * ELEMENT
    if selective:
        again = core + hardware.traffic_seconds(2 * scores)
        pair = sum(hardware.collective_seconds(kind, whole, t, 1) for kind in ("all_gather", "reduce_scatter"))
        return forward + backward + again + 4 * pair
    return 2 * forward + backward + 6 * hardware.collective_seconds("all_reduce", whole, t, 1)


def _logits_seconds(run: PublishedRun, hardware: Hardware) -> float:
    tokens = run.micro_batch * SEQUENCE
    rows = VOCABULARY // TENSOR
    products = 3 * hardware.product_seconds(tokens, rows, run.hidden, "bf16", ELEMENT)
    return products + hardware.traffic_seconds(10 * tokens * rows * 4)


def _transfer_seconds(run: PublishedRun, hardware: Hardware) -> float:
    shard = run.micro_batch * SEQUENCE * run.hidden * ELEMENT / TENSOR
    return hardware.collective_seconds("transfer", shard, 2, TENSOR)
