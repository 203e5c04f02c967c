"""The conjugate collectives against what they mean on one process; the vocabulary-parallel loss against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_omega.config.layout import Layout
from megatron_omega.engine.start import start_distributed
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.cross_entropy import VocabularyLoss
from megatron_omega.parallel.layers import TokenTable
from megatron_omega.parallel.parameters import describe
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel
from megatron_omega.parallel.topology import create_topology

SIZE = 2


def _tensor_parallel(size: int, *, sequence_parallel: bool) -> TensorParallel:
    start_distributed(local_rank=0, timeout_seconds=60)
    return create_topology(Layout(tensor=size)).tensor_parallel(sequence_parallel=sequence_parallel)


def _collectives() -> dict[str, Any]:
    plain = _tensor_parallel(SIZE, sequence_parallel=False)
    sequence = TensorParallel(plain.group, plain.rank, plain.size, sequence_parallel=True)
    rank = plain.rank
    full = torch.arange(24.0).view(2, 4, 3)
    mine = full + 100 * rank
    part = full[:, 2 * rank : 2 * rank + 2].clone().requires_grad_()
    results: dict[str, Any] = {}
    for name, function, value, gradient in (
        ("enter", plain.enter, mine.clone().requires_grad_(), mine),
        ("leave", plain.leave, mine.clone().requires_grad_(), full),
        ("enter-sequence", sequence.enter, part, mine),
        ("leave-sequence", sequence.leave, mine.clone().requires_grad_(), full[:, :2]),
        ("share", plain.share_gradient, mine.clone().requires_grad_(), full),
    ):
        before = value.detach().clone()
        output = function(value)
        output.backward(gradient)
        assert torch.equal(value.detach(), before), f"{name} changed its input"
        results[name] = (output.detach().numpy(), value.grad.numpy())  # pyright: ignore[reportOptionalMemberAccess]
    return results


@pytest.mark.distributed
def test_collectives_are_each_others_backward() -> None:
    full = torch.arange(24.0).view(2, 4, 3)
    total = (2 * full + 100).numpy()
    for rank, found in enumerate(run_ranks(_collectives, SIZE, timeout_seconds=90)):
        mine = (full + 100 * rank).numpy()
        rows = slice(2 * rank, 2 * rank + 2)
        expected = {
            "enter": (mine, total),
            "leave": (total, full.numpy()),
            "enter-sequence": (full.numpy(), total[:, rows]),
            "leave-sequence": (total[:, rows], torch.cat((full[:, :2], full[:, :2]), dim=1).numpy()),
            "share": (mine, (full / 2).numpy()),
        }
        for name, pair in expected.items():
            for what, left, right in zip(("value", "gradient"), pair, found[name], strict=True):
                assert (left == right).all(), f"{name}: {what} on rank {rank}"


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator)
    table = torch.randn(128, 8, generator=generator)
    bias = torch.randn(128, generator=generator)
    labels = torch.randint(0, 101, (37,), generator=generator)
    labels[3] = -100
    return hidden, table, bias, labels


def _loss(parallel: TensorParallel, *, with_bias: bool, chunk: int = 10) -> tuple[float, float, list]:
    hidden, table, bias, labels = _problem()
    start, stop = parallel.shard(128)
    leaves = [hidden.requires_grad_(), table[start:stop].clone().requires_grad_()]
    leaves += [bias[start:stop].clone().requires_grad_()] if with_bias else []
    loss = VocabularyLoss(parallel, 101, 128, 0.7, 1e-2, chunk)
    total, cross_entropy = loss(parallel.enter(leaves[0]), leaves[1], labels, *leaves[2:])
    (3 * total).backward()
    return total.item(), cross_entropy.item(), [leaf.grad.numpy() for leaf in leaves]  # pyright: ignore[reportOptionalMemberAccess]


def _parallel_losses(size: int) -> list:
    parallel = _tensor_parallel(size, sequence_parallel=False)
    return [_loss(parallel, with_bias=with_bias) for with_bias in (False, True)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_loss_equals_torchs(chunk: int, *, with_bias: bool) -> None:
    total, cross_entropy, gradients = _loss(SERIAL, with_bias=with_bias, chunk=chunk)
    hidden, table, bias, labels = (part.double() if part.is_floating_point() else part for part in _problem())
    leaves = [part.requires_grad_() for part in (hidden, table, bias)]
    logits = 0.7 * leaves[0] @ leaves[1].t() + (leaves[2] if with_bias else 0)
    kept, wanted = logits[:, :101][labels >= 0], labels[labels >= 0]
    reference = F.cross_entropy(kept, wanted, reduction="sum")
    reference_total = reference + 1e-2 * kept.logsumexp(dim=1).square().sum()
    (3 * reference_total).backward()
    assert cross_entropy == pytest.approx(reference.item(), rel=1e-6)
    assert total == pytest.approx(reference_total.item(), rel=1e-6)
    for leaf, gradient in zip(leaves, gradients, strict=False):
        assert torch.allclose(leaf.grad.float(), torch.from_numpy(gradient), atol=2e-5)  # pyright: ignore[reportOptionalMemberAccess]
    assert not gradients[1][101:].any(), "padding rows of the table get no gradient"


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_loss_is_the_same_for_any_split_of_the_vocabulary(size: int) -> None:
    serial = [_loss(SERIAL, with_bias=with_bias) for with_bias in (False, True)]
    ranks = run_ranks(_parallel_losses, size, size, timeout_seconds=90)
    for case, (total, cross_entropy, gradients) in enumerate(serial):
        for rank in ranks:
            assert rank[case][:2] == pytest.approx((total, cross_entropy), rel=1e-6)
            assert rank[case][2][0] == pytest.approx(gradients[0], abs=1e-5)
        for leaf in range(1, len(gradients)):  # table and bias: the shards put together
            shards = [torch.from_numpy(rank[case][2][leaf]) for rank in ranks]
            assert torch.allclose(torch.cat(shards), torch.from_numpy(gradients[leaf]), atol=1e-5)


def test_loss_without_any_label_is_zero_and_has_gradients() -> None:
    table = torch.randn(128, 8, requires_grad=True)
    loss = VocabularyLoss(SERIAL, 128, 128, 1.0, 1e-4, 16)
    total, _ = loss(torch.empty(0, 8), table, torch.empty(0, dtype=torch.long))
    total.backward()
    assert total.item() == 0 and table.grad is not None and not table.grad.any()


def test_initial_values_do_not_depend_on_the_split() -> None:
    whole = TokenTable(130, 8, parallel=SERIAL, seed=3).weight
    parts = [TokenTable(130, 8, parallel=TensorParallel(None, rank, 3), seed=3).weight for rank in range(3)]
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole)
    assert [describe(part).local_shape for part in parts] == [tuple(part.shape) for part in parts]
    assert not torch.equal(TokenTable(130, 8, parallel=SERIAL, seed=4).weight, whole)
