"""/v1/completions: from a question to one JSON object, or to a stream of chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from megatron_omega.generation.prompts import scored_ids
from megatron_omega.generation.requests import Scored, Token
from megatron_omega.generation.server.choices import LogProbabilities, Names, Part, Text
from megatron_omega.generation.server.metrics import Metrics
from megatron_omega.generation.server.questions import CompletionQuestion
from megatron_omega.generation.server.served import Asking, Served


class Echo(NamedTuple):
    """A prompt that is to stand before its answer."""

    text: str
    ids: Sequence[int]
    scored: Scored | None


class Completion:
    """One question with its texts: text p * drawn + s is sample s of prompt p."""

    def __init__(
        self, served: Served, question: CompletionQuestion, askings: Sequence[Asking], metrics: Metrics
    ) -> None:
        self._served, self._question, self._askings, self._metrics = served, question, askings, metrics
        eos = served.text_model.tokenizer.special.eos
        self._names = Names(served.text_model.tokenizer)
        self._texts = [Text((eos, *each.request.end_ids)) for each in askings for _ in range(question.drawn)]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": served.name,
        }  # fmt: skip

    @property
    def num_answers(self) -> int:
        """Texts that have to grow."""
        return len(self._texts)

    async def whole(self) -> dict[str, Any]:
        """Return the answer as one object. Raises Refusal."""
        echoes = await self._echoes()
        parts: list[list[Part]] = [[] for _ in self._texts]
        async for place, part in self._parts():
            parts[place].append(part)
        choices = [
            self._choice(index, place, parts[place], echoes[place // self._question.drawn])
            for index, place in enumerate(self._best())
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer in chunks, as it grows. Raises Refusal."""
        echoes = await self._echoes()
        for place in range(len(self._texts)):
            echo = echoes[place // self._question.drawn]
            if echo is not None:
                yield {**self._head, "choices": [self._choice(place, place, [], echo)]}
        async with aclosing(self._parts()) as parts:
            async for place, part in parts:
                yield {**self._head, "choices": [self._choice(place, place, [part], None)]}
        if self._question.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def _parts(self) -> AsyncGenerator[tuple[int, Part], None]:
        """Yield (text, part) of all texts as they grow."""
        if self._question.max_tokens == 0:
            return
        last = [time.monotonic()] * len(self._texts)
        async with self._served.worker.ask([asking.request for asking in self._askings]) as events:
            async for prompt, event in events:
                place = prompt * self._question.drawn + event.sample
                if isinstance(event, Token):
                    last[place] = self._measure(last[place], is_first=self._texts[place].num_tokens == 0)
                part = self._texts[place].take(event)
                if part is not None:
                    yield place, part

    def _measure(self, last: float, *, is_first: bool) -> float:
        """Count a token; return when it came."""
        now, metrics = time.monotonic(), self._metrics
        histogram = metrics.first_token if is_first else metrics.between_tokens
        histogram.labels(self._served.name).observe(now - last)
        metrics.new_tokens.labels(self._served.name).inc()
        return now

    async def _echoes(self) -> list[Echo | None]:
        """Return for each prompt its text and log-probabilities, or None where no echo is wanted."""
        if not self._question.echo:
            return [None] * len(self._askings)
        return [
            Echo(self._echoed(prompt), asking.ids, await self._score(asking))
            for prompt, asking in enumerate(self._askings)
        ]

    async def _score(self, asking: Asking) -> Scored | None:
        count = self._question.logprobs
        if count is None or not asking.ids:
            return None
        encoder, decoder = scored_ids(self._served.text_model, asking.ids)
        return await self._served.worker.call(
            lambda scheduler: scheduler.prompt_log_probabilities(encoder, decoder, count)
        )

    def _echoed(self, prompt: int) -> str:
        """Return a prompt as text if it is echoed."""
        given = self._question.prompt[prompt]
        if not self._question.echo:
            return ""
        return given if isinstance(given, str) else self._served.text_model.tokenizer.decode(given)

    def _best(self) -> list[int]:
        """Return the texts that are answered: of each prompt's the n most probable per token, if more were drawn."""
        drawn, n = self._question.drawn, self._question.n
        found: list[int] = []
        for first in range(0, len(self._texts), drawn):
            group = list(range(first, first + drawn))
            if drawn > n:
                group.sort(key=lambda place: -self._texts[place].mean_log_probability)
            found += group[:n]
        return found

    def _choice(self, index: int, place: int, parts: Sequence[Part], echo: Echo | None) -> dict[str, Any]:
        text = "".join([echo.text if echo else "", *(part.text for part in parts)])
        reason = parts[-1].reason if parts else None
        return {
            "index": index, "text": text, "logprobs": self._log_probabilities(place, parts, echo),
            "finish_reason": "length" if self._question.max_tokens == 0 else reason,
        }  # fmt: skip

    def _log_probabilities(self, place: int, parts: Sequence[Part], echo: Echo | None) -> dict[str, Any] | None:
        if self._question.logprobs is None:
            return None
        found = LogProbabilities(self._names)
        if echo is not None and echo.scored is not None:
            found.add_prompt(echo.ids, echo.scored)
        before = len(self._echoed(place // self._question.drawn))
        for part in parts:
            found.offset = before + part.offset
            found.add_tokens(part.tokens)
        return found.content()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are read."""
        return sum(asking.num_prompt_tokens for asking in self._askings)

    def _usage(self) -> dict[str, int]:
        read = self.num_prompt_tokens
        written = sum(text.num_tokens for text in self._texts)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
