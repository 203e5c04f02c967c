"""A training of the small model in fp64 on the CPU, without engine, kernels for losses, layouts or mixed precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.layout import Layout
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.optimizer import build_optimizer, set_learning_rate
from megatron_omega.engine.results import MicroBatch
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.topology import create_topology
from megatron_omega.studies.made_up import micro_batch


def plain_losses(config: RunConfig, steps: int) -> list[float]:
    """Return the loss of each of `steps` steps on the made-up corpus, one process, one batch at a time."""
    model = Omega(ModelContext.of(config)).double()
    topology = create_topology(Layout())
    optimizer, _ = build_optimizer(model.parameters(), config.optimizer, topology, device_type="cpu")
    set_learning_rate(optimizer, config.optimizer.learning_rate)
    size, losses = config.batch.global_batch_size, []
    for step in range(steps):
        loss = _loss(model, config, micro_batch(step * size, size, config))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _loss(model: Omega, config: RunConfig, batch: MicroBatch) -> Tensor:
    """Return the loss as its page defines it, from whole logits."""
    lm, mlm = batch.labels
    outputs, z = model.hidden(batch.inputs), config.objective.z_loss_weight
    scale, table = config.model.logit_multiplier, model.table.weight[: config.model.vocab_size]
    lm_count, mlm_count = ((labels != IGNORED_LABEL).sum().clamp_min(1) for labels in (lm, mlm))
    loss = _summed(outputs[0] @ table.t() * scale, lm, z) / lm_count
    if len(outputs) == 3:
        count = lm_count if config.objective.mlm_weighing == "labels" else mlm_count
        logits = outputs[1] @ table.t() * scale + outputs[2][: config.model.vocab_size]
        loss = loss + config.objective.mlm_weight * _summed(logits, mlm, z) / count
    return loss


def _summed(logits: Tensor, labels: Tensor, z_loss_weight: float) -> Tensor:
    """Cross-entropy and z-loss, summed over labels."""
    logits, labels = logits.flatten(0, 1), labels.flatten()
    partition = logits.logsumexp(dim=-1).square() * (labels != IGNORED_LABEL)
    return F.cross_entropy(logits, labels, reduction="sum") + z_loss_weight * partition.sum()


def relative(found: list[float], meant: list[float]) -> float:
    """Return the largest relative difference of two lists of losses."""
    pairs = torch.tensor([found, meant], dtype=torch.float64)
    return float(((pairs[0] - pairs[1]) / pairs[1]).abs().max())
