"""Products that enter the tensor-parallel region: right gradients, and their message behind the weights' gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel import tensor_parallel
from megatron_omega.parallel.entering import enter_products
from megatron_omega.parallel.tensor_parallel import TensorParallel

WIDTH, FEATURES = 6, (8, 4)


class _Recorder(TorchDispatchMode):
    """Writes down products, copies, and where messages are posted and awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "clone"):
            self.events.append(name)
        return func(*args, **(kwargs or {}))

    def watched(self, collective: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.events.append("post")
            work = collective(*arguments, **options)
            return work if work is None else _Awaited(work, self.events)

        return call


class _Awaited:
    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("await")
        self.work.wait()


@pytest.fixture
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.usefixtures("fake_group")
def test_the_message_is_posted_before_and_awaited_after_the_weights_gradients(
    weights: int, *, is_sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = TensorParallel(dist.group.WORLD, 0, 2, is_sequence_parallel)
    hidden = torch.randn(1, 4 // (1 + is_sequence_parallel), WIDTH, requires_grad=True)
    matrices = [torch.randn(rows, WIDTH, requires_grad=True) for rows in FEATURES[:weights]]
    recorder = _Recorder()
    monkeypatch.setattr(dist, "all_reduce", recorder.watched(dist.all_reduce))
    scatter = recorder.watched(tensor_parallel._reduce_scatter_single)
    monkeypatch.setattr(tensor_parallel, "_reduce_scatter_single", scatter)
    products = enter_products(hidden, parallel, *matrices)
    loss = torch.stack([product.sum() for product in products]).sum()
    with recorder:
        loss.backward()
    assert recorder.events == ["mm"] * weights + ["post"] + ["mm"] * weights + ["await"]


@pytest.mark.usefixtures("fake_group")
def test_leaving_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel, recorder = TensorParallel(dist.group.WORLD, 0, 2), _Recorder()
    monkeypatch.setattr(dist, "all_reduce", recorder.watched(dist.all_reduce))
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    with recorder:
        parallel.leave(torch.randn(3, WIDTH) @ weight).sum().backward()
    assert recorder.events == ["mm", "post", "mm"]


def _gradients(size: int, *, is_sequence_parallel: bool) -> list[Any]:
    """Run a block that enters with two weights and leaves, on `size` ranks; return output and gradients of its parts."""
    generator = torch.Generator().manual_seed(0)
    hidden, *matrices = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, WIDTH), *((rows, WIDTH) for rows in FEATURES), (WIDTH, FEATURES[0]))
    )
    rank = 0
    if size > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        rank = dist.get_rank()
    parallel = TensorParallel(None if size == 1 else dist.group.WORLD, rank, size, is_sequence_parallel)
    mine = hidden.chunk(size, dim=1)[rank] if is_sequence_parallel else hidden
    leaves = [mine.clone(), *(m.chunk(size, dim=0)[rank].clone() for m in matrices[:2])]
    leaves.append(matrices[2].chunk(size, dim=1)[rank].clone())
    for leaf in leaves:
        leaf.requires_grad_()
    wide, narrow = _enter(leaves[0], parallel, leaves[1], leaves[2])
    partial = torch.tanh(wide) @ leaves[3].t()
    partial = partial + narrow.square().sum(dim=-1, keepdim=True)
    output = parallel.leave(partial)
    output.sin().sum().backward()
    return [output.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]  # pyright: ignore[reportOptionalMemberAccess]


def _enter(hidden: Tensor, parallel: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
    if parallel.size == 1:
        return tuple(hidden @ weight.t() for weight in weights)
    return enter_products(hidden, parallel, *weights)


@pytest.mark.distributed
@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_two_ranks_equal_one(*, is_sequence_parallel: bool) -> None:
    output, d_hidden, *d_weights = _gradients(1, is_sequence_parallel=False)
    ranks = run_ranks(_gradients_of_two, 2, is_sequence_parallel, timeout_seconds=90)
    for rank, found in enumerate(ranks):
        rows = slice(2 * rank, 2 * rank + 2) if is_sequence_parallel else slice(None)
        assert found[0] == pytest.approx(output[:, rows]) and found[1] == pytest.approx(d_hidden[:, rows])
        for gradient, whole, dim in zip(found[2:], d_weights, (0, 0, 1), strict=True):
            shard = torch.from_numpy(whole).chunk(2, dim=dim)[rank]
            assert gradient == pytest.approx(shard.numpy())


def _gradients_of_two(is_sequence_parallel: bool) -> list[Any]:
    return _gradients(2, is_sequence_parallel=is_sequence_parallel)
