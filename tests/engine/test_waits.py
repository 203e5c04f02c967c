"""Where a step waits for the device: at its end, for losses and norm; never between micro-batches."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import pytest
from synthetic import replica_batches, small_config, start_engine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
"""Operations that, on a GPU, return only when everything before them is computed."""
METHODS = ("tolist", "cpu", "numpy")
AT_THE_END = 10
"""Losses, norm, whether it is finite, what clipping asks; ZeRO-2 asks for every group of parameters."""
CPU_ONLY = ("model/documents.py", "torch/optim/adam.py")
"""Attention per document (a GPU takes all in one call, whose bounds stay on it); the fused optimizer's step count."""


class _Waits(TorchDispatchMode):
    """Counts waits between the first forward and the last backward pass, and after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.phase = "before"
        self.found: Counter[str] = Counter()
        self.places: list[str] = []
        for name in METHODS:
            monkeypatch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in WAITING:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str, method: Any) -> Any:
        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self._count(name)
            return method(tensor, *arguments, **options)

        return call

    def _count(self, name: str) -> None:
        stack = traceback.extract_stack()[:-3]
        if not any(frame.filename.endswith(CPU_ONLY) for frame in stack):
            self.found[self.phase] += 1
            self.places.append(f"{self.phase} {name} {stack[-1].filename}:{stack[-1].lineno}")


def _waits(parallel: dict[str, Any], dtype: str, stage: int) -> tuple[dict[str, int], list[str]]:
    config = small_config(parallel=parallel, precision={"dtype": dtype}, batch={"micro_batch_size": 1})
    engine = start_engine(config, stage)
    batches = replica_batches(config, engine)
    for _ in range(2):
        engine.train_step(batches, learning_rate=1e-3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        waits = _Waits(monkeypatch)
        engine.module.register_forward_pre_hook(lambda *_: setattr(waits, "phase", "micro-batches"))
        inner = engine.deepspeed.optimizer
        step = inner.step

        def ended(*arguments: Any, **options: Any) -> Any:
            waits.phase = "end"
            return step(*arguments, **options)

        monkeypatch.setattr(inner, "step", ended)
        with waits:
            engine.train_step(batches, learning_rate=1e-3)
    return dict(waits.found), waits.places


@pytest.mark.parametrize(
    ("ranks", "parallel", "dtype", "stage"),
    [
        (1, {}, "fp32", 0),
        (1, {}, "bf16", 1),
        (1, {}, "bf16", 2),
        (2, {"pipeline_parallel_size": 2}, "bf16", 1),
        (2, {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}, "bf16", 1),
    ],
    ids=["plain", "zero-1", "zero-2", "1f1b", "interleaved"],
)
def test_nothing_waits_between_micro_batches(ranks: int, parallel: dict[str, Any], dtype: str, stage: int) -> None:
    for found, places in run_ranks(_waits, ranks, parallel, dtype, stage, timeout_seconds=90):
        assert found.get("micro-batches", 0) == 0, [place for place in places if place.startswith("micro")]
        ending = [place for place in places if place.startswith("end")]
        assert len(ending) <= AT_THE_END, ending
