"""What machines can do: peak rates, links, and the share of them that our kernels reach. Data, read from YAML.

`hardware.yaml` beside this file lists common accelerators; `megatron-omega calibrate` writes a file of the same form
for the machine at hand. Times of single operations follow from it; nothing here knows of models.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from megatron_omega.config import yaml_text
from megatron_omega.config.schema import Section
from megatron_omega.config.schema.base import Fraction, NonNegativeFloat, Positive, PositiveFloat
from megatron_omega.errors import ConfigError
from megatron_omega.host.regular_files import read_text

GIB = 1024**3

# What a CPU asks for what a GPU gives for nothing. Measured once, on small cores; calibration measures the rest.
PROCESS = int(0.30 * GIB)
"""What a CPU process holds once torch, DeepSpeed and this package are imported, if nobody has measured it."""
LATER = int(0.09 * GIB)
"""What rank 0 of a CPU run imports and allocates after that beside tensors: TensorBoard, plots, copies for saving."""
CPU_STEP_SECONDS = 0.03
"""What a rank's host does once a step on a small CPU core: engine, optimizer, hooks, batches. Counted where ranks share
cores; the one of several on cores of their own hides most of it."""
CPU_RUNTIME = 22 * 2**20
"""What a CPU process, all its libraries loaded, takes with its first engine and step beside tensors: code that oneDNN
writes for each shape of a product, graphs, connections. Slots of two ranks that share memory are 4 MiB more at most."""
CPU_HOOKS = 3 * 2**20
"""What the hooks of ZeRO-3 take of it in a small model."""
PARTITION_HOST = 900
"""What ZeRO-3's hooks cost the host per layer and micro-batch, in launches; fitted to real steps (docs/planner.md)."""
COPIES = {0: 0, 1: 0, 2: 1, 3: 2}
"""How often DeepSpeed and gloo copy what they send, by ZeRO stage: joined, and cloned."""
BACKWARD_HOST = 0.8
"""What a host spends on launching a backward pass, per launch of the forward: autograd does not go through Python."""
CHECKPOINT_HOST = (100, 150)
"""What `torch.utils.checkpoint` costs a host, forward and backward, in launches: random states, above all."""
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "transfer"]


class Efficiency(Section):
    """Shares of peak rates."""

    product: PositiveFloat
    """Large matrix products, of peak FLOP/s."""
    product_half: NonNegativeFloat
    """Length of a side at which that share halves: every side x of a product counts x / (x + product_half)."""
    attention: PositiveFloat
    """Attention kernels, of peak FLOP/s."""
    memory: PositiveFloat
    """Element-wise kernels, of memory bandwidth."""
    link: PositiveFloat
    """Collectives inside a node, of the link."""
    network: PositiveFloat
    """Collectives between nodes, of the network."""
    spread: Fraction
    """Relative error of a step time that these figures leave."""


class Link(Section):
    """A connection, per accelerator and direction."""

    bytes_per_second: PositiveFloat
    """Rate."""
    latency: NonNegativeFloat
    """Seconds until a message between neighbours starts to arrive."""


class AcceleratorFacts(Section):
    """One entry of the file."""

    memory_gib: PositiveFloat
    """Memory a process can use."""
    peak_flops: dict[str, PositiveFloat]
    """Dense matrix FLOP/s by number format."""
    memory_bandwidth: PositiveFloat
    """Bytes per second."""
    link: str
    """Name of the connection inside a node."""
    network: str
    """Name of the connection between nodes."""
    per_node: Positive
    """Accelerators of a node."""
    driver_names: tuple[str, ...] = ()
    """Words that all stand in what the driver calls it ("A100", "80GB"); with most of them, the entry is meant."""
    watts: PositiveFloat
    """Power of one accelerator under load."""
    launch_seconds: PositiveFloat
    """Time the host needs to start one kernel."""
    is_cpu: bool = False
    """Whether ranks run on CPU cores, one each."""
    exponentials: PositiveFloat | None = None
    """Exponentials per second of its special-function units; None: not known, not a limit."""
    cores: Positive | None = None
    """Cores that all ranks of a node share; more ranks than cores take turns."""
    crowding: PositiveFloat = 1.0
    """How much longer a core takes for its work while all others compute, too: they share caches, memory and heat."""
    efficiency: Efficiency
    """What is reached of these rates."""


class HardwareFile(Section):
    """The whole file."""

    efficiency: Efficiency
    """Shared by the GPUs."""
    accelerators: dict[str, AcceleratorFacts]
    """By name."""
    links: dict[str, Link]
    """By name."""


@dataclass(frozen=True)
class Hardware:
    """An accelerator with the connections it was resolved to."""

    name: str
    facts: AcceleratorFacts
    link: Link
    network: Link
    network_name: str

    @cached_property
    def memory_bytes(self) -> float:
        return self.facts.memory_gib * GIB

    def supports(self, dtype: str) -> bool:
        return dtype in self.facts.peak_flops

    def peak(self, dtype: str) -> float:
        """Return peak FLOP/s. Raises ConfigError if the accelerator has no such format."""
        if dtype not in self.facts.peak_flops:
            formats = ", ".join(sorted(self.facts.peak_flops))
            raise ConfigError(f"precision.dtype={dtype} cannot run on {self.name}; it has {formats}: use one of these")
        return self.facts.peak_flops[dtype]

    def product_seconds(self, m: int, n: int, k: int, dtype: str, element: int) -> float:
        """Seconds of one product [m, k] x [k, n]: at the efficiency of its shape, or as fast as memory delivers."""
        efficiency = self.facts.efficiency
        share = efficiency.product
        for side in (m, n, k):
            share *= side / (side + efficiency.product_half)
        traffic = (m * k + k * n + m * n) * element
        return max(2 * m * n * k / (self.peak(dtype) * share), self.traffic_seconds(traffic))

    def attention_seconds(self, flops: float, dtype: str, head_dim: int) -> float:
        """Seconds of attention kernels: of their products, padded to what a GPU's take, or of their exponentials.

        A score costs 4 head_dim FLOPs and one exponential, which small heads wait for.
        """
        if self.facts.is_cpu or head_dim == 0:
            return flops / (self.peak(dtype) * self.facts.efficiency.attention)
        padded = -(-head_dim // 8) * 8 / head_dim
        products = flops * padded / (self.peak(dtype) * self.facts.efficiency.attention)
        rate = self.facts.exponentials
        return max(products, flops / (4 * head_dim) / (rate * self.facts.efficiency.memory)) if rate else products

    def traffic_seconds(self, num_bytes: float) -> float:
        """Seconds that element-wise kernels need to move `num_bytes`."""
        return num_bytes / (self.facts.memory_bandwidth * self.facts.efficiency.memory)

    def collective_seconds(self, kind: CollectiveKind, num_bytes: float, ranks: int, stride: int) -> float:
        """Seconds of a ring collective over `ranks` ranks, `stride` apart, on a full tensor of `num_bytes`.

        A group inside one node uses its link. Between nodes every rank has its share of the network, and a ring that
        has several ranks in a node crosses with all of their adapters. "transfer" goes from one rank to the next.
        """
        if ranks == 1:
            return 0.0
        rate, latency = self._route(ranks, stride)
        if kind == "transfer":
            return latency + num_bytes / rate
        # Between hosts CPUs have gloo, which scatters a sum by making it everywhere.
        is_gloo = self.facts.is_cpu and ranks * stride > self.facts.per_node
        passes = 2 if kind == "all_reduce" or (kind == "reduce_scatter" and is_gloo) else 1
        # Rings pay one hop per rank on large messages; trees bring small ones down to the logarithm.
        hops = min(ranks - 1, 2 * (ranks - 1).bit_length())
        return passes * (hops * latency + (ranks - 1) / ranks * num_bytes / rate)

    def _route(self, ranks: int, stride: int) -> tuple[float, float]:
        efficiency, per_node = self.facts.efficiency, self.facts.per_node
        link = self.link.bytes_per_second * efficiency.link
        if ranks * stride <= per_node:
            return link, self.link.latency
        network = self.network.bytes_per_second * efficiency.network
        together = max(1, per_node // stride)
        return min(link, network * together), self.network.latency


def default_file() -> Path:
    """Return the path of the list of common accelerators."""
    return Path(__file__).with_name("hardware.yaml")


def read_hardware(path: Path | None = None) -> HardwareFile:
    """Read a hardware file.

    Raises:
        ConfigError: the file cannot be read, or something in it is missing or wrong.
    """
    path = path or default_file()
    try:
        values: Any = yaml_text.parse(read_text(path), str(path))
        return HardwareFile.model_validate(values)
    except OSError as error:
        raise ConfigError(f"hardware file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        findings = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(*findings) from None


def find_hardware(name: str, *, network: str | None = None, file: HardwareFile | None = None) -> Hardware:
    """Return the accelerator called `name`, with another network if one is named.

    Raises:
        ConfigError: nothing has that name; names the nearest.
    """
    file = file or read_hardware()
    facts = file.accelerators.get(name.lower())
    if facts is None:
        raise ConfigError(f"--gpu {name} is not listed; {_nearest(name, list(file.accelerators))}")
    network = network or facts.network
    for option, link in (("network", network), ("link", facts.link)):
        if link not in file.links:
            raise ConfigError(f"--{option} {link} is not listed; {_nearest(link, list(file.links))}")
    return Hardware(name.lower(), facts, file.links[facts.link], file.links[network], network)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    return f"did you mean {near[0]}? (known: {', '.join(known)})" if near else f"use one of {', '.join(known)}"
