"""What torch does while something runs: how many kernels, which of attention, on which device, and where it waits."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
"""Operations that, on a GPU, return only when everything before them is computed."""
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "detach", "alias", "as_strided", "unfold", "chunk", "unbind", "_reshape_alias", "split_with_sizes", "lift_fresh",
}  # fmt: skip
METHODS = ("tolist", "cpu", "numpy")
CPU_ONLY = ("model/documents.py", "torch/optim/adam.py")
"""Attention per document (a GPU takes all in one call, whose bounds stay on it); the fused optimizer's step count."""
_ATTENTION = ("attention", "attn", "flash_fwd", "varlen_fwd", "_softmax")
_MASK = 3  # place of the mask among the arguments of torch's kernels, where it is not named


class KernelCounts(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class AttentionKernels(TorchDispatchMode):
    """Names the attention kernels of a forward pass; `masked` stands behind those that were given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if any(word in name for word in _ATTENTION) and "backward" not in name:
            options = kwargs or {}
            mask = options.get("attn_mask", options.get("attn_bias", args[_MASK] if len(args) > _MASK else None))
            self.names.add(f"{name} masked" if isinstance(mask, Tensor) and mask.dim() > 1 else name)
        return func(*args, **(kwargs or {}))


class Placement(TorchDispatchMode):
    """Notes operations that compute on another device than the one meant."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.operations = 0
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.numel() > 1 and value.device.type != self.device_type:
                frame = next(f for f in reversed(traceback.extract_stack()) if "megatron_omega" in f.filename)
                frames = [f for f in traceback.extract_stack() if f.filename.endswith(CPU_ONLY)]
                if not frames:
                    place = f"{frame.filename.partition('megatron_omega/')[2]}:{frame.lineno}"
                    self.elsewhere.append(f"{func._overloadpacket.__name__} at {place}")
        return result


class Waits(TorchDispatchMode):
    """Counts, phase by phase, where the host waits for the device. On a GPU torch itself says where; elsewhere the
    operations that would wait on one are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "before"
        self.found: Counter[str] = Counter()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in WAITING:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self._count(name)
            return method(tensor, *arguments, **options)

        return call

    def _count(self, name: str) -> None:
        stack = traceback.extract_stack()[:-3]
        if not any(frame.filename.endswith(CPU_ONLY) for frame in stack):
            self.found[self.phase] += 1
            self.places.append(f"{self.phase} {name} {stack[-1].filename}:{stack[-1].lineno}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count inside."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            with self._asking_torch():
                yield
            return
        with ExitStack() as stack:
            for name in METHODS:
                stack.enter_context(patch.object(Tensor, name, self._counted(name)))
            with self:
                yield

    @contextmanager
    def _asking_torch(self) -> Iterator[None]:
        """Let torch warn of every synchronising call, and take the warnings."""

        def noted(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
            if "synchroniz" in str(message):
                self.found[self.phase] += 1
                self.places.append(f"{self.phase} {filename}:{lineno}")

        with warnings.catch_warnings(), patch.object(warnings, "showwarning", noted):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def watched_step(engine: Any, step: Callable[[], Any]) -> Waits:
    """Count the waits of one optimizer step of `engine`: `before`, among its `micro-batches`, and at its `end`."""
    waits = Waits()
    handle = engine.module.register_forward_pre_hook(lambda *_: setattr(waits, "phase", "micro-batches"))
    inner = engine.deepspeed.optimizer
    original = inner.step

    def ended(*arguments: Any, **options: Any) -> Any:
        waits.phase = "end"
        return original(*arguments, **options)

    inner.step = ended
    try:
        with waits.watching():
            step()
    finally:
        handle.remove()
        inner.step = original
    return waits
