"""A model that is served: its name, its thread, and how prompts become what it reads. Bounds are kept here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_omega.config.schema import RunConfig
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.prompts import gap_ids, prompt_ids
from megatron_omega.generation.requests import Limits, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.questions import CompletionQuestion, Prompt
from megatron_omega.generation.server.refusals import Refusal
from megatron_omega.generation.server.worker import Worker

_GREATEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Asking:
    """One prompt of a question, in the words of the model."""

    ids: tuple[int, ...]
    """Tokens of the prompt."""
    request: Request
    num_prompt_tokens: int
    """As they are counted: a suffix included."""


@dataclass(frozen=True)
class Served:
    """One model behind a name."""

    name: str
    text_model: TextModel
    worker: Worker
    bounds: Bounds
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, name: str, text_model: TextModel, bounds: Bounds, limits: Limits, *, compiled: bool = False) -> Served:
        """Return `text_model` as it is served, its thread not yet begun."""

        def scheduler() -> Scheduler:
            made = Scheduler(text_model, limits)
            if compiled:
                made.compile()
            return made

        worker = Worker(scheduler, bounds.queue)
        return cls(name, text_model, worker, _fitted(bounds, text_model.config, limits))

    @property
    def has_encoder(self) -> bool:
        return not self.text_model.config.model.is_decoder_only

    @property
    def fills_masks(self) -> bool:
        return self.text_model.config.model.has_mlm_head

    @property
    def fills_in(self) -> bool:
        """Whether it learned to fill in what is left out between two texts."""
        return self.has_encoder and self.text_model.config.objective.span_corruption > 0

    def card(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        abilities = {"fill_mask": self.fills_masks, "suffix": self.fills_in, "embeddings": self.has_encoder}
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "megatron-omega",
            "abilities": abilities, "max_prompt_tokens": self.bounds.prompt_tokens,
        }  # fmt: skip

    def encode(self, prompt: Prompt, param: str) -> tuple[int, ...]:
        """Return the ids of a prompt. Raises Refusal if they are none of this model's, or too many."""
        if isinstance(prompt, str):
            self.require_fitting(prompt, param)
            ids = tuple(self.text_model.tokenizer.encode(prompt))
        else:
            ids = prompt
            size = self.text_model.tokenizer.vocab_size
            if any(number >= size for number in ids):
                raise Refusal(400, f"{param} has the id {max(ids)}; ids of {self.name} end at {size - 1}", param=param)
        self.require_few(ids, param)
        return ids

    def require_fitting(self, text: str, param: str) -> None:
        """Refuse a text that is too long whatever its tokens are, without reading it."""
        most = self.bounds.prompt_tokens
        if len(text) > most * self._longest_piece:
            raise Refusal(400, f"{param} has {len(text):,} characters, more than {most:,} tokens hold", param=param)

    def require_few(self, ids: Sequence[int], param: str) -> None:
        """Refuse more tokens than a prompt may have."""
        if len(ids) > self.bounds.prompt_tokens:
            raise Refusal(
                400, f"{param} has {len(ids):,} tokens; {self.bounds.prompt_tokens:,} are allowed", param=param
            )

    def ask(self, question: CompletionQuestion) -> list[Asking]:
        """Return the prompts of a question as requests. Raises Refusal."""
        self._keep_bounds(question)
        first = secrets.randbits(62) if question.seed is None else question.seed
        askings = [self._asking(prompt, question) for prompt in question.prompt]
        return [
            replace(asking, request=replace(asking.request, seed=(first + place) & _GREATEST_SEED))
            for place, asking in enumerate(askings)
        ]

    @cached_property
    def _longest_piece(self) -> int:
        processor = self.text_model.tokenizer.processor
        return max(len(piece) for piece in processor.id_to_piece(list(range(processor.get_piece_size()))))

    def _keep_bounds(self, question: CompletionQuestion) -> None:
        bounds, drawn = self.bounds, question.drawn
        checks = [
            ("prompt", "prompts", len(question.prompt), bounds.prompts),
            ("max_tokens", "new tokens", question.max_tokens, bounds.new_tokens),
            ("n", "answers to a prompt", drawn, bounds.samples),
            ("beams", "beams", question.beams, bounds.samples),
            ("n", "answers in all", drawn * len(question.prompt), bounds.choices),
            ("logprobs", "alternatives", question.logprobs or 0, bounds.alternatives),
            ("stop", "stop strings", len(question.stop), bounds.stop_strings),
            ("stop", "characters", max(map(len, question.stop), default=0), bounds.stop_characters),
        ]
        findings = [
            (name, f"{name} asks for {found:,} {what}; {most:,} are allowed")
            for name, what, found, most in checks
            if found > most
        ]
        if findings:
            raise Refusal(400, "; ".join(sentence for _, sentence in findings), param=findings[0][0])

    def _asking(self, prompt: Prompt, question: CompletionQuestion) -> Asking:
        ids = self.encode(prompt, "prompt")
        sampling = Sampling(
            question.temperature, question.top_k, question.top_p, question.min_p, question.repetition_penalty,
            question.frequency_penalty, question.presence_penalty,
        )  # fmt: skip
        (encoder_ids, decoder_ids), end_ids, count = prompt_ids(self.text_model, ids), (), len(ids)
        if question.suffix is not None:
            suffix = self._suffix(question.suffix, count)
            count += len(suffix)
            encoder_ids, decoder_ids, end_ids = gap_ids(self.text_model, ids, suffix, question.max_tokens)
        request = Request(
            encoder_ids, decoder_ids, max(1, question.max_tokens), sampling, stop=question.stop, end_ids=end_ids,
            samples=question.drawn, beams=question.beams, length_penalty=question.length_penalty,
            log_probabilities=question.logprobs or 0,
        )  # fmt: skip
        return Asking(ids, request, count)

    def _suffix(self, suffix: str, num_before: int) -> tuple[int, ...]:
        if not self.fills_in:
            reason = "has no encoder" if not self.has_encoder else "was trained without span corruption"
            raise Refusal(400, f"{self.name} {reason}, so it cannot fill in; leave suffix out", param="suffix")
        ids = self.encode(suffix, "suffix")
        count, most = num_before + len(ids), self.bounds.prompt_tokens
        if count > most:
            raise Refusal(400, f"prompt and suffix have {count:,} tokens; {most:,} are allowed", param="suffix")
        return ids


def _fitted(bounds: Bounds, config: RunConfig, limits: Limits) -> Bounds:
    """Return the bounds of one model: no more answers than grow together, no prompt beyond learned positions."""
    longest = bounds.prompt_tokens
    if config.model.positions == "learned":  # the first place is the mode's or the begin token's
        longest = min(longest, config.data.decoder_seq_length - 1)
        if not config.model.is_decoder_only:
            longest = min(longest, config.data.encoder_seq_length - 1)
    return replace(bounds, prompt_tokens=longest, samples=min(bounds.samples, limits.sequences))
