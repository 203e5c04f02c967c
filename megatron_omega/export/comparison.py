"""Do exported weights say the same as the checkpoint they came from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_omega.export.adapted import open_whole
from megatron_omega.export.loading import load_omega
from megatron_omega.export.native import DTYPES, open_export
from megatron_omega.model.omega import Omega, vocabulary_logits

POSITIONS = 64
TOLERANCE = {"fp32": 0.0, "bf16": 0.1}
"""Largest difference of a logit, in standard deviations of the logits. fp32 is copied: nothing may change. bf16
rounds weights by 0.1% (root mean square), of which several times as much reaches the farthest of a million logits; a
wrong tensor changes them by about 1."""


@dataclass(frozen=True)
class Comparison:
    """What reading an export back has shown."""

    num_tensors: int
    changed: tuple[str, ...]
    """Tensors that are not, bit for bit, the checkpoint's in the export's number format."""
    logit_difference: float
    """Largest difference between logits of both models, in standard deviations."""
    tolerance: float

    @property
    def is_same(self) -> bool:
        return not self.changed and self.logit_difference <= self.tolerance


def compare_export(export: Path, checkpoint: Path, device: str = "cpu") -> Comparison:
    """Read an export back and compare it with its checkpoint: every tensor, and the logits of both heads.

    The models are loaded one after the other, so that this needs the memory of one.
    """
    with open_whole(checkpoint) as source:
        copy = open_export(export)
        dtype = copy.description.dtype
        names = copy.names()
        changed = [
            name for name in source.names()
            if name not in names or not torch.equal(copy.tensor(name), source.tensor(name).to(DTYPES[dtype]))
        ]  # fmt: skip
        copy.close()
    difference = largest_difference(*(reference_logits(load_omega(path, device)[0]) for path in (checkpoint, export)))
    return Comparison(len(names), tuple(changed), difference, TOLERANCE[dtype])


@torch.inference_mode()
def reference_logits(model: Omega) -> Sequence[Tensor]:
    """Return the logits of the decoder, and of the MLM head where there is one, for made-up tokens."""
    config = model.context
    generator = torch.Generator().manual_seed(0)
    encoder = () if config.model.is_decoder_only else (config.encoder_seq_length,)
    inputs: list[Tensor] = []
    for length in (*encoder, config.decoder_seq_length):
        ids = torch.randint(config.model.vocab_size, (1, min(length, POSITIONS)), generator=generator)
        inputs += [ids, torch.ones_like(ids)]
    device = model.table.weight.device
    hidden, *mlm = model.hidden(tuple(tensor.to(device) for tensor in inputs))
    logits = [vocabulary_logits(model, hidden)]
    return [*logits, vocabulary_logits(model, *mlm)] if mlm else logits


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest difference, in standard deviations of the first; infinite where something is not a number."""
    found = [float((a - b).abs().max() / a.std()) for a, b in zip(first, second, strict=True)]
    return max(value if value == value else float("inf") for value in found)
