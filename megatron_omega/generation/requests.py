"""What the scheduler is asked and what it answers: plain values. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_omega.errors import ConfigError
from megatron_omega.generation.sampling import Sampling

Reason = Literal["stop", "length", "cancelled"]
Alternatives = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities, the most probable first."""


@dataclass(frozen=True)
class Request:
    """One prompt, and how it is to be continued."""

    encoder_ids: tuple[int, ...]
    """What the encoder reads, its mode token included; empty for a decoder-only model."""
    decoder_ids: tuple[int, ...]
    """What the decoder reads before the first new token; one id or more."""
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    end_ids: tuple[int, ...] = ()
    """Ids that end the text as the end token does: a sentinel, where a span is filled in."""
    samples: int = 1
    """Texts wanted, each with a seed of its own; under beam search the best ones."""
    beams: int = 1
    """Width of beam search; 1 samples."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** this."""
    log_probabilities: int = 0
    """Alternatives wanted for every token."""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens, 1), "samples": (self.samples, 1), "beams": (self.beams, 1),
            "log_probabilities": (self.log_probabilities, 0),
        }  # fmt: skip
        findings = [
            f"{name}={value} must be {least} or more" for name, (value, least) in bounds.items() if value < least
        ]
        if not self.decoder_ids:
            findings.append("decoder_ids is empty; the decoder has to begin with a token")
        if any(not text for text in self.stop):
            findings.append("a stop string is empty; leave it out")
        if 1 < self.beams < self.samples:
            findings.append(f"samples={self.samples} must be at most beams={self.beams}")
        if not abs(self.length_penalty) < float("inf"):
            findings.append(f"length_penalty={self.length_penalty} must be a finite number")
        if findings:
            raise ConfigError(*findings)


class Token(NamedTuple):
    """One token more of one text."""

    request: int
    sample: int
    id: int
    text: str
    """The piece of text that became final with it; '' while a character, or a possible stop string, is unfinished."""
    log_probability: float
    """Of this token, under the model's own distribution: before temperature, penalties and cuts."""
    alternatives: Alternatives


class Finished(NamedTuple):
    """The end of one text."""

    request: int
    sample: int
    reason: Reason
    text: str
    """All of it, up to a stop string."""
    ids: tuple[int, ...]
    """All ids that were generated, an end token included."""


Event = Token | Finished


class Scored(NamedTuple):
    """How probable given tokens are, each given those before it."""

    log_probabilities: tuple[float, ...]
    """Of all but the first of the decoder's tokens."""
    alternatives: tuple[Alternatives, ...]


@dataclass(frozen=True)
class Limits:
    """What a scheduler may take."""

    sequences: int = 16
    """Texts that grow at the same time."""
    cache_tokens: int = 16_384
    """Tokens of all texts together of which keys and values are kept."""
    memory_tokens: int = 16_384
    """The same of what encoders have read."""
    chunk_tokens: int = 256
    """Tokens of prompts that are read between two steps of the texts that grow."""
    prefixes: int = 8
    """Beginnings of prompts that are kept for later ones (decoder-only models: an encoder's memory is kept whole)."""

    def __post_init__(self) -> None:
        least = {"prefixes": 0}
        findings = [
            f"{name}={value} must be {least.get(name, 1)} or more"
            for name, value in vars(self).items()
            if value < least.get(name, 1)
        ]
        if findings:
            raise ConfigError(*findings)
