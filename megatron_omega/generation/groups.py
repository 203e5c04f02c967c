"""The texts of one request: samples that grow on their own, or beams that grow together."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_omega.generation.beams import BeamSearch, Hypothesis
from megatron_omega.generation.cache import Held
from megatron_omega.generation.encoder import Memory
from megatron_omega.generation.engine import Engine, Following, Row
from megatron_omega.generation.requests import Alternatives, Event, Finished, Reason, Request, Token
from megatron_omega.generation.sampling import choose, penalised
from megatron_omega.generation.texts import GrowingText


class Group(ABC):
    """What has become of one request, once its prompt is read."""

    def __init__(self, number: int, request: Request, engine: Engine, held: list[Held], memory: Memory | None) -> None:
        """Take over `held`, of which the first has read all of the prompt but its last token."""
        self.number, self.request, self.memory = number, request, memory
        self._engine = engine
        self._allowed = engine.allowed(request.end_ids)
        self._ends = {engine.tokenizer.special.eos, *request.end_ids}
        for other in held[1:]:
            engine.cache.continue_from(other, held[0])

    @property
    @abstractmethod
    def rows(self) -> list[Row]:
        """What is read next; none: the group is done."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether all texts have ended."""

    @abstractmethod
    def take(self, following: Following, first: int) -> Iterator[Event]:
        """Give every text a token, chosen from what may follow it: the rows from `first` on."""

    @abstractmethod
    def cancel(self) -> Iterator[Event]:
        """End every text, and give everything back."""

    def _permitted(self, following: Following, rows: slice) -> Tensor:
        """Return the logits of what may follow; some ids may end these texts that end no others."""
        return following.logits[rows] + self._allowed if self.request.end_ids else following.permitted[rows]

    def _penalised(self, logits: Tensor, written: tuple[int, ...] | list[int]) -> Tensor:
        request = self.request
        return penalised(logits, request.sampling, (*request.encoder_ids, *request.decoder_ids), written)


class _Sample:
    """One text that grows."""

    def __init__(self, index: int, request: Request, held: Held, engine: Engine) -> None:
        self.index, self.held = index, held
        self.ids: list[int] = []
        self.text = GrowingText(engine.tokenizer, request.stop)
        self.generator = torch.Generator().manual_seed(sample_seed(request.seed, index))


class Samples(Group):
    """Texts that are drawn token by token, each with a seed of its own."""

    def __init__(self, number: int, request: Request, engine: Engine, held: list[Held], memory: Memory | None) -> None:
        super().__init__(number, request, engine, held, memory)
        self._growing = [_Sample(index, request, one, engine) for index, one in enumerate(held)]
        # Then the choice is made already, for all texts at once.
        self._is_likeliest = not (request.sampling.temperature or request.sampling.penalises or request.end_ids)

    @property
    def is_done(self) -> bool:
        return not self._growing

    @property
    def rows(self) -> list[Row]:
        last = self.request.decoder_ids[-1]
        return [Row(text.ids[-1] if text.ids else last, text.held, self.memory) for text in self._growing]

    def take(self, following: Following, first: int) -> Iterator[Event]:
        rows = slice(first, first + len(self._growing))
        known = following.likeliest[rows] if self._is_likeliest else [None] * len(self._growing)
        permitted = self._permitted(following, rows).unbind()
        for row in zip(list(self._growing), permitted, known, following.totals[rows], strict=True):
            yield from self._grow(*row)

    def _grow(self, text: _Sample, permitted: Tensor, chosen: int | None, total: float) -> Iterator[Event]:
        """Choose a token for one text, if it is not chosen yet, from its logits; less `total`, log-probabilities."""
        if chosen is None:
            chosen = choose(self._penalised(permitted, text.ids), self.request.sampling, text.generator)
        text.ids.append(chosen)
        part, reason = text.text.add(chosen), self._reason(text)
        if reason:
            part += text.text.end()
        alternatives = best(permitted, self.request.log_probabilities, total)
        yield Token(self.number, text.index, chosen, part, float(permitted[chosen]) - total, alternatives)
        if reason:
            yield self._end(text, reason)

    def _reason(self, text: _Sample) -> Reason | None:
        if text.ids[-1] in self._ends or text.text.is_stopped:
            return "stop"
        return "length" if len(text.ids) >= self.request.max_new_tokens else None

    def cancel(self) -> Iterator[Event]:
        for text in list(self._growing):
            text.text.end()
            yield self._end(text, "cancelled")

    def _end(self, text: _Sample, reason: Reason) -> Finished:
        self._growing.remove(text)
        self._engine.cache.release(text.held)
        return Finished(self.number, text.index, reason, text.text.text, tuple(text.ids))


class Beams(Group):
    """Texts that compete; the best ones are told when all have grown."""

    def __init__(self, number: int, request: Request, engine: Engine, held: list[Held], memory: Memory | None) -> None:
        super().__init__(number, request, engine, held, memory)
        self._held = held
        self._search = BeamSearch(
            request.beams, request.max_new_tokens, request.length_penalty, self._has_ended, len(self._ends)
        )

    @property
    def is_done(self) -> bool:
        return not self._held

    @property
    def rows(self) -> list[Row]:
        last = self.request.decoder_ids[-1]
        running = zip(self._search.running, self._held, strict=False)
        return [Row(text.ids[-1] if text.ids else last, held, self.memory) for text, held in running]

    def take(self, following: Following, first: int) -> Iterator[Event]:
        rows = slice(first, first + len(self._search.running))
        found = self._permitted(following, rows) - torch.tensor(following.totals[rows]).unsqueeze(1)
        if self.request.sampling.penalises:
            rows = [self._penalised(row, text.ids) for row, text in zip(found, self._search.running, strict=True)]
            found = torch.stack(rows)
        parents = self._search.advance(found)
        if parents:
            self._follow(parents)
            return
        self._release()
        for index, text in enumerate(self._search.best(self.request.samples)):
            yield from self._told(index, text)

    def cancel(self) -> Iterator[Event]:
        self._release()
        for index in range(self.request.samples):
            yield Finished(self.number, index, "cancelled", "", ())

    def _release(self) -> None:
        for held in self._held:
            self._engine.cache.release(held)
        self._held = []

    def _follow(self, parents: list[int]) -> None:
        """Let each running text hold what its parent held: a parent's first child takes it over, others copy it."""
        first = {parent: child for child, parent in reversed(list(enumerate(parents)))}
        unused = [held for place, held in enumerate(self._held) if place not in first]
        following = []
        for child, parent in enumerate(parents):
            held = self._held[parent]
            if first[parent] != child:
                held = unused.pop()
                self._engine.cache.continue_from(held, self._held[parent])
            following.append(held)
        self._held = [*following, *unused]

    def _told(self, index: int, text: Hypothesis) -> Iterator[Event]:
        growing = GrowingText(self._engine.tokenizer, self.request.stop)
        for place, (number, probability) in enumerate(zip(text.ids, text.log_probabilities, strict=True)):
            part = growing.add(number)
            if place == len(text.ids) - 1:
                part += growing.end()
            yield Token(self.number, index, number, part, probability, ())
        reason: Reason = "stop" if self._has_ended(text.ids) else "length"
        yield Finished(self.number, index, reason, growing.text, text.ids)

    def _has_ended(self, ids: tuple[int, ...]) -> bool:
        if ids[-1] in self._ends:
            return True
        if not self.request.stop:
            return False
        text = self._engine.tokenizer.decode(ids)
        return any(stop in text for stop in self.request.stop)


def best(logits: Tensor, count: int, total: float) -> Alternatives:
    """Return the `count` most probable ids with their log-probabilities: logits less `total`."""
    if not count:
        return ()
    found = logits.topk(min(count, len(logits)))
    return tuple(zip(found.indices.tolist(), (found.values - total).tolist(), strict=True))


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of one sample of a request: the first has the request's own."""
    if not index:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=7).digest(), "big")
