"""Vocabulary-parallel cross-entropy with z-loss, in chunks of tokens, so that full logits are never held.

For each chunk of tokens every rank multiplies by its rows of the token table, the ranks agree on the row maximum, the
sum of exponentials and the label's logit, and the gradients of hidden states and table are formed at once: the
backward pass only scales them. Reductions are in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.parallel.products import is_for_onednn, product
from megatron_omega.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class VocabularyLoss:
    """Settings of the loss; the tensors are arguments of `__call__`."""

    parallel: TensorParallel
    vocab_size: int
    """Real entries; rows beyond are padding and get no probability."""
    padded_vocab_size: int
    output_multiplier: float
    z_loss_weight: float
    chunk_tokens: int

    def __call__(
        self, hidden: Tensor, table: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (sum of cross-entropy + weighted z-loss, sum of cross-entropy without gradient), both 0-dim fp32.

        hidden [n, d] inside the tensor-parallel region; table [V / tp, d]; bias [V / tp]; labels [n], `IGNORED_LABEL`
        if there is nothing to predict. Empty input gives zeros that still carry (zero) gradients.
        """
        return _ChunkedLoss.apply(hidden, table, bias, labels, self)  # pyright: ignore[reportReturnType]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, table: Tensor, bias: Tensor | None, labels: Tensor, loss: VocabularyLoss
    ) -> tuple[Tensor, Tensor]:
        wants = any(context.needs_input_grad[:3])
        totals = hidden.new_zeros(2, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if wants else None
        d_table = torch.zeros_like(table, dtype=torch.float32) if wants else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants and bias is not None else None
        for begin in range(0, hidden.shape[0], loss.chunk_tokens):
            rows = slice(begin, begin + loss.chunk_tokens)
            logits = _logits(hidden[rows], table, bias, loss)
            totals += _loss_and_logit_gradient(logits, labels[rows], loss)
            if d_hidden is None or d_table is None:
                continue
            if d_bias is not None:
                d_bias += logits.sum(dim=0)
            _add_gradients(
                logits.to(hidden.dtype), hidden[rows], table, loss.output_multiplier, d_hidden[rows], d_table
            )
        if wants:
            context.save_for_backward(d_hidden, _as(d_table, table), _as(d_bias, bias))
        total, cross_entropy = totals
        context.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * gradient.to(saved.dtype) for saved in context.saved_tensors)
        return (*scaled, None, None)


def _add_gradients(
    d_logits: Tensor, hidden: Tensor, table: Tensor, scale: float, d_hidden: Tensor, d_table: Tensor
) -> None:
    """Fill `d_hidden` and add to `d_table`; scaled are these, not the much larger logits."""
    if is_for_onednn(d_logits, table.t()):
        torch.mul(product(d_logits, table.t()), scale, out=d_hidden)
        d_table.add_(product(d_logits.t(), hidden.t()), alpha=scale)
        return
    torch.mm(d_logits, table, out=d_hidden).mul_(scale)
    if hidden.dtype == d_table.dtype:
        torch.addmm(d_table, d_logits.t(), hidden, alpha=scale, out=d_table)  # torch counts FLOPs of this form alone
    else:
        d_table.add_(d_logits.t() @ hidden, alpha=scale)


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _logits(hidden: Tensor, table: Tensor, bias: Tensor | None, loss: VocabularyLoss) -> Tensor:
    """[n, d], [v, d] -> fp32 [n, v]; padding rows of the table get -inf."""
    logits = product(hidden, table).float().mul_(loss.output_multiplier)
    if bias is not None:
        logits += bias.float()
    start, stop = loss.parallel.shard(loss.padded_vocab_size)
    if stop > loss.vocab_size:
        logits[:, max(loss.vocab_size - start, 0) :] = float("-inf")
    return logits


def _loss_and_logit_gradient(logits: Tensor, labels: Tensor, loss: VocabularyLoss) -> Tensor:
    """Return [loss, cross-entropy] summed over the chunk; turn `logits` into the gradient of that loss, in place."""
    parallel = loss.parallel
    start, stop = parallel.shard(loss.padded_vocab_size)
    maximum = parallel.all_reduce(logits.amax(dim=1), dist.ReduceOp.MAX)
    is_mine = (labels >= start) & (labels < stop)
    column = torch.where(is_mine, labels - start, 0).unsqueeze(1)
    label_logit = torch.where(is_mine, logits.gather(1, column).squeeze(1), 0.0)
    logits.sub_(maximum.unsqueeze(1)).exp_()
    sums = parallel.all_reduce(torch.stack((logits.sum(dim=1), label_logit)))  # both sums in one message
    log_partition = sums[0].log() + maximum
    counts = (labels != IGNORED_LABEL).float()
    cross_entropy = ((log_partition - sums[1]) * counts).sum()
    z_loss = loss.z_loss_weight * (log_partition.square() * counts).sum()
    scale = (1 + 2 * loss.z_loss_weight * log_partition) * counts / sums[0]
    logits.mul_(scale.unsqueeze(1))
    logits.scatter_add_(1, column, -(is_mine * counts).unsqueeze(1))
    return torch.stack((cross_entropy + z_loss, cross_entropy))
