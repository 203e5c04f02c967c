"""The pretraining loss: language modelling on the decoder, masked-language modelling on the encoder, z-loss on both.

loss = (lm + mlm_weight * mlm + z) / n: sums over all labels of the global batch, n the number of LM labels, so that an
MLM label weighs as much as mlm_weight LM labels, however many there are. (`mlm_weighing: means` divides the MLM sum by
its own number of labels.) The counts are known before the forward pass; they come with the labels as two factors,
1 / count of each kind, so micro-batching and layout do not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_omega.model.context import ModelContext
from megatron_omega.parallel.cross_entropy import VocabularyLoss

LOSS_PARTS = ("lm_loss", "mlm_loss")


class PretrainingLoss:
    """Call with a forward pass's outputs and labels; afterwards `parts` holds both losses apart, without gradient."""

    def __init__(self, context: ModelContext) -> None:
        self.mlm_weight = context.objective.mlm_weight
        self._mlm_factor = ("labels", "means").index(context.objective.mlm_weighing)
        self.parts: dict[str, Tensor] = {}
        self._vocabulary = VocabularyLoss(
            parallel=context.parallel,
            vocab_size=context.model.vocab_size,
            padded_vocab_size=context.model.padded_vocab_size,
            output_multiplier=context.model.logit_multiplier,
            z_loss_weight=context.objective.z_loss_weight,
            chunk_tokens=context.objective.loss_chunk_tokens,
        )

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...], table: Tensor) -> Tensor:
        """outputs: what `Head` returns; table [V/tp, d]; labels: (lm [b, s_d], mlm [b, s_e], factors [2] fp32, rows).

        `rows` [n] are the places of the MLM labels in [b * s_e]; without them all are taken, labelled or not.
        """
        lm_labels, mlm_labels, factors, *rows = labels
        hidden = outputs[0].flatten(0, 1)
        lm, lm_loss = self._vocabulary(hidden, table, lm_labels.flatten())
        loss, mlm_loss = lm * factors[0], torch.zeros_like(lm_loss)
        if len(outputs) == 3:
            hidden, wanted = outputs[1].flatten(0, 1), mlm_labels.flatten()
            if rows:
                hidden, wanted = hidden[rows[0]], wanted[rows[0]]
            mlm, mlm_loss = self._vocabulary(hidden, table, wanted, outputs[2])
            loss = loss + self.mlm_weight * mlm * factors[self._mlm_factor]
        self.parts = {"lm_loss": lm_loss * factors[0], "mlm_loss": mlm_loss * factors[1]}
        return loss


class VocabularyHeads(nn.Module):
    """The loss as a module that holds the token table, so that ZeRO-3 brings it together around the call."""

    def __init__(self, table: nn.Parameter, loss: PretrainingLoss) -> None:
        super().__init__()
        self.weight = table
        self.loss = loss

    def forward(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        return self.loss(outputs, labels, self.weight)
