"""Settings that follow from others: what a short configuration leaves out, filled in and told, never silently.

Each rule belongs to one setting and applies only if that setting is not given and one that it follows from is. Works on
plain values as a file holds them, before validation; what is not a number as expected leaves a rule without an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omega.host.regular_files import read_text

Values = Mapping[str, Any]
"""Sections with what was given."""
HEAD_DIMS = (64, 32, 48, 40, 24, 20, 16)
"""Sizes of a head to try, the best first."""
FFN_MULTIPLE = 64
USUAL_WINDOW = 128
WARMUP_SHARE, LONGEST_WARMUP = 0.02, 2000


@dataclass(frozen=True)
class Derived:
    """A setting that was not given, and where its value comes from."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}: {self.reason}"


@dataclass(frozen=True)
class Rule:
    """How a setting follows from others."""

    name: str
    sources: tuple[str, ...]
    find: Callable[[Values], tuple[Any, str] | None]
    """From what was given (and derived so far) to a value and the reason; None: no answer."""


def derive(values: Values) -> tuple[dict[str, Any], list[Derived]]:
    """Return `values` with the settings that follow from them, and a list of those."""
    filled = {name: dict(section) if isinstance(section, Mapping) else section for name, section in values.items()}
    found: list[Derived] = []
    for rule in RULES:
        section, _, field = rule.name.partition(".")
        inner = filled.setdefault(section, {})
        if not isinstance(inner, dict) or field in inner or not any(_given(filled, source) for source in rule.sources):
            continue
        answer = rule.find(filled)
        if answer is not None:
            inner[field] = answer[0]
            found.append(Derived(rule.name, *answer))
    return {name: section for name, section in filled.items() if section or name in values}, found


def followers(names: set[str]) -> set[str]:
    """Return the settings that would be derived from one of `names`, at any remove."""
    found: set[str] = set()
    for rule in RULES:  # a rule's sources stand before it
        if {*rule.sources} & (names | found):
            found.add(rule.name)
    return found - names


def _given(values: Values, name: str) -> bool:
    section, _, field = name.partition(".")
    return isinstance(values.get(section), Mapping) and field in values[section]


def _number(values: Values, name: str) -> int | None:
    section, _, field = name.partition(".")
    inner = values.get(section)
    value = inner.get(field) if isinstance(inner, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _ffn_hidden_size(values: Values) -> tuple[int, str] | None:
    hidden = _number(values, "model.hidden_size")
    if hidden is None:
        return None
    wide = -(-8 * hidden // 3)
    return -(-wide // FFN_MULTIPLE) * FFN_MULTIPLE, f"8/3 x model.hidden_size, in multiples of {FFN_MULTIPLE}"


def _num_attention_heads(values: Values) -> tuple[int, str] | None:
    hidden, given = _number(values, "model.hidden_size"), _number(values, "model.head_dim")
    if hidden is None:
        return None
    wanted = [size for size in ((given,) if given else HEAD_DIMS) if hidden % size == 0 and (given or hidden > size)]
    even = [size for size in wanted if hidden // size % 2 == 0]  # which two tensor-parallel ranks can share
    size = next(iter(even or wanted), None)
    return None if size is None else (hidden // size, f"model.hidden_size in heads of {size}")


def _encoder_layers(values: Values) -> tuple[int, str] | None:
    layers = _number(values, "model.decoder_layers")
    return None if layers is None else (layers, "as many as decoder layers; 0 makes a decoder-only model")


def _vocab_size(values: Values) -> tuple[int, str] | None:
    """Read the size off the metadata of the first corpus."""
    corpora = values["data"].get("corpora") if isinstance(values.get("data"), Mapping) else None
    if not isinstance(corpora, list | tuple) or not corpora or not isinstance(corpora[0], Mapping):
        return None
    path = Path(f"{corpora[0].get('prefix')}.json")
    try:
        size = json.loads(read_text(path))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no metadata, or none of ours: opening the corpus says so
    return (size, f"the tokenizer's, by {path}") if isinstance(size, int) else None


def _decoder_seq_length(values: Values) -> tuple[int, str] | None:
    hidden = _number(values, "model.hidden_size")
    if hidden is None:
        return None
    length = next((length for width, length in ((512, 512), (768, 1024)) if hidden < width), 2048)
    return length, "usual for models of this width"


def _encoder_seq_length(values: Values) -> tuple[int, str] | None:
    model = values.get("model")
    if isinstance(model, Mapping) and model.get("encoder_layers") == 0:
        return 0, "a decoder-only model has no encoder stream"
    length = _number(values, "data.decoder_seq_length")
    return None if length is None else (length, "as long as the decoder's")


def _local_window(values: Values) -> tuple[int, str] | None:
    """Shorten the usual window to a text that is shorter."""
    lengths = [_number(values, f"data.{stack}_seq_length") or 0 for stack in ("encoder", "decoder")]
    longest = max(lengths)
    return (longest, "all of the longest stream") if 0 < longest < USUAL_WINDOW else None


def _warmup_steps(values: Values) -> tuple[int, str] | None:
    steps = _number(values, "training.train_steps")
    if steps is None:
        return None
    share = max(round(WARMUP_SHARE * steps), min(20, steps // 5))
    return min(LONGEST_WARMUP, share), f"{WARMUP_SHARE:.0%} of training.train_steps, of few steps more"


RULES = (
    Rule("model.encoder_layers", ("model.decoder_layers",), _encoder_layers),
    Rule("model.ffn_hidden_size", ("model.hidden_size",), _ffn_hidden_size),
    Rule("model.num_attention_heads", ("model.hidden_size",), _num_attention_heads),
    Rule("model.vocab_size", ("data.corpora",), _vocab_size),
    Rule("data.decoder_seq_length", ("model.hidden_size",), _decoder_seq_length),
    Rule("data.encoder_seq_length", ("model.encoder_layers", "data.decoder_seq_length"), _encoder_seq_length),
    Rule("model.local_window", ("data.decoder_seq_length",), _local_window),
    Rule("schedule.warmup_steps", ("training.train_steps",), _warmup_steps),
)
"""In the order in which they are applied."""
