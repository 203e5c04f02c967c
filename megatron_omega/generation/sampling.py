"""How the next token is chosen from its logits. Pure functions; randomness comes from the caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_omega.errors import ConfigError

_FIRST_LOOK = 128


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

    @property
    def penalises(self) -> bool:
        """Whether it takes anything from tokens that were read or written."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the token chosen from `logits` [v]. Computed on the CPU, so that a seed means the same everywhere."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    shares, order = kept(logits, sampling)
    bounds = shares.double().cumsum(dim=-1)
    drawn = torch.rand(1, generator=generator, dtype=torch.float64) * bounds[-1]
    place = min(int(torch.searchsorted(bounds, drawn, right=True)), len(bounds) - 1)
    return place if order is None else int(order[place])


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution that `choose` draws from: [v] -> [v], tokens that were cut off at 0."""
    shares, order = kept(logits, sampling)
    shares = shares / shares.sum()
    return shares if order is None else torch.zeros_like(logits).scatter(0, order, shares)


def kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the shares of the tokens that may be drawn, the most probable first, and their ids; None: all, in order.

    The most probable tokens are looked for in one pass; only if they do not hold enough is all of it sorted.
    """
    # The largest logit is taken away first: a very small temperature would overflow otherwise.
    scaled = (logits - logits.max()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        return scaled.exp(), None
    total = 1.0 if sampling.top_k else float(scaled.exp().sum())  # after top_k only those kept count
    for count in (sampling.top_k or _FIRST_LOOK, len(logits)):
        found, order = scaled.topk(min(count, len(logits)))
        shares = found.exp()
        shares = shares / (shares.sum() if sampling.top_k else total)
        is_kept = shares >= sampling.min_p * shares[0]
        if sampling.top_p < 1:  # at 1 a rounded sum would cut off the least probable
            is_kept &= shares.cumsum(dim=-1) - shares < sampling.top_p
        if sampling.top_k or not is_kept[-1]:
            break
    return shares[is_kept], order[is_kept]


def penalised(logits: Tensor, sampling: Sampling, read: Iterable[int], written: Sequence[int]) -> Tensor:
    """Return `logits` [v] after what `sampling` takes from tokens that were read or written."""
    if not sampling.penalises:
        return logits
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*read, *written}), device=logits.device)
        values = logits[seen]
        factor = torch.where(values > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits[seen] = values * factor
    if written:
        counts = Counter(written)
        ids, often = torch.tensor([*counts.items()], device=logits.device).unbind(1)
        logits[ids] -= sampling.frequency_penalty * often + sampling.presence_penalty
    return logits
