# ruff: noqa: E402
"""What a checkpoint costs: stall, throughput, checksums, memory; beside DeepSpeed's own and torch's distributed one.

    python benchmarks/checkpoint.py cost [--million-parameters 20] [--directory DIR]
    python benchmarks/checkpoint.py memory [--million-parameters 100] [--directory DIR]

`cost` runs one process. Throughputs are of the bytes that reach the disk (with fsync) or leave it (cache dropped), next
to `dd` of as many bytes on the same disk in the same run; all figures are medians of rounds in changing order.
`memory` saves under TP 4 and loads under TP 2: the peak of each rank beside its share of the state.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "checkpoint")]

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import run_ranks  # pyright: ignore[reportMissingImports]
from synthetic import small_config  # pyright: ignore[reportMissingImports]

from megatron_omega.accounting import parameter_count
from megatron_omega.checkpoint import tensor_file
from megatron_omega.checkpoint.catalogue import list_checkpoints
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import Layout
from megatron_omega.config.schema import CheckpointConfig, RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.internals import base_optimizer, engine_holdings, prefill_adam
from megatron_omega.parallel.topology import Topology, create_topology
from megatron_omega.run.construction import build_engine

REPETITIONS = 9
MIB = 2**20
MEMORY_IS_GIVEN_BACK = Path("/sys/module/page_reporting").exists()
SECONDS_TO_GIVE_BACK = 4.2
"""Two rounds of Linux' free page reporting."""


def sized_config(million_parameters: int, *, tensor_parallel_size: int = 1) -> RunConfig:
    """Return an Omega of true width whose depth gives about that many parameters."""
    fields: dict[str, Any] = {
        "hidden_size": 960, "ffn_hidden_size": 16384, "num_attention_heads": 48, "vocab_size": 32768,
        "local_window": 128, "axial_width": 32,
    }  # fmt: skip
    if million_parameters < 150:  # less than one layer of each kind: the same shapes, scaled down
        fields |= {"hidden_size": 240, "ffn_hidden_size": 4096, "num_attention_heads": 12}
    depth = 1
    while True:
        fields |= {"encoder_layers": depth, "decoder_layers": depth}
        parallel = {"tensor_parallel_size": tensor_parallel_size}
        config = small_config(model=fields, parallel=parallel, batch={"micro_batch_size": 1, "global_batch_size": 4})
        if parameter_count(config.model) >= million_parameters * 10**6:
            return config
        depth += 1


def build(config: RunConfig, zero_stage: int) -> tuple[Engine, Topology]:
    """Build an engine on all ranks."""
    tensor = config.parallel.tensor_parallel_size
    layout = Layout(1, dist.get_world_size() // tensor, tensor)
    topology = create_topology(layout)
    settings = resolve_deepspeed(config, {"zero_optimization": {"stage": zero_stage}}, layout.data)
    return build_engine(config, settings.values, topology), topology


def fill_adam(engine: Engine) -> None:
    """Fill the optimizer's state as if steps had been made."""
    optimizer = base_optimizer(engine.deepspeed)
    for flat in {id(mine.flat): mine.flat for mine in engine_holdings(engine.deepspeed)}.values():
        state = prefill_adam(optimizer, flat)
        state["step"].fill_(1)
        state["exp_avg"].uniform_(-1, 1)
        state["exp_avg_sq"].uniform_(0, 1)


def open_store(directory: Path, topology: Topology, config: RunConfig) -> CheckpointStore:
    """Return a store that deletes nothing."""
    settings = CheckpointConfig(keep_last=99, keep_best=False)  # deleting is not writing: `forget` does it, untimed
    return CheckpointStore(
        directory, config=settings, topology=topology, identity={}, run_config=config.model_dump(mode="json")
    )


def seconds(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class TimedHash:
    """The hash of blocks, which adds up the CPU time it takes."""

    make = tensor_file.xxhash.xxh3_64
    seconds = 0.0

    def __init__(self) -> None:
        self.hash = TimedHash.make()

    def update(self, data: Any) -> None:
        begin = time.thread_time_ns()
        self.hash.update(data)
        TimedHash.seconds += (time.thread_time_ns() - begin) / 1e9

    def hexdigest(self) -> str:
        return self.hash.hexdigest()


def drop_cache(path: Path) -> None:
    """Make the next read of `path`, a file or a folder, come from the disk."""
    os.sync()
    for file in (path, *path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds_from_disk(path: Path, action: Callable[[], object]) -> float:
    """Return how long `action`, which reads `path`, takes when it comes from the disk, into memory that is ready.

    A virtual machine may give free memory back to its host, two seconds after it was freed; a page of it costs 8
    microseconds when it is used again, which can make a read four times as slow, by chance. Hence a first pass, not
    timed: the memory it has filled is kept until nothing free waits to be given back, and freed just before the second.
    """
    drop_cache(path)
    if MEMORY_IS_GIVEN_BACK:
        action()
        time.sleep(SECONDS_TO_GIVE_BACK)
        drop_cache(path)
    return seconds(action)


def dd(*arguments: str) -> float:
    """Return the seconds of a dd."""
    return seconds(lambda: subprocess.run(["dd", "bs=4M", *arguments], check=True, capture_output=True))


class Bench:
    """One process, one engine, one disk."""

    def __init__(self, million_parameters: int, directory: Path) -> None:
        self.config = sized_config(million_parameters)
        self.engine, self.topology = build(self.config, zero_stage=1)
        fill_adam(self.engine)
        self.directory = directory
        self.store = open_store(directory / "ours", self.topology, self.config)
        self.tensors = [tensor for mine in engine_holdings(self.engine.deepspeed) for tensor in self._tensors(mine)]
        self.num_bytes = sum(tensor.numel() * 4 for tensor in self.tensors)
        self.buffer = torch.empty(self.num_bytes // 4)
        self.buffer.zero_()
        self.step = 0
        self.source = Path(tempfile.mkdtemp(dir="/dev/shm")) / "source"
        self.source.write_bytes(os.urandom(MIB) * (self.num_bytes // MIB))

    def _tensors(self, mine: Any) -> Iterable[torch.Tensor]:
        state = base_optimizer(self.engine.deepspeed).state[mine.flat]
        return (mine.part(tensor) for tensor in (mine.flat, state["exp_avg"], state["exp_avg_sq"]))

    def plain_copy(self) -> None:
        position = 0
        for tensor in self.tensors:
            self.buffer[position : position + tensor.numel()].copy_(tensor)
            position += tensor.numel()

    def save(self, *, asynchronous: bool) -> None:
        self.step += 1
        self.store.save(self.engine, {}, step=self.step, asynchronous=asynchronous)

    def forget(self) -> None:
        for path in list_checkpoints(self.directory / "ours"):
            shutil.rmtree(path)

    def stall(self) -> float:
        self.forget()
        taken = seconds(lambda: self.save(asynchronous=True))
        assert self.store.wait() is None
        return taken

    def write(self) -> float:
        self.forget()
        taken = seconds(lambda: self.save(asynchronous=False))
        assert self.store.wait() is None
        return taken

    def read(self) -> float:
        return seconds_from_disk(self.directory / "ours", lambda: self.store.load_latest(self.engine))

    def dd_write(self) -> float:
        target = self.directory / "dd"
        target.unlink(missing_ok=True)
        return dd(f"if={self.source}", f"of={target}", "conv=fsync")

    def dd_read(self) -> float:
        source = self.directory / "dd"
        return seconds_from_disk(source, lambda: dd(f"if={source}", "of=/dev/null"))

    def deepspeed_write(self) -> float:
        folder = self.directory / "deepspeed"
        shutil.rmtree(folder, ignore_errors=True)

        def save() -> None:
            self.engine.deepspeed.save_checkpoint(str(folder), tag="x")
            os.sync()

        return seconds(save)

    def deepspeed_read(self) -> float:
        folder = self.directory / "deepspeed"
        return seconds_from_disk(folder, lambda: self.engine.deepspeed.load_checkpoint(str(folder), tag="x"))

    def dcp_write(self) -> float:
        folder = self.directory / "dcp"
        shutil.rmtree(folder, ignore_errors=True)
        state = {str(index): tensor for index, tensor in enumerate(self.tensors)}

        def save() -> None:
            dcp.state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)
            os.sync()

        return seconds(save)

    def dcp_read(self) -> float:
        folder = self.directory / "dcp"
        state = {str(index): tensor for index, tensor in enumerate(self.tensors)}
        return seconds_from_disk(folder, lambda: dcp.state_dict_loader.load(state, checkpoint_id=folder, no_dist=True))

    def checksum_share(self) -> float:
        """Return the checksums' share of the CPU time of a save as runs make them: in the background, copy included."""
        self.forget()
        TimedHash.seconds = 0.0
        tensor_file.xxhash.xxh3_64 = TimedHash
        begin = time.process_time()
        try:
            self.save(asynchronous=True)
            assert self.store.wait() is None
        finally:
            tensor_file.xxhash.xxh3_64 = TimedHash.make
        return TimedHash.seconds / (time.process_time() - begin)

    def close(self) -> None:
        shutil.rmtree(self.source.parent)


def measure_cost(million_parameters: int, directory: Path) -> dict[str, float]:
    """Run on one rank: every measure in each round, in a new order, so that none always pays for the same neighbour."""
    bench = Bench(million_parameters, directory)
    measures: dict[str, Callable[[], float]] = {
        "copy_seconds": lambda: seconds(bench.plain_copy),
        "stall_seconds": bench.stall,
        "dd_write_seconds": bench.dd_write,
        "write_seconds": bench.write,
        "deepspeed_write_seconds": bench.deepspeed_write,
        "dcp_write_seconds": bench.dcp_write,
        "dd_read_seconds": bench.dd_read,
        "read_seconds": bench.read,
        "deepspeed_read_seconds": bench.deepspeed_read,
        "dcp_read_seconds": bench.dcp_read,
        "checksum_share": bench.checksum_share,
    }
    for name in ("stall_seconds", "dd_write_seconds", "deepspeed_write_seconds", "dcp_write_seconds"):
        measures[name]()  # what is read later; the first save allocates its buffers
    found: dict[str, list[float]] = {name: [] for name in measures}
    for round_number in range(REPETITIONS):
        for name in random.Random(round_number).sample(list(measures), len(measures)):
            found[name].append(measures[name]())
    bench.close()
    return {"state_mib": bench.num_bytes / MIB} | {name: statistics.median(values) for name, values in found.items()}


def show_cost(found: dict[str, float]) -> None:
    """Print the figures beside their bounds."""
    size = found["state_mib"]
    print(json.dumps(found, indent=1))
    print(f"\nstate {size:,.0f} MiB (fp32 weights and moments), medians of {REPETITIONS}")
    for name in ("write", "read"):
        ratio = found[f"dd_{name}_seconds"] / found[f"{name}_seconds"]
        print(f"{name}: {size / found[f'{name}_seconds']:,.0f} MiB/s; dd {size / found[f'dd_{name}_seconds']:,.0f}, "
              f"ratio {ratio:.2f} (wanted: 0.8); DeepSpeed {size / found[f'deepspeed_{name}_seconds']:,.0f}, "
              f"torch's distributed checkpoint {size / found[f'dcp_{name}_seconds']:,.0f}")  # fmt: skip
    print(f"stall of a background save: {1e3 * found['stall_seconds']:.0f} ms; "
          f"plain copy {1e3 * found['copy_seconds']:.0f} ms, "
          f"ratio {found['stall_seconds'] / found['copy_seconds']:.2f} (wanted: 2)")  # fmt: skip
    print(f"checksums: {found['checksum_share']:.1%} of the CPU time of a save (wanted: 5%)")


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def watch_memory(million_parameters: int, directory: Path, load: bool) -> dict[str, float]:
    """Run on every rank: save or load; return the rank's share of the state and its peak above a process without it."""
    config = sized_config(million_parameters, tensor_parallel_size=dist.get_world_size())
    engine, topology = build(config, zero_stage=0)
    store = open_store(directory, topology, config)
    if not load:
        fill_adam(engine)
    share = 12 * sum(mine.count for mine in engine_holdings(engine.deepspeed))
    ctypes.CDLL(None).malloc_trim(0)  # nothing may hide in what building the model left on the heap
    without_state = resident_bytes("VmRSS") - (share // 3 if load else share)  # before a load: weights, no moments
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    begin = time.perf_counter()
    if load:
        assert store.load_latest(engine) is not None
    else:
        store.save(engine, {}, step=1, asynchronous=False)
        assert store.wait() is None
    taken = time.perf_counter() - begin
    peak = resident_bytes("VmHWM") - without_state
    return {"share_mib": share / MIB, "peak_mib": peak / MIB, "over": peak / share - 1, "seconds": taken}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "memory"))
    parser.add_argument("--million-parameters", type=int)
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if options.what == "cost":
            show_cost(run_ranks(1, measure_cost, options.million_parameters or 20, Path(folder), timeout=3600)[0])
            return
        size = options.million_parameters or 100
        for ranks, load in ((4, False), (2, True)):
            for rank, found in enumerate(run_ranks(ranks, watch_memory, size, Path(folder), load, timeout=3600)):
                print(f"{'load' if load else 'save'}, rank {rank} of {ranks}: share {found['share_mib']:,.0f} MiB, "
                      f"peak {found['peak_mib']:,.0f} MiB above the process without it, "
                      f"{found['over']:+.1%} (wanted: +10%), {found['seconds']:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
