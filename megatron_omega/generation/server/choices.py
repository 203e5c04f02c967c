"""From the events of a text to a choice of OpenAI's completions: its parts, its log-probabilities. Pure of HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.generation.requests import Alternatives, Event, Finished, Scored, Token


class Names:
    """Tokens as clients see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def name(self, number: int) -> str:
        """Return a token as text: a byte that is no character as `bytes:\\x9c`, a control symbol by its piece."""
        byte = self._byte(number)
        if byte is not None:
            return f"bytes:\\x{byte:02x}"
        return self._piece(number) if number in self._symbols else self._tokenizer.decode([number])

    def num_characters(self, number: int) -> int:
        """Return how many characters of a text begin with this token."""
        byte = self._byte(number)
        if byte is not None:
            return int(byte & 0xC0 != 0x80)
        return 0 if number in self._symbols else len(self._tokenizer.decode([number]))

    @cached_property
    def _symbols(self) -> frozenset[int]:
        return frozenset(range(self._tokenizer.vocab_size)) - frozenset(self._tokenizer.text_ids)

    def _piece(self, number: int) -> str:
        return self._tokenizer.processor.id_to_piece(number)

    def _byte(self, number: int) -> int | None:
        return int(self._piece(number)[3:5], 16) if self._tokenizer.processor.is_byte(number) else None


@dataclass
class LogProbabilities:
    """The lists of a choice's logprobs, grown token by token."""

    names: Names
    offset: int = 0
    """Characters of the choice's text before the next token."""
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, number: int, log_probability: float, alternatives: Alternatives) -> None:
        """Add a token."""
        self.tokens.append(self.names.name(number))
        self.token_logprobs.append(log_probability)
        # The most probable of several tokens with one text is kept: it comes last. The token itself is always there.
        named = {self.names.name(other): value for other, value in reversed(alternatives) if other != number}
        self.top_logprobs.append(named | {self.tokens[-1]: log_probability})
        self.text_offset.append(self.offset)
        self.offset += self.names.num_characters(number)

    def add_tokens(self, tokens: Iterable[Token]) -> LogProbabilities:
        """Add tokens that were generated."""
        for token in tokens:
            self.add(token.id, token.log_probability, token.alternatives)
        return self

    def add_prompt(self, ids: Sequence[int], scored: Scored) -> LogProbabilities:
        """Add the tokens of a prompt that was measured."""
        for number, value, others in zip(ids, scored.log_probabilities, scored.alternatives, strict=True):
            self.add(number, value, others)
        return self

    def content(self) -> dict[str, Any]:
        """Return them as JSON has them."""
        return {
            "tokens": self.tokens, "token_logprobs": self.token_logprobs, "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Text that became final, with the tokens it came from."""

    text: str
    tokens: tuple[Token, ...]
    offset: int
    """Characters of the text before it."""
    reason: str | None = None
    """stop or length, in the last part."""


class Text:
    """One text as it grows. Its parts together are its whole text; a token comes with the part that shows it."""

    def __init__(self, end_ids: Iterable[int]) -> None:
        self.text = ""
        self.num_tokens = 0
        self.sum_log_probability = 0.0
        self._end_ids = frozenset(end_ids)
        self._unseen: list[Token] = []

    @property
    def mean_log_probability(self) -> float:
        return self.sum_log_probability / max(1, self.num_tokens)

    def take(self, event: Event) -> Part | None:
        """Return what can be shown now."""
        if isinstance(event, Finished):
            return self._end(event)
        self.num_tokens += 1
        self.sum_log_probability += event.log_probability
        self._unseen.append(event)
        return self._part(event.text) if event.text else None

    def _end(self, event: Finished) -> Part:
        rest = event.text[len(self.text) :]
        is_cut = event.reason == "stop" and not (event.ids and event.ids[-1] in self._end_ids)
        if is_cut and not rest:
            self._unseen.clear()  # tokens of a stop string
        self.num_tokens = len(event.ids)
        return self._part(rest, event.reason)

    def _part(self, text: str, reason: str | None = None) -> Part:
        part = Part(text, tuple(self._unseen), len(self.text), reason)
        self.text += text
        self._unseen.clear()
        return part
