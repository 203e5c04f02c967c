"""How the next token is chosen from its logits. Pure functions; randomness comes from the caller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_omega.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Rules of choice, applied in this order."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of most probable tokens that holds this share of the probability."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the most probable one (arXiv 2407.01082); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive, and multiplies negative logits of tokens that were read or written (arXiv 1909.05858)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the token was written."""
    presence_penalty: float = 0.0
    """Taken from a token's logit if the token was written."""

    def __post_init__(self) -> None:
        findings = []
        if not 0 <= self.temperature < float("inf"):
            findings.append(f"temperature={self.temperature:g} must be 0 (greedy) or more")
        if self.top_k < 0:
            findings.append(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            findings.append(f"top_p={self.top_p:g} must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            findings.append(f"min_p={self.min_p:g} must be 0 (all tokens) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            findings.append(f"repetition_penalty={self.repetition_penalty:g} must be more than 0; 1 changes nothing")
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(value := getattr(self, name)) < float("inf"):
                findings.append(f"{name}={value:g} must be a finite number; 0 changes nothing")
        if findings:
            raise ConfigError(*findings)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the token chosen from `logits` [v]. Computed on the CPU, so that a seed means the same everywhere."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution that `choose` draws from: [v] -> [v], tokens that were cut off at 0."""
    # The largest logit is taken away first: a very small temperature would overflow otherwise.
    scaled = (logits - logits.max()) / sampling.temperature
    found, order = torch.sort(scaled.softmax(dim=-1), descending=True, stable=True)
    if sampling.top_k:
        found[sampling.top_k :] = 0
    found /= found.sum()
    if sampling.top_p < 1:  # at 1 a rounded sum would cut off the least probable
        found = torch.where(found.cumsum(dim=-1) - found < sampling.top_p, found, 0.0)
    return torch.zeros_like(scaled).scatter(0, order, found / found.sum())
