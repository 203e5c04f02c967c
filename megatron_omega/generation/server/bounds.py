"""Bounds on all that a client may ask for: sizes, counts and seconds. Knows no framework."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_omega.errors import ConfigError

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""What this machine is called by itself, as a Host header has it."""


@dataclass(frozen=True)
class Bounds:
    """What one request, one connection and all of them together may take."""

    body_bytes: int = 1 << 20
    """Body of a request."""
    prompt_tokens: int = 2048
    """Tokens of one prompt, a suffix included."""
    new_tokens: int = 2048
    """Tokens of one answer."""
    prompts: int = 64
    """Prompts or texts of one request."""
    samples: int = 16
    """Answers to one prompt (n, best_of), and beams."""
    choices: int = 128
    """Answers to one request: its prompts times best_of."""
    alternatives: int = 20
    """Log-probabilities of a token."""
    stop_strings: int = 16
    """Stop strings of one request."""
    stop_characters: int = 256
    """Characters of one stop string."""
    candidates: int = 100
    """Candidates of a mask."""
    queue: int = 256
    """Answers and texts of one model that wait or grow; the rest are sent away with 429."""
    connections: int = 1024
    """Open connections; more are closed."""
    header_bytes: int = 64 << 10
    """First line and headers of a request."""
    header_seconds: float = 15.0
    """Until the headers of a request are there, from the start of a connection or the end of the last answer."""
    body_seconds: float = 15.0
    """Until the body is there."""
    answer_seconds: float = 600.0
    """Until the answer is whole."""
    write_seconds: float = 30.0
    """That a client may leave its answer unread."""
    drain_seconds: float = 30.0
    """That answers may still take after a request to stop."""

    def __post_init__(self) -> None:
        findings = [f"{name}={value:g} must be more than 0" for name, value in vars(self).items() if not value > 0]
        if findings:
            raise ConfigError(*findings)
