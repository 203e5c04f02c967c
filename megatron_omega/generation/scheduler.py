"""Requests in, tokens out: one step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.decoding import Continuation, check_length, encode, stream_text
from megatron_omega.generation.requests import Event, Finished, Limits, Request, Scored, Token
from megatron_omega.generation.sampling import choose
from megatron_omega.model.layers import Head
from megatron_omega.model.omega import vocabulary_logits


class Scheduler:
    """The texts that a model is writing."""

    def __init__(self, text_model: TextModel, limits: Limits | None = None) -> None:
        self.text_model = text_model
        self.limits = limits or Limits()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: tuple[int, Iterator[list[Event]]] | None = None
        self._next = 0

    def submit(self, request: Request) -> int:
        """Queue `request`; return its number.

        Raises:
            DataError: it is longer than learned positions, or than the cache can ever hold.
        """
        config = self.text_model.config
        check_length(request.encoder_ids, config, "encoder")
        check_length(request.decoder_ids, config, "decoder")
        self._next += 1
        self._waiting.append((self._next, request))
        return self._next

    def cancel(self, number: int) -> None:
        """End the texts of a request; the next step says so. Unknown numbers are none any more."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] != number)
        if self._running and self._running[0] == number:
            self._running = None

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and self._running is None

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def in_use(self) -> int:
        """Texts that grow."""
        return int(self._running is not None)

    @property
    def free(self) -> int:
        """Texts more that could grow at the same time."""
        return self.limits.sequences - self.in_use

    def step(self) -> list[Event]:
        """Do one step for all that runs; return what came of it."""
        if self._running is None:
            if not self._waiting:
                return []
            number, request = self._waiting.popleft()
            self._running = number, self._run(number, request)
        try:
            return next(self._running[1])
        except StopIteration:
            self._running = None
            return []

    @torch.inference_mode()
    def _run(self, number: int, request: Request) -> Iterator[list[Event]]:
        model, tokenizer = self.text_model.model, self.text_model.tokenizer
        memory = encode(model, request.encoder_ids) if request.encoder_ids else None
        allowed = torch.tensor([*tokenizer.text_ids, tokenizer.special.eos, *request.end_ids])
        for sample in range(request.samples):
            generator = torch.Generator().manual_seed(request.seed + sample)
            continuation = Continuation(model, memory)
            new, ids = list(request.decoder_ids), []
            reason = "length"
            for _ in range(request.max_new_tokens):
                logits = continuation.read(new)
                new = [int(allowed[choose(logits[allowed], request.sampling, generator)])]
                ids += new
                log_probabilities = logits.log_softmax(-1)
                best = log_probabilities.topk(request.log_probabilities)
                alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                text = "".join(stream_text(tokenizer, new))
                yield [Token(number, sample, new[0], text, float(log_probabilities[new[0]]), alternatives)]
                if new[0] == tokenizer.special.eos or new[0] in request.end_ids:
                    reason = "stop"
                    break
            yield [Finished(number, sample, reason, tokenizer.decode(ids), tuple(ids))]

    @torch.inference_mode()
    def prompt_log_probabilities(
        self, encoder_ids: Sequence[int], decoder_ids: Sequence[int], alternatives: int = 0
    ) -> Scored:
        """Score given tokens: how probable each of `decoder_ids` is after those before it."""
        model = self.text_model.model
        continuation = Continuation(model, encode(model, encoder_ids) if encoder_ids else None)
        found, others = [], []
        for token, following in pairwise(decoder_ids):
            row = continuation.read([token]).log_softmax(-1)
            best = row.topk(alternatives)
            found.append(float(row[following]))
            others.append(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return Scored(tuple(found), tuple(others))

    @torch.inference_mode()
    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean of the encoder's memory of each text (its ids with the mode token): [texts, d] in fp32."""
        return torch.stack([encode(self.text_model.model, ids)[0].float().mean(dim=0) for ids in texts])

    @torch.inference_mode()
    def fill(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return for each text (its ids with the mode token) what may stand at its masks: [masks, vocab_size].

        Probabilities by the MLM head, in fp32.
        """
        model, mask = self.text_model.model, self.text_model.tokenizer.special.mask
        head = model.module_named("head")
        assert isinstance(head, Head)
        found = []
        for ids in texts:
            places = [place for place, number in enumerate(ids) if number == mask]
            hidden = head.transform(encode(model, ids)[0, places])
            found.append(vocabulary_logits(model, hidden, head.output_bias).softmax(dim=-1))
        return found
