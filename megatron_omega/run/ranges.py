"""Names for what a trace shows: layers, branches of attention, messages with their axis, passes of stages.

Named is by hooks and by functions that stand in front of others while a trace is made; at any other time nothing of it
is there. What torch.compile has fused has no inside: compiled layers get a name each, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_omega.engine.engine import Engine
from megatron_omega.model.attention_mix import CrossAttention, SelfAttention
from megatron_omega.model.layers import DecoderLayer, EncoderLayer, EncoderNorm, Head
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.parallel.topology import Topology

LAYERS = (EncoderLayer, DecoderLayer, EncoderNorm, Head)
MESSAGES = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast", "reduce", "send",
    "recv", "batch_isend_irecv",  # isend and irecv are told apart by what they are
)  # fmt: skip
PIPELINE_PASSES = {"_exec_forward_pass": "forward", "_exec_backward_pass": "backward",
                   "_exec_optimizer_step": "optimizer"}  # fmt: skip
PLAIN_PASSES = {"forward": "forward", "backward": "backward", "step": "optimizer"}


@contextmanager
def named(name: str) -> Iterator[None]:
    """Give what happens inside a name in the trace, and, on CUDA, in NVTX."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()


@contextmanager
def named_ranges(engine: Engine, *, is_compiled: bool) -> Iterator[None]:
    """Name everything while this is entered."""
    with ExitStack() as stack:
        stack.enter_context(_named_layers(engine.module))
        stack.enter_context(_named_passes(engine))
        if not is_compiled:
            stack.enter_context(_named_branches())
            stack.enter_context(_named_messages(engine.topology))
        yield


class _Backward:
    """The layer whose backward pass runs, if any: it begins with the gradient of its output and ends with that of its
    input, which is where the layer before begins."""

    def __init__(self) -> None:
        self._open: ExitStack | None = None
        self._name = ""

    def begin(self, name: str) -> None:
        self.close()
        self._open, self._name = ExitStack(), name
        self._open.enter_context(named(name))

    def end(self, name: str) -> None:
        if self._name == name:
            self.close()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open, self._name = None, ""


@contextmanager
def _named_layers(model: nn.Module) -> Iterator[None]:
    backward, forward = _Backward(), dict[str, ExitStack]()
    handles: list[Any] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        forward[name] = ExitStack()
        forward[name].enter_context(named(name))
        if (hidden := _first_with_gradient(arguments)) is not None:
            handles.append(hidden.register_hook(lambda _: backward.end(f"{name} backward")))

    def after(name: str, output: Any) -> None:
        forward.pop(name).close()
        if (hidden := _first_with_gradient(output if isinstance(output, tuple) else (output,))) is not None:
            handles.append(hidden.register_hook(lambda _: backward.begin(f"{name} backward")))

    for name, layer in _layer_names(model):
        handles.append(layer.register_forward_pre_hook(_calling(before, name)))
        handles.append(layer.register_forward_hook(_calling(after, name)))
    try:
        yield
    finally:
        backward.close()
        for handle in handles:
            handle.remove()


def _calling(function: Callable[[str, Any], None], name: str) -> Callable[..., None]:
    """Return a hook that calls `function` with a name and the last of what it is given: arguments, or the output."""

    def hook(_: nn.Module, *given: Any) -> None:
        function(name, given[-1])

    return hook


def _layer_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer with its name, which parameters of it have in front of theirs."""
    for module in model.modules():
        if isinstance(module, Head):
            yield "layer head", module
        elif isinstance(module, LAYERS):
            info, _ = next(declared_parameters(module))
            parts = info.name.split(".")
            yield f"layer {'.'.join(parts[: 3 if parts[1] == 'layers' else 2])}", module


def _first_with_gradient(values: tuple[Any, ...]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)


@contextmanager
def _named_branches() -> Iterator[None]:
    attend, cross = SelfAttention._attend, CrossAttention.forward

    def branch(self: SelfAttention, group: range, *arguments: Any) -> tuple[Tensor, ...]:
        with named(f"branch {' + '.join(self.branches[index] for index in group)}"):
            return attend(self, group, *arguments)

    def crossing(self: CrossAttention, *arguments: Any) -> Tensor:
        with named("branch cross"):
            return cross(self, *arguments)

    with patch.object(SelfAttention, "_attend", branch), patch.object(CrossAttention, "forward", crossing):
        yield


@contextmanager
def _named_messages(topology: Topology) -> Iterator[None]:
    groups = {"tensor": topology.tensor, "data": topology.data, "pipeline": topology.pipeline}
    axes = {id(group.handle): axis for axis, group in groups.items() if group.handle is not None}
    with ExitStack() as stack:
        for name in MESSAGES:
            stack.enter_context(patch.object(dist, name, _naming_axis(getattr(dist, name), name, axes)))
        yield


def _naming_axis(send: Callable[..., Any], name: str, axes: Mapping[int, str]) -> Callable[..., Any]:
    @wraps(send)
    def call(*arguments: Any, **options: Any) -> Any:
        groups = [axes[id(value)] for value in (*arguments, *options.values()) if id(value) in axes]
        with named(" ".join(["message", *(groups or ["other"]), name])):
            return send(*arguments, **options)

    return call


@contextmanager
def _named_passes(engine: Engine) -> Iterator[None]:
    """Name the passes of each stage: also where DeepSpeed's pipeline engine looks its instructions up."""
    inner, topology = engine.deepspeed, engine.topology
    passes = PIPELINE_PASSES if engine.is_pipeline else PLAIN_PASSES

    def stage() -> int:
        return (getattr(inner, "_chunk", None) or 0) * topology.pipeline.size + topology.pipeline.rank

    def naming(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with named(f"stage {stage()} {name}"):
                return call(*arguments, **options)

        return wrapped

    with ExitStack() as stack:
        for method, name in passes.items():
            stack.enter_context(patch.object(inner, method, naming(getattr(inner, method), name)))
        if engine.is_pipeline:
            known = {function.__name__: function for function in inner._INSTRUCTION_MAP.values()}
            wrapped = {
                command: _as_method(naming(MethodType(function, inner), passes[function.__name__]))
                if known and function.__name__ in passes
                else function
                for command, function in inner._INSTRUCTION_MAP.items()
            }
            stack.enter_context(patch.object(inner, "_INSTRUCTION_MAP", wrapped))
        yield


def _as_method(call: Callable[..., Any]) -> Callable[..., Any]:
    """Take the engine once more in front, as the functions in its table do."""
    return lambda _, *arguments, **options: call(*arguments, **options)
