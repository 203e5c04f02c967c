#!/usr/bin/env python3
"""Train as pretrain_omega.py does, with its arguments, and say what share of the steps every rank waited for data.

    deepspeed --num_gpus 8 --no_local_rank benchmarks/data_wait.py --config examples/omega-tiny/run.yaml \\
        --deepspeed_config ds_configs/zero1.json --training.train_steps 20 --logging.run_directory /tmp/data-wait

The first step is left out: it starts the workers. Ends with code 1 where a rank waited for 1% or more.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain_omega
from megatron_omega.data.batch import Batch
from megatron_omega.data.loader import Loader
from megatron_omega.training import loop


def main() -> None:
    waited: list[float] = []
    steps: list[tuple[float, float]] = []
    next_batch, step = Loader.__next__, loop.Trainer._step

    def timed_batch(self: Loader) -> Batch:
        begin = time.perf_counter()
        batch = next_batch(self)
        waited.append(time.perf_counter() - begin)
        return batch

    def timed_step(self: loop.Trainer, *arguments: object) -> object:
        begin = time.perf_counter()
        waited.clear()
        result = step(self, *arguments)  # pyright: ignore[reportArgumentType]
        steps.append((time.perf_counter() - begin, sum(waited)))
        return result

    Loader.__next__, loop.Trainer._step = timed_batch, timed_step  # pyright: ignore[reportAttributeAccessIssue]
    pretrain_omega.main(sys.argv[1:])
    seconds, data = (sum(column) for column in zip(*steps[1:], strict=True))
    rank = os.environ.get("RANK", "0")
    print(
        f"rank {rank}: waited {data:.4f} s of {seconds:.2f} s for data ({data / seconds:.3%}) in {len(steps) - 1} steps"
    )
    raise SystemExit(data >= 0.01 * seconds)


if __name__ == "__main__":
    main()
