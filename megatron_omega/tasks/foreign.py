"""Any folder of Transformers as a rival: asked through lm-evaluation-harness's own class, on the same questions.

Needs the extra `harness`. Where that class is wrong (whole texts of encoder-decoders: docs/likelihoods.md), nothing is
measured. Losses are by the rival's own tokens; bits per byte compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import CheckpointError, ConfigError
from megatron_omega.tasks.likelihood import Likelihood
from megatron_omega.tasks.metrics import measure
from megatron_omega.tasks.questions import Exam, Question
from megatron_omega.tasks.scoring import WRITTEN, Answered, Score, accuracies, most_probable, of_targets

_CONFIG = "config.json"


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder was written by Transformers, and is no export of ours."""
    return (folder / _CONFIG).is_file() and not (folder / "omega.json").exists()


class Foreign:
    """A model of Transformers with its tokenizer."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load it. Raises ConfigError without the harness, CheckpointError if Transformers cannot load the folder."""
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            raise ConfigError(f"{folder} is of Transformers, which needs the extras hf and harness") from None
        try:
            settings = json.loads((folder / _CONFIG).read_text())
            self.has_encoder = bool(settings.get("is_encoder_decoder"))
            backend = "seq2seq" if self.has_encoder else "causal"
            load = cast("Any", HFLM)
            self._model: Any = load(
                pretrained=str(folder), backend=backend, device=device, dtype="float32", batch_size=8
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} cannot be loaded by Transformers: {error}") from None
        self.path = folder

    def score(self, exam: Exam, tokenizer: Tokenizer, *, name: str, seed: int = 0) -> Score:
        """Take an exam whose ids are of `tokenizer`."""
        questions = exam.questions
        texts = [tokenizer.decode(one.context) for one in questions]
        metrics, answers = {}, [""] * len(questions)
        if written := [metric for metric in exam.metrics if metric in WRITTEN]:
            answers = self._write(texts, exam)
            metrics |= measure(written, answers, [one.wanted for one in questions], seed)
        if "accuracy" in exam.metrics:
            picked = self._choose(questions, texts, tokenizer)
            metrics |= accuracies(questions, picked, seed)
            if not written:
                answers = [one.choices[best[0]].text for one, best in zip(questions, picked, strict=True)]
        known = self._known(questions, texts, tokenizer)
        metrics |= of_targets(exam, known, seed) if known else {}
        found = tuple(
            Answered(one.source, one.prompt, one.wanted, answer) for one, answer in zip(questions, answers, strict=True)
        )
        return Score(exam.name, name, exam.shots, metrics, math.nan, found)

    def _known(self, questions: Sequence[Question], texts: Sequence[str], tokenizer: Tokenizer) -> list[Likelihood]:
        """Return the likelihoods of the right answers; nothing for whole texts if the harness has them wrong."""
        if not any(texts):
            if self.has_encoder:
                return []
            rolling = self._model.loglikelihood_rolling(_instances([(one.wanted,) for one in questions]))
            return [Likelihood(float(nats), is_greedy=False) for nats in rolling]
        pairs = [(text, tokenizer.decode(one.target)) for text, one in zip(texts, questions, strict=True)]
        return [Likelihood(float(nats), bool(best)) for nats, best in self._model.loglikelihood(_instances(pairs))]

    def _choose(
        self, questions: Sequence[Question], texts: Sequence[str], tokenizer: Tokenizer
    ) -> list[tuple[int, ...]]:
        pairs = [
            (text, tokenizer.decode(choice.ids))
            for text, one in zip(texts, questions, strict=True)
            for choice in one.choices
        ]
        known = iter(self._model.loglikelihood(_instances(pairs)))
        found = []
        for one in questions:
            nats = [float(next(known)[0]) for _ in one.choices]
            tokens = [max(1, len(self._model.tok_encode(choice.text))) for choice in one.choices]
            found.append(most_probable(nats, tokens, [choice.text for choice in one.choices]))
        return found

    def _write(self, texts: Sequence[str], exam: Exam) -> list[str]:
        options = {"until": list(exam.stop), "max_gen_toks": exam.max_new_tokens, "do_sample": False}
        return list(self._model.generate_until(_instances([(text, dict(options)) for text in texts])))


def _instances(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    kinds = {1: "loglikelihood_rolling", 2: "loglikelihood"}
    return [
        Instance(
            request_type=cast("Any", "generate_until" if isinstance(one[-1], dict) else kinds[len(one)]),
            doc={}, arguments=one, idx=number,
        )
        for number, one in enumerate(arguments)
    ]  # fmt: skip
