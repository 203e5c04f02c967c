"""What the ranks of these tests do: train a small Omega under some layout, save, load, look at the whole state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from synthetic import replica_batches, small_config

from megatron_omega.checkpoint.manifest import KINDS
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import Layout
from megatron_omega.config.schema import CheckpointConfig, RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.internals import base_optimizer, engine_holdings
from megatron_omega.parallel.topology import Topology, create_topology
from megatron_omega.run.construction import build_engine


@dataclass(frozen=True)
class Case:
    """One way to lay out the same run."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    zero: int = 1
    dtype: str = "fp32"
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    virtual_stages: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    """More fields of zero_optimization."""
    micro_batch: int = 2
    global_batch: int = 8
    learning_rate: float = 1e-2
    optimizer: str = "adamw"

    @property
    def size(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def label(self) -> str:
        extras = [self.dtype] * (self.dtype != "fp32") + ["sp"] * self.sequence_parallel
        extras += [self.optimizer] * (self.optimizer != "adamw")
        extras += [self.schedule] * (self.schedule != "1f1b") + [name for name, value in self.options if value]
        return " ".join((f"pp{self.pipeline} dp{self.data} tp{self.tensor} z{self.zero}", *extras))


OFFLOAD = (("offload_optimizer", (("device", "cpu"), ("pin_memory", False))),)
ROUND_ROBIN = (("round_robin_gradients", True),)


def config_of(case: Case) -> RunConfig:
    return small_config(
        parallel={
            "tensor_parallel_size": case.tensor, "pipeline_parallel_size": case.pipeline, "recompute": "none",
            "sequence_parallel": case.sequence_parallel, "pipeline_schedule": case.schedule,
            "virtual_stages": case.virtual_stages,
        },
        precision={"dtype": case.dtype},
        optimizer={"name": case.optimizer},
        batch={"micro_batch_size": 1 if case.schedule == "dualpipev" else case.micro_batch, "global_batch_size": case.global_batch},
    )  # fmt: skip


@dataclass
class Run:
    """A live run of one case."""

    case: Case
    config: RunConfig
    topology: Topology
    engine: Engine
    consumed: int = 0

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Train `steps` steps; return (loss, gradient norm) of each."""
        found = []
        for _ in range(steps):
            batches = replica_batches(self.config, self.engine, self.consumed)
            result = self.engine.train_step(batches, learning_rate=self.case.learning_rate)
            self.consumed += self.config.batch.global_batch_size
            found.append((result.loss, result.grad_norm))
        return found

    def store(self, directory: Path, *, identity: dict[str, Any] | None = None, **checkpoint: Any) -> CheckpointStore:
        return CheckpointStore(
            directory,
            config=CheckpointConfig.model_validate({"asynchronous": False} | checkpoint),
            topology=self.topology,
            identity={"model": self.config.model.model_dump(mode="json")} if identity is None else identity,
            run_config=self.config.model_dump(mode="json"),
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed}


def start(case: Case) -> Run:
    """Build the engine of `case`. Collective."""
    config = config_of(case)
    topology = create_topology(Layout(case.pipeline, case.data, case.tensor))
    zero = {"stage": case.zero} | {
        name: dict(value) if isinstance(value, tuple) else value for name, value in case.options
    }
    settings = resolve_deepspeed(config, {"zero_optimization": zero}, case.data)
    return Run(case, config, topology, build_engine(config, settings.values, topology))


def resume(case: Case, directory: Path) -> Run:
    """Build the engine of `case` and load the newest checkpoint of `directory`."""
    run = start(case)
    state = run.store(directory).load_latest(run.engine)
    assert state is not None
    run.consumed = int(state["consumed_samples"])  # type: ignore[arg-type]
    return run


def whole_state(run: Run) -> dict[str, torch.Tensor]:
    """Gather the full training state, straight from the engines: not by the code that saves and loads."""
    parts = []
    optimizer = base_optimizer(run.engine.deepspeed)
    for mine in engine_holdings(run.engine.deepspeed):
        state = optimizer.state[mine.flat]
        tensors = {
            "weight": mine.flat,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state.get("exp_avg_sq", torch.zeros_like(mine.flat)),
        }
        values = {kind: mine.part(tensor).clone() for kind, tensor in tensors.items()}
        parts.append(
            (mine.info.name, mine.holding.region, values, float(state["step"]), mine.working().float().clone())
        )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, parts)
    return _join([part for parts in everywhere for part in parts])


def _join(parts: Sequence[Any]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for name, region, values, step, working in parts:
        for kind, piece in {**values, "working": working}.items():
            key = f"{kind}/{name}"
            full = whole.setdefault(key, torch.full(region.shape, float("nan")))
            box = full if region.axis is None else full.narrow(region.axis, region.start, region.stop - region.start)
            flat = box.reshape(-1).clone()
            held = flat[region.first : region.first + region.count]
            assert torch.all(held.isnan() | (held == piece)), f"replicas of {key} differ"
            flat[region.first : region.first + region.count] = piece
            box.copy_(flat.view(box.shape))
        assert whole.setdefault(f"step/{name}", torch.tensor(step)) == step
    assert not any(tensor.isnan().any() for tensor in whole.values()), "elements nobody holds"
    return whole


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *, but: str = "") -> list[str]:
    """Return the keys in which two states differ."""
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return [key for key in first if not (but and key.startswith(but)) and not torch.equal(first[key], second[key])]


def state_on_disk(path: Path) -> dict[str, torch.Tensor]:
    """Read a whole checkpoint the slow way."""
    with open_checkpoint(path) as reader:
        found = {f"{kind}/{name}": reader.tensor(name, kind) for name in reader.names() for kind in KINDS}
        return found | {f"step/{name}": torch.tensor(entry.step) for name, entry in reader.manifest.parameters.items()}
