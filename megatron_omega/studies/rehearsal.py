"""Run the real model code without data, memory or network, and count what it does.

Every layer of a stage is built on the meta device and run forward and backward in a fake process group of any size.
Counted are parameters, FLOPs, tensor-parallel messages with their bytes, what crosses the cuts to other stages, and the
bytes autograd keeps. Attention is taken to the fused kernel of the CPU, as in a real run there; the meta device by
itself would spell it out and keep the scores. Every encoder token counts as masked.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from megatron_omega import accounting
from megatron_omega.config.schema import RunConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.loss import PretrainingLoss
from megatron_omega.model.omega import State, build_token_table, flow, leave_flow, omega_layers
from megatron_omega.parallel.tensor_parallel import TensorParallel
from megatron_omega.planner.activations import Shape
from megatron_omega.planner.candidates import Candidate
from megatron_omega.planner.stages import cut
from megatron_omega.planner.work import (
    Collective,
    CollectiveKind,
    Messages,
    layer_works,
    pipeline_messages,
    table_parameters,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Collective -> (its name in the plan, which argument is the full tensor).
COLLECTIVES: dict[str, tuple[CollectiveKind, int]] = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


@dataclass
class Counts:
    """What one stage did with one micro-batch on one rank."""

    parameters: int = 0
    forward_flops: int = 0
    total_flops: int = 0
    """Forward, recomputed and backward."""
    kept_bytes: int = 0
    """Storages that autograd held after the forward pass, parameters apart."""
    messages: Messages = field(default_factory=Counter)
    """Along the tensor axis, forward and backward."""
    sent_forward: list[int] = field(default_factory=list)
    """Bytes of each tensor handed to the next stage."""
    sent_backward: list[int] = field(default_factory=list)
    """Bytes of each gradient that comes back."""


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Make this process rank 0 of `world_size` ranks that do not exist; messages return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_stage(config: RunConfig, first: int, last: int) -> Counts:
    """Run layers `first` to `last` - 1 of the layer list forward and backward on tensor rank 0, in a `fake_world`."""
    tp = config.parallel.tensor_parallel_size
    group = cast(dist.ProcessGroup, dist.new_group(list(range(tp)))) if tp > 1 else None
    context = ModelContext.of(config, TensorParallel(group, 0, tp, config.parallel.sequence_parallel))
    recipes = omega_layers(context)[first:last]
    names = [recipe.name for recipe in recipes]
    counts, counter = Counts(), _Counter()
    fused = patch.object(F, "scaled_dot_product_attention", _fused_attention)
    with torch.device("meta"), _dtype(DTYPES[config.precision.dtype]), fused, _without_garbage_collection():
        table = build_token_table(context) if {"embedding", "bridge", "output"} & {*names} else None
        modules = [
            (table if module.is_token_table else module.build(), module.apply)
            for recipe in recipes for module in recipe.modules
        ]  # fmt: skip
        parameters = {p for module, _ in modules if module is not None for p in module.parameters()}
        counts.parameters = sum(parameter.numel() for parameter in parameters)
        keeper = _Keeper(parameters)
        state = flow(_inputs(config, names[0]), context.kernels)
        with counter, keeper.hooks():
            for module, apply in modules:
                assert module is not None
                state = apply(module, state)
        state = leave_flow(state)
        if names[-1] != "output":
            _describe_cut(counts, state)
            outputs, counts.forward_flops = [output for output in state if output.requires_grad], counter.flops
        else:
            before = counter.flops
            with counter, keeper.hooks():
                weight = cast(Tensor, cast(nn.Module, table).weight)
                outputs = [PretrainingLoss(context)(state, _labels(config), weight)]
            counts.forward_flops = before + (counter.flops - before) // 3  # the losses form their gradients at once
        counts.kept_bytes = keeper.num_bytes
        with counter:
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    counts.total_flops, counts.messages = counter.flops, counter.messages
    return counts


def _labels(config: RunConfig) -> State:
    b, data = config.batch.micro_batch_size, config.data
    lm = torch.zeros(b, data.decoder_seq_length, dtype=torch.int64)
    mlm = torch.zeros(b, data.encoder_seq_length, dtype=torch.int64)
    return lm, mlm, torch.ones(2, dtype=torch.float32)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Call the kernel that scaled dot-product attention takes on a CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]


class _Counter(TorchDispatchMode):
    """Counts FLOPs of matrix products and attention, and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.messages: Messages = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        namespace, _, name = str(packet).partition(".")
        if namespace == "c10d" and name in COLLECTIVES:
            kind, position = COLLECTIVES[name]
            tensor = args[position]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            self.messages[Collective(kind, tensor.numel() * tensor.element_size())] += 1
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    """Two products, of all queries with all keys; torch's own counter does not know the kernel of the CPU."""
    *rest, length, head_dim = query
    return 4 * torch.Size(rest).numel() * length * key[-2] * head_dim


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(_: torch.Size, query: torch.Size, key: torch.Size, *__: object, **___: object) -> int:
    """The four gradients of two products."""
    return 2 * _attention_flops(query, key)


class _Keeper:
    """Adds up the storages autograd keeps, each once."""

    def __init__(self, parameters: set[nn.Parameter]) -> None:
        self.num_bytes = 0
        self.sizes: list[int] = []
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._seen: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that its address is not used again
            self.num_bytes += storage.nbytes()
            self.sizes.append(storage.nbytes())
        return tensor


def _inputs(config: RunConfig, first: str) -> State:
    """Return what the stage that begins with layer `first` receives."""
    data, b, d = config.data, config.batch.micro_batch_size, config.model.hidden_size
    shards = config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1

    def stream(length: int) -> Tensor:
        return torch.empty(b, length, d, requires_grad=True)

    def integers(length: int) -> Tensor:
        return torch.ones(b, length, dtype=torch.int64)

    encoder, decoder = data.encoder_seq_length, data.decoder_seq_length
    kind = first.partition(".")[0]
    if config.model.is_decoder_only:
        hidden = integers(decoder) if kind == "embedding" else stream(decoder // shards)
        return hidden, integers(decoder)
    if kind == "embedding":
        return integers(encoder), integers(encoder), integers(decoder), integers(decoder)
    if kind in ("encoder", "bridge"):
        return stream(encoder // shards), integers(encoder), integers(decoder), integers(decoder)
    if kind == "head" and not config.model.has_mlm_head:
        return stream(decoder // shards), integers(decoder)
    return stream(encoder), stream(decoder // shards), integers(encoder), integers(decoder)


def _describe_cut(counts: Counts, state: Sequence[Tensor]) -> None:
    counts.sent_forward = [tensor.numel() * tensor.element_size() for tensor in state]
    counts.sent_backward = [t.numel() * t.element_size() for t in state if t.is_floating_point()]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Hold the collector still: a graph of many layers is many objects, none of them garbage, and it looks at each."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class Comparison:
    """One quantity of one stage: what the plan says, what was counted."""

    stage: str
    quantity: str
    predicted: object
    counted: object
    tolerance: float = 0.0
    """Relative difference that is allowed."""

    @property
    def agrees(self) -> bool:
        if isinstance(self.predicted, int) and isinstance(self.counted, int):
            return abs(self.predicted - self.counted) <= self.tolerance * max(self.counted, 1)
        return self.predicted == self.counted


@dataclass
class Rehearsal:
    """Compares layouts with their plans; stages that layouts share run once. Use inside a `fake_world`."""

    config: RunConfig
    counted: dict[object, Counts] = field(default_factory=dict)

    def compare(self, candidate: Candidate) -> list[Comparison]:
        """Run every distinct stage of `candidate` and put its plan beside the counts."""
        config = candidate.apply(self.config)
        works, shape = layer_works(config), Shape.of(config)
        stages = cut(config, candidate, accounting.layer_costs(config))
        found: list[Comparison] = []
        seen: set[object] = set()
        for index, stage in enumerate(stages):
            after = stages[index + 1].kinds[0] if index + 1 < len(stages) else None
            key = (candidate.tensor, candidate.sequence_parallel, candidate.micro_batch, candidate.recompute)
            key = (*key, stage.signature, stage.kinds[0], stage.kinds[-1], after)
            if key in seen:
                continue
            seen.add(key)
            if key not in self.counted:
                self.counted[key] = count_stage(config, stage.first, stage.first + len(stage.kinds))
            cuts = pipeline_messages(config, stage.kinds[-1], after) if after else ([], [])
            table = table_parameters(config) if stage.has_table else 0
            counts, name = self.counted[key], f"{index}: {stage.describe()}"
            found += [
                Comparison(name, "parameters", stage.parameters(config, works) + table, counts.parameters),
                Comparison(name, "forward FLOPs", stage.forward_flops(works), counts.forward_flops),
                Comparison(name, "total FLOPs", stage.total_flops(works), counts.total_flops),
                Comparison(name, "kept bytes", stage.kept(config, works, shape), counts.kept_bytes, 0.01),
                *_compare_messages(name, stage.messages(config, works), counts.messages),
                Comparison(name, "sent forward, bytes", cuts[0], counts.sent_forward),
                Comparison(name, "sent backward, bytes", cuts[1], counts.sent_backward),
            ]
        return found


def _compare_messages(stage: str, predicted: Messages, counted: Messages) -> Iterator[Comparison]:
    for kind in sorted({message.kind for message in [*predicted, *counted]}):
        pairs = []
        for messages in (predicted, counted):
            chosen = [(message.num_bytes, count) for message, count in messages.items() if message.kind == kind]
            pairs.append(
                (sum(count for _, count in chosen), sum(size * count for size, count in chosen), sorted(chosen))
            )
        yield Comparison(stage, f"{kind} messages", pairs[0][0], pairs[1][0])
        yield Comparison(stage, f"{kind} bytes", pairs[0][1], pairs[1][1])
        yield Comparison(stage, f"{kind} sizes", pairs[0][2], pairs[1][2])
