#!/usr/bin/env python
"""What grows with the number of ranks, shards and hosts, measured on this machine and extrapolated to 1,024 ranks.

    benchmarks/scale.py                       # everything, some minutes on two cores
    benchmarks/scale.py connections hub       # some of it, by name

Each part measures several sizes, finds the power of the size that the figures follow, and says what it needs: PASS or
FAIL. Ranks are threads or fake monitors here: what is counted is what the code does, not what a network costs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


@dataclass(frozen=True)
class Row:
    """One line of a part's table: a size, what was measured at it, and whether that is as it has to be."""

    size: int
    value: float
    unit: str
    passes: bool | None = None
    """None where the line only shows the law."""
    note: str = ""


def connections() -> list[Row]:
    """Descriptors of a rank among N that agree on checkpoints."""
    from torch._C._distributed_c10d import HashStore

    from megatron_omega.parallel.exchange import Tree

    rows = []
    for size in (16, 32, 64, 128):
        store, before, began = HashStore(), _descriptors(), time.perf_counter()
        with ThreadPoolExecutor(size) as pool:
            trees = list(pool.map(lambda rank, s=store, n=size: Tree(s, rank, n, timedelta(seconds=60)), range(size)))
            made = time.perf_counter() - began
            each = (_descriptors() - before) / size
            heard = set(pool.map(lambda tree: tree.gather(b"0"), trees))
        is_small = each < 16 and len(heard) == 1
        rows.append(Row(size, each, "descriptors a rank", is_small, f"{made / size * 1e3:.0f} ms a rank to connect"))
        del trees
    return rows


def hub() -> list[Row]:
    """From the question for stacks to the end of all ranks, for 1,024 monitors and a file system of such a latency."""
    from watchdog.fake_monitors import IDLE, WAITING, FakeRank, FakeRun  # pyright: ignore[reportMissingImports]

    rows = []
    for milliseconds in (0, 5, 20):
        write = Path.write_text

        def slow(path: Path, *arguments: object, latency: float = milliseconds / 1e3, **options: object) -> int:
            time.sleep(latency)
            return write(path, *arguments, **options)  # pyright: ignore[reportArgumentType]  # noqa: B023 - the same

        culprit = random.Random(milliseconds).randrange(1024)
        ranks = [FakeRank(WAITING, text="x" * 4096) for _ in range(1024)]
        ranks[culprit] = FakeRank(IDLE, count=6)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(Path, "write_text", slow):
            run = FakeRun(Path(folder), ranks)
            is_over = run.serve(90.0)
            run.close()
            event = json.loads((Path(folder) / "events.jsonl").read_text().splitlines()[-1])
        seconds = run.verdict_at - run.asked_at
        is_right = is_over and event["ranks"] == [culprit]
        note = f"{milliseconds} ms a stack file; named {event['ranks']}, to be named [{culprit}]"
        rows.append(Row(1024, seconds, "s to the verdict", is_right and seconds <= 2.0, note))
    return rows


def stragglers() -> list[Row]:
    """One judgement of all ranks' busy times."""
    from megatron_omega.config.layout import Layout
    from megatron_omega.health.stragglers import Stragglers

    rows = []
    for size in (1024, 4096, 16384):
        judge = Stragglers(Layout(pipeline=8, data=size // 16, tensor=2), window=20)
        busy = [1.0 + random.random() / 100 for _ in range(size)]
        seconds = _fastest(lambda judge=judge, busy=busy: judge.observe(busy), times=8)
        rows.append(Row(size, seconds * 1e3, "ms", seconds <= 5e-3))
    return rows


def integrity() -> list[Row]:
    """What a rank computes to see whether all weights agree, messages left out."""
    import torch

    from megatron_omega.config.layout import Layout
    from megatron_omega.health.weights import all_agree
    from megatron_omega.parallel.topology import Group, Topology

    rows = []
    for size in (1024, 4096, 16384):
        data = size // 16
        groups = [Group(None, tuple(range(members)), 0) for members in (2, data, 8, 16)]
        topology = Topology(Layout(pipeline=8, data=data, tensor=2), 0, *groups)
        mine = torch.arange(data + 2)
        mine[-2] = mine[0]
        with mock.patch("torch.distributed.all_reduce"):
            seconds = _fastest(
                lambda mine=mine, topology=topology: all_agree(mine, topology, has_masters=True, is_sharded=False), 20
            )
        rows.append(Row(size, seconds * 1e3, "ms", seconds <= 5e-3, f"two messages of {16 * (data + 2):,} bytes"))
    return rows


def shards() -> list[Row]:
    """Opening a corpus of so many shards under a limit of 1,024 descriptors."""
    from megatron_omega.data.indexed import IndexedShard, write_shard

    limits, rows = resource.getrlimit(resource.RLIMIT_NOFILE), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2000):
            write_shard(Path(folder) / str(number), [[1, 2, 3]], "<u2")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        try:
            for size in (500, 1000, 2000):
                began = time.perf_counter()
                opened = [IndexedShard(Path(folder) / str(number)) for number in range(size)]
                seconds = time.perf_counter() - began
                rows.append(Row(size, seconds, "s", seconds <= 2.0 and len(opened) == size))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return rows


def tokenizer() -> list[Row]:
    """How far a sample is from every file's share of 50 compressed files."""
    import zstandard

    from megatron_omega.corpus.reading.finding import expand_inputs
    from megatron_omega.corpus.sampling import RecordCount, TextSampler

    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for number in range(50):
            texts = [" ".join(str(chance.getrandbits(64)) for _ in range(40)) for _ in range(600 + 20 * number)]
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            sizes.append(len(lines))
            (Path(folder) / f"{number:02d}.jsonl.zst").write_bytes(zstandard.compress(lines.encode(), 1))
        rows = []
        for budget in (1_000_000, 5_000_000):
            sampler = TextSampler(expand_inputs([f"{folder}/*.zst"]), ["text"], 1 << 20, RecordCount(0.0))
            taken: Counter[str] = Counter()
            for file, text in sampler.texts(budget):
                taken[Path(file.path).name] += len(text)
            whole, total = sum(taken.values()), sum(sizes)
            shares = [taken[f"{n:02d}.jsonl.zst"] / whole / (size / total) for n, size in enumerate(sizes)]
            worst = max(abs(share - 1) for share in shares)
            rows.append(Row(budget, worst * 100, "% off at worst", len(taken) == 50 and worst <= 0.1, "50 of 50 files"))
    return rows


def drawing() -> list[Row]:
    """The cost of drawing one of TP ranks' slices of a parameter, over that of drawing it whole."""
    from megatron_omega.parallel.drawing import normal_slice

    shape, rows = (4096, 1024), []
    whole = _fastest(lambda: normal_slice(0, "x", shape), times=3)
    for tensor in (2, 4, 8):
        part = shape[0] // tensor
        seconds = _fastest(lambda part=part: normal_slice(0, "x", shape, axis=0, start=part, stop=2 * part), times=5)
        rows.append(Row(tensor, seconds / whole, "of the whole", seconds / whole <= 1.25 / tensor))
    return rows


def planner() -> list[Row]:
    """Ranking every layout of the 11.9 billion parameter model."""
    from megatron_omega.config.load import load_config
    from megatron_omega.planner.hardware import find_hardware
    from megatron_omega.planner.ranking import rank

    config, hardware = load_config(REPOSITORY / "examples/omega-11.9b/run.yaml"), find_hardware("h100-80g")
    rows = []
    for size in (1024, 4096, 16384):
        batch = config.batch.model_copy(update={"global_batch_size": max(size, config.batch.global_batch_size)})
        began = time.process_time()
        found = rank(config.model_copy(update={"batch": batch}), hardware, size)
        seconds = time.process_time() - began
        rows.append(Row(size, seconds, "s", seconds <= 6.0, f"{len(found.fitting):,} of {found.total:,} layouts fit"))
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {
    part.__name__: part
    for part in (connections, hub, stragglers, integrity, shards, tokenizer, drawing, planner)
}  # fmt: skip


def law(rows: Sequence[Row]) -> float | None:
    """Return the power of the size that the values follow, by least squares of logarithms; None for one size.

    >>> law([Row(2, 6.0, ""), Row(4, 12.0, "")])
    1.0
    """
    points = [(math.log(row.size), math.log(max(row.value, 1e-12))) for row in rows]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return round(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread, 2) if spread else None


def report(name: str, rows: Sequence[Row], seconds: float) -> bool:
    """Print one part's table; return whether all of it is as it has to be."""
    print(f"\n{name}: {PARTS[name].__doc__ or ''} ({seconds:.0f} s)")
    for row in rows:
        verdict = {True: "PASS", False: "FAIL", None: ""}[row.passes]
        print(f"  {row.size:>10,}  {row.value:>10.3f} {row.unit:<20} {verdict:<5} {row.note}".rstrip())
    power = law(rows)
    if power is not None:
        last = rows[-1]
        at = max(1024, last.size * 4)
        there = last.value * (at / last.size) ** power
        print(f"  grows with size^{power:.2f}; at {at:,} that is {there:.3f} {last.unit}")
    return all(row.passes is not False for row in rows)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _fastest(action: Callable[[], object], times: int) -> float:
    """Return the CPU seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        action()
        found.append(time.thread_time() - began)
    return min(found)


def main() -> int:
    """Return 0 where every part is as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which (default: all)")
    chosen = parser.parse_args().parts or list(PARTS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    failed = []
    for name in chosen:
        began = time.perf_counter()
        rows = PARTS[name]()
        if not report(name, rows, time.perf_counter() - began):
            failed.append(name)
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} as they have to be", *failed[:1] and [f"(not {failed})"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
