"""Requests in, tokens out: all texts grow by one token a step, and requests join and leave between any two steps.

    step    what fits of the queue begins: slots and pages for its longest answer are taken at once, so that nothing
            that runs is ever put out
            prompts are encoded (layer by layer) and read (chunk by chunk), as much as Limits.chunk_tokens allows
            every text that is ready reads its last token and chooses the next; those that end give everything back

What a request answers depends on its company neither by what is drawn (each sample has a generator of its own) nor, in
fp32 on a CPU, by any rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation import encoder
from megatron_omega.generation.cache import Held
from megatron_omega.generation.encoder import Memory
from megatron_omega.generation.engine import Engine
from megatron_omega.generation.groups import Beams, Group, Samples, best
from megatron_omega.generation.matrices import Weigh, plain
from megatron_omega.generation.memories import Memories
from megatron_omega.generation.prefixes import Prefixes, cuts
from megatron_omega.generation.prompts import check_length, room
from megatron_omega.generation.requests import Event, Finished, Limits, Request, Scored


class _Preparing:
    """A request of which the prompt is being read."""

    def __init__(self, number: int, request: Request, held: list[Held]) -> None:
        self.number, self.request, self.held = number, request, held
        self.work: Iterator[int] = iter(())
        self.memory: Memory | None = None


class Scheduler:
    """The texts that a model is writing."""

    def __init__(self, text_model: TextModel, limits: Limits | None = None, weigh: Weigh = plain) -> None:
        self.text_model = text_model
        self.limits = limits or Limits()
        self._engine = Engine(text_model, self.limits, weigh)
        self._cache = self._engine.cache
        self._prefixes = Prefixes(self._cache, self._cache.slots.count - self.limits.sequences)
        self._memories = Memories(text_model.model, self.limits.memory_tokens)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._preparing: deque[_Preparing] = deque()
        self._groups: dict[int, Group] = {}
        self._told: list[Event] = []
        self._next = 0
        width = self._cache.width
        self._chunk = max(width, self.limits.chunk_tokens - self.limits.chunk_tokens % width)

    def compile(self) -> None:
        """Let torch.compile fuse the decoder's layers, before anything is submitted; the first tokens take minutes."""
        self._engine.decoder.compile()

    def submit(self, request: Request) -> int:
        """Queue `request`; return its number.

        Raises:
            ConfigError: more samples or beams are asked for than can grow at the same time.
            DataError: it is longer than learned positions, or than the cache can ever hold.
        """
        config = self.text_model.config
        check_length(request.encoder_ids, config, "encoder")
        check_length(request.decoder_ids, config, "decoder")
        longest = room(config, len(request.decoder_ids), request.max_new_tokens)
        request = request if longest == request.max_new_tokens else _shortened(request, longest)
        self._require_room(request)
        self._next += 1
        self._waiting.append((self._next, request))
        return self._next

    def cancel(self, number: int) -> None:
        """End the texts of a request; the next step says so. A number that is unknown, or no longer, is ignored."""
        for waiting in [pair for pair in self._waiting if pair[0] == number]:
            self._waiting.remove(waiting)
            self._told += _cancelled(*waiting)
        for preparing in [one for one in self._preparing if one.number == number]:
            self._preparing.remove(preparing)
            self._give_up(preparing)
            self._told += _cancelled(number, preparing.request)
        if number in self._groups:
            self._told += self._groups[number].cancel()
            self._leave(number)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, nothing runs, and nothing is left to be said."""
        return not (self._waiting or self._preparing or self._groups or self._told)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def in_use(self) -> int:
        """Places of texts that are taken."""
        return self._cache.slots.count - self._cache.slots.free - len(self._prefixes)

    @property
    def free(self) -> int:
        """Texts more that could grow at the same time."""
        return self.limits.sequences - self.in_use

    @property
    def cache_tokens_in_use(self) -> int:
        """Tokens that the cache has room for and that are taken, kept beginnings of prompts included."""
        return (self._cache.pages.count - self._cache.pages.free) * self._cache.width

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do one step for all that runs; return what came of it."""
        events, self._told = self._told, []
        self._admit()
        self._prepare()
        rows = {number: group.rows for number, group in self._groups.items()}
        if rows:
            logits = self._engine.grow([row for found in rows.values() for row in found])
            following, first = self._engine.following(logits), 0
            for number, found in rows.items():
                group = self._groups[number]
                events += group.take(following, first)
                first += len(found)
                if group.is_done:
                    self._leave(number)
        return events

    @torch.inference_mode()
    def prompt_log_probabilities(
        self, encoder_ids: Sequence[int], decoder_ids: Sequence[int], alternatives: int = 0
    ) -> Scored:
        """Score given tokens: how probable each of `decoder_ids` is after those before it.

        Raises:
            DataError: they are longer than learned positions, or than what is free in the cache.
        """
        config, count = self.text_model.config, len(decoder_ids)
        check_length(encoder_ids, config, "encoder")
        check_length(decoder_ids, config, "decoder")
        if not self._make_free(1, self._cache.pages_for(count)):
            raise DataError(f"{count:,} tokens do not fit what is free in the cache now; try again, or score fewer")
        memory = self._memories.make(tuple(encoder_ids)) if encoder_ids else None
        held = self._cache.hold(count)
        try:
            return self._score(decoder_ids, held, memory, alternatives)
        finally:
            self._cache.release(held)

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean of the encoder's memory of each text (its ids with the mode token): [texts, d] in fp32.

        Raises:
            ConfigError: the model has no encoder.
            DataError: a text is longer than learned positions.
        """
        self._require_encoder(texts)
        return encoder.embed(self.text_model.model, texts, self.limits.chunk_tokens).cpu()

    def fill(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return for each text (its ids with the mode token) what may stand at its masks: [masks, vocab_size].

        Probabilities by the MLM head, in fp32.

        Raises:
            ConfigError: the model has no MLM head.
            DataError: a text is longer than learned positions.
        """
        encoder.require_mlm_head(self.text_model)
        self._require_encoder(texts)
        special = self.text_model.tokenizer.special
        found = encoder.fill(self.text_model.model, special, texts, self.limits.chunk_tokens)
        return [logits.softmax(dim=-1).cpu() for logits in found]

    def _require_encoder(self, texts: Sequence[Sequence[int]]) -> None:
        if self.text_model.config.model.is_decoder_only:
            raise ConfigError(f"{self.text_model.path} is decoder-only: it has no encoder; use an encoder-decoder")
        for ids in texts:
            check_length(ids, self.text_model.config, "encoder")

    def _score(self, ids: Sequence[int], held: Held, memory: Memory | None, alternatives: int) -> Scored:
        found: list[float] = []
        others = []
        ends = cuts(len(ids) - 1, self._chunk, self._cache.width)
        for start, end in pairwise([0, *ends]):
            logits = self._engine.decoder.logits(self._engine.read(ids[start:end], held, memory)).cpu()
            totals = logits.logsumexp(dim=-1)
            following = torch.tensor(ids[start + 1 : end + 1]).unsqueeze(1)
            found += (logits.gather(1, following)[:, 0] - totals).tolist()
            allowed = self._engine.allowed(())
            rows = zip(logits, totals.tolist(), strict=True)
            others += [best(row + allowed, alternatives, total) for row, total in rows]
        return Scored(tuple(found), tuple(others))

    def _require_room(self, request: Request) -> None:
        texts, tokens = _texts(request), _tokens(request)
        if texts > self.limits.sequences:
            raise ConfigError(
                f"{texts} samples or beams are asked for, {self.limits.sequences} can grow at once; ask for fewer"
            )
        if texts * self._cache.pages_for(tokens) > self._cache.pages.count:
            raise DataError(
                f"{texts} x {tokens:,} tokens do not fit the cache, which holds {self.limits.cache_tokens:,}; "
                "shorten the prompt or the answer"
            )
        if len(request.encoder_ids) > self.limits.memory_tokens:
            raise DataError(
                f"the prompt has {len(request.encoder_ids):,} tokens, at most {self.limits.memory_tokens:,} fit; cut it"
            )

    def _make_free(self, slots: int, pages: int) -> bool:
        """Return whether so much is free; what was kept for later prompts makes room."""
        while self.free < slots or self._cache.pages.free < pages:
            if self.free < slots or not self._prefixes.forget():
                return False
        return True

    def _admit(self) -> None:
        """Begin with what fits, in the order it came."""
        while self._waiting:
            number, request = self._waiting[0]
            texts, tokens = _texts(request), _tokens(request)
            if not self._memories.has_room(request.encoder_ids):
                return
            if not self._make_free(texts, texts * self._cache.pages_for(tokens)):
                return
            self._waiting.popleft()
            ends = cuts(len(request.decoder_ids) - 1, self._chunk, self._cache.width)
            known = self._prefixes.find(request.encoder_ids, request.decoder_ids, ends)
            held = [self._cache.hold(tokens, known), *(self._cache.hold(tokens) for _ in range(texts - 1))]
            preparing = _Preparing(number, request, held)
            preparing.work = self._reading(preparing, ends)
            self._memories.use(request.encoder_ids)
            self._preparing.append(preparing)

    def _prepare(self) -> None:
        """Read prompts, in the order they came, for as long as a step may take."""
        model = self.text_model.config.model
        budget = self._chunk * max(model.encoder_layers, model.decoder_layers)
        while self._preparing and budget > 0:
            preparing = self._preparing[0]
            done = next(preparing.work, None)
            if done is not None:
                budget -= done
                continue
            self._preparing.popleft()
            kind = Beams if preparing.request.beams > 1 else Samples
            self._groups[preparing.number] = kind(
                preparing.number, preparing.request, self._engine, preparing.held, preparing.memory
            )

    def _reading(self, preparing: _Preparing, ends: list[int]) -> Iterator[int]:
        """Encode and read a prompt; yield the tokens, times layers, that were computed since the last time."""
        request, held = preparing.request, preparing.held[0]
        if request.encoder_ids:
            preparing.memory = yield from self._memories.making(request.encoder_ids)
        for end in ends:
            if end <= held.length:
                continue
            count = end - held.length
            self._engine.read(request.decoder_ids[held.length : end], held, preparing.memory)
            self._prefixes.remember(request.encoder_ids, request.decoder_ids, held)
            yield count * self.text_model.config.model.decoder_layers

    def _give_up(self, preparing: _Preparing) -> None:
        for held in preparing.held:
            self._cache.release(held)
        self._memories.leave(preparing.request.encoder_ids)

    def _leave(self, number: int) -> None:
        self._memories.leave(self._groups.pop(number).request.encoder_ids)


def _texts(request: Request) -> int:
    return max(request.samples, request.beams)


def _tokens(request: Request) -> int:
    """Return the tokens that one text's decoder reads at most: the last one it writes is not read."""
    return len(request.decoder_ids) + request.max_new_tokens - 1


def _shortened(request: Request, longest: int) -> Request:
    return replace(request, max_new_tokens=longest)


def _cancelled(number: int, request: Request) -> list[Event]:
    return [Finished(number, sample, "cancelled", "", ()) for sample in range(request.samples)]
