"""What a client may ask, as typed values: the bodies of requests. Bounds come from `Bounds`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""
_GREATEST_SEED = 2**63 - 1


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Return one text, several, one list of ids or several as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(each, list | tuple) and _are_ids(each) for each in value):
            return tuple(tuple(each) for each in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


def _are_ids(value: Any) -> bool:
    return all(type(each) is int and 0 <= each < 2**31 for each in value)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise ValueError("must be a text or a list of texts")


def _stops(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    if not all(found):
        raise ValueError("has an empty text; leave it out")
    return found


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, list | tuple) and _are_ids(value):
        return tuple(value)
    raise ValueError("must be a list of token ids")


Ids = Annotated[tuple[int, ...], BeforeValidator(_ids)]
Prompts = Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Stops = Annotated[tuple[str, ...], BeforeValidator(_stops)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Question(BaseModel):
    """A body: no field unknown, no value converted; null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    """A name of /v1/models; the first model if it is left out."""
    user: str | None = None
    """Not used."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool = False


class CompletionQuestion(Question):
    """The body of /v1/completions: OpenAI's parameters, and below them ours."""

    prompt: Prompts = ("",)
    suffix: str | None = None
    """What follows the text: it is to be filled in between."""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Count = 1
    best_of: Count | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    stop: Stops = ()
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Field(ge=-_GREATEST_SEED - 1, le=_GREATEST_SEED)] | None = None
    logit_bias: dict[str, float] = {}
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Draw from this many most probable tokens; 0 takes all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens with this share of the most probable one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits of what stands there already."""
    beams: Count = 1
    """Width of beam search; 1 samples."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Beams are compared by log-probability / length ** this."""

    @property
    def drawn(self) -> int:
        """Answers drawn for each prompt."""
        return self.best_of or self.n

    @model_validator(mode="after")
    def _make_sense(self) -> CompletionQuestion:
        findings = list(_contradictions(self))
        if findings:
            raise ValueError("; ".join(findings))
        return self


def _contradictions(question: CompletionQuestion) -> list[str]:
    drawn, beams = question.drawn, question.beams
    checks = [
        (drawn < question.n, f"best_of={drawn} must be n={question.n} or more"),
        (question.stream and drawn > question.n, "best_of cannot be streamed: the best is known at the end"),
        (beams > 1 and drawn > beams, f"n={drawn} must be at most beams={beams}"),
        (beams > 1 and question.best_of is not None, "beams are the best already; leave best_of out"),
        (bool(question.logit_bias), "logit_bias is not supported; leave it out"),
        (
            question.suffix is not None and question.echo and question.logprobs is not None,
            "echo with logprobs measures a prompt alone; leave suffix out",
        ),
        (
            question.max_tokens == 0 and not question.echo,
            "max_tokens=0 asks for nothing; ask for 1 or more, or echo the prompt",
        ),
    ]
    return [sentence for is_wrong, sentence in checks if is_wrong]


class EmbeddingQuestion(Question):
    """The body of /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    """The model's own width is the only one."""


class FillMaskQuestion(Question):
    """The body of /v1/fill-mask."""

    input: Texts
    """Texts with <mask> or [MASK]."""
    top_k: Count = 5
    """Candidates of each mask."""


class TokenizeQuestion(Question):
    """The body of /tokenize."""

    prompt: str
    add_special_tokens: bool = False
    """Put the begin token before it."""


class DetokenizeQuestion(Question):
    """The body of /detokenize."""

    tokens: Ids
