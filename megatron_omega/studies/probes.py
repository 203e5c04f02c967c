"""Probes: tasks that a model solves within minutes if its machinery works, and does not solve if a part is broken.

    copy, reverse    the decoder writes what the encoder reads                     cross-attention, positions
    recall           the encoder reads pairs among noise, the decoder asks keys    associative memory
    count            how often does the encoder read the asked token?              attention as a mean
    induction        the decoder repeats its own first half                        two layers of self-attention
    behind           which token stood 3 places before this one?                   `local`
    far              the one value of a text, asked at the end of a column         `axial` with `local`: two hops
    anywhere         the same, asked at any place                                  `causal`: one hop to any token

Every batch is new, so that training accuracy is test accuracy. Knows the model and its parameter groups, no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import ModelConfig, OptimizerConfig
from megatron_omega.engine.optimizer import parameter_groups, set_learning_rate
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega, vocabulary_logits

Inputs = tuple[Tensor, ...]

PAD, BEGIN, MODE = 0, 1, 2
FIRST = 8
"""First id that is a token of a task."""
SOLVED = 0.9
_AVERAGED = 10
_ROWS = 32
WIDTH, WINDOW = 8, 16
"""Of axial and local attention."""


@dataclass(frozen=True)
class Task:
    """One kind of example. Ids are below `vocab_size`; streams are at most `length` tokens."""

    name: str
    vocab_size: int
    length: int
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    """(rows, generator) -> encoder ids [b, s], decoder ids [b, t], labels [b, t]. No encoder ids: decoder-only."""
    learning_rate: float = 3e-3
    """At which both Omega and a T5-like are trained on it."""
    after: tuple[Task, ...] = ()
    """Shorter ones of the same vocabulary, each to be solved before the next begins; all their steps count."""


@dataclass(frozen=True)
class Outcome:
    """What became of one training."""

    steps: int | None
    """Steps until the last `_AVERAGED` batches were right to `SOLVED`; None: not within the budget."""
    accuracy: float
    losses: list[float] = field(default_factory=list)
    solved: dict[str, int] = field(default_factory=dict)
    """The step at which each of the task's stages was solved (`Task.after`, then the task)."""


def copy(length: int, *, backwards: bool = False) -> Task:
    """Write the encoder's distinct tokens again, or from the last to the first."""

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        text = _distinct(rows, length, FIRST, 2 * length, generator)
        return _read(text), *_write(text.flip(1) if backwards else text)

    return Task("reverse" if backwards else "copy", FIRST + 2 * length, length + 1, make)


def recall(tokens: int) -> Task:
    """Ask the keys of eight pairs that stand among `tokens` tokens of noise, in another order.

    Only the length grows with `tokens`: what there is to know stays the same. At the rate of the other tasks a small
    model learns which values there are and stays there; at a third of it, it finds out which belongs to a key. More
    than 64 tokens are read only after a quarter as many: what has to be found out is found out where a step is cheap.
    """
    pairs = min(8, tokens // 2)
    first_value, first_noise, end = FIRST + 32, FIRST + 48, FIRST + 64

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys = _distinct(rows, pairs, FIRST, first_value - FIRST, generator)
        values = torch.randint(first_value, first_noise, (rows, pairs), generator=generator)
        places = 2 * _distinct(rows, pairs, 0, tokens // 2, generator)
        text = torch.randint(first_noise, end, (rows, tokens), generator=generator)
        text = text.scatter(1, places, keys).scatter(1, places + 1, values)
        order = torch.rand(rows, pairs, generator=generator).argsort(1)
        return _read(text), keys.gather(1, order), values.gather(1, order)

    shorter = recall(tokens // 4) if tokens > 64 else None
    after = (*shorter.after, shorter) if shorter else ()
    return Task(f"recall {tokens}", end, tokens + 1, make, learning_rate=1e-3, after=after)


def count(length: int, kinds: int = 4) -> Task:
    """Say how often each kind of token occurs."""

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        shares = torch.rand(rows, kinds, generator=generator) ** 2 + 0.05
        text = torch.multinomial(shares, length, replacement=True, generator=generator)
        counts = torch.stack([(text == kind).sum(dim=1) for kind in range(kinds)], dim=1)
        asked = torch.arange(kinds).expand(rows, -1)
        return _read(text + FIRST), asked + FIRST, counts + FIRST + kinds

    return Task("count", FIRST + kinds + length + 1, length + 1, make)


def induction(length: int) -> Task:
    """Repeat distinct tokens; the second time is asked."""

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        text = _distinct(rows, length, FIRST, 2 * length, generator)
        ids = torch.cat((text, text[:, :-1]), dim=1)
        labels = torch.cat((text[:, 1:], text), dim=1)[:, : ids.shape[1]].clone()
        labels[:, :length] = IGNORED_LABEL
        return ids[:, :0], ids, labels

    return Task("induction", FIRST + 2 * length, 2 * length, make)


def behind(length: int, distance: int = 3) -> Task:
    """Say which token stood `distance` places before."""

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        text = torch.randint(FIRST, FIRST + 16, (rows, length), generator=generator)
        labels = torch.cat((torch.full((rows, distance), IGNORED_LABEL), text[:, :-distance]), dim=1)
        return text[:, :0], text, labels

    return Task("behind", FIRST + 16, length, make)


def far(length: int, *, anywhere: bool = False) -> Task:
    """Name the one value among noise in the first third of the text: at the beginning of the last row, which the axial
    branch reaches from any place in two hops, if `local` takes the value to a first column; or at any later place."""

    def make(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        text = torch.randint(FIRST, FIRST + 8, (rows, length), generator=generator)
        values = torch.randint(FIRST + 8, FIRST + 16, (rows, 1), generator=generator)
        places = torch.randint(0, length // 3, (rows, 1), generator=generator)
        labels = torch.full_like(text, IGNORED_LABEL)
        labels[:, length // 2 if anywhere else length - WIDTH : None if anywhere else length - WIDTH + 1] = values
        return text[:, :0], text.scatter(1, places, values), labels

    return Task("anywhere" if anywhere else "far", FIRST + 16, length, make)


def _distinct(rows: int, count: int, first: int, of: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, of, generator=generator).argsort(1)[:, :count] + first


def _read(text: Tensor) -> Tensor:
    return torch.cat((torch.full_like(text[:, :1], MODE), text), dim=1)


def _write(text: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((torch.full_like(text[:, :1], BEGIN), text[:, :-1]), dim=1), text


def omega(task: Task, *, width: int = 64, layers: int = 2, **fields: Any) -> ModelConfig:
    """Return a small Omega for a task, with all branches of the card."""
    is_alone = not task.make(1, torch.Generator())[0].numel()
    values = {
        "hidden_size": width, "ffn_hidden_size": 4 * width, "num_attention_heads": 4, "encoder_layers": layers,
        "decoder_layers": layers, "vocab_size": task.vocab_size, "local_window": WINDOW, "axial_width": WIDTH,
        "mlm_head": False,
    }  # fmt: skip
    return ModelConfig.model_validate(values | ({"encoder_layers": 0} if is_alone else {}) | fields)


def t5_like(task: Task, *, width: int = 64, layers: int = 2) -> ModelConfig:
    """Return a model with one attention module in each layer and about the parameters of `omega` in its FFN."""
    spared = 10 if omega(task).encoder_layers else 8  # of 4 width^2 in 4 layers' 3 width x ffn; 2 of 3 in a decoder's
    ffn = 4 * width + spared * width // 3
    return omega(
        task, width=width, layers=layers, encoder_branches=["full"], decoder_branches=["causal"], ffn_hidden_size=ffn
    )


def train(
    task: Task, model: ModelConfig, *, steps: int, learning_rate: float | None = None, seed: int = 0, warmup: int = 50,
    change: Callable[[Omega], None] = lambda model: None,
) -> Outcome:  # fmt: skip
    """Train until the task is solved, or for `steps` steps. `change` may break the model first.

    Length is no parameter of a model (positions are rotary), so that one model reads every stage of a task.
    """
    learning_rate = learning_rate or task.learning_rate
    length = -(-task.length // WIDTH) * WIDTH
    built = Omega(ModelContext(model, seed=seed, encoder_seq_length=length, decoder_seq_length=length))
    change(built)
    groups = parameter_groups(built.parameters(), OptimizerConfig())
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(100 + seed)
    right: list[float] = []
    losses: list[float] = []
    solved: dict[str, int] = {}
    stages = [*task.after, task]
    for step in range(1, steps + 1):
        inputs, labels = _batch(model, *stages[0].make(_ROWS, generator))
        set_learning_rate(optimizer, learning_rate * min(1.0, step / warmup))
        hidden = built.hidden(inputs)
        right.append(_accuracy(built, hidden[0].detach(), labels[0]))
        loss = built.heads(hidden, labels)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if len(right) >= _AVERAGED and sum(right[-_AVERAGED:]) >= SOLVED * _AVERAGED:
            solved[stages.pop(0).name] = step
            if not stages:
                return Outcome(step, sum(right[-_AVERAGED:]) / _AVERAGED, losses, solved)
            right = []
    return Outcome(None, sum(right[-_AVERAGED:]) / max(1, len(right[-_AVERAGED:])), losses, solved)


def _batch(model: ModelConfig, read: Tensor, written: Tensor, labels: Tensor) -> tuple[Inputs, Inputs]:
    """Return what the model takes: one document in every row."""
    factors = torch.tensor([1.0 / int((labels != IGNORED_LABEL).sum()), 0.0])
    decoder = (written, torch.ones_like(written))
    if model.is_decoder_only:
        return decoder, (labels, torch.full_like(labels, IGNORED_LABEL), factors)
    return (read, torch.ones_like(read), *decoder), (labels, torch.full_like(read, IGNORED_LABEL), factors)


@torch.no_grad()
def _accuracy(model: Omega, hidden: Tensor, labels: Tensor) -> float:
    asked = labels != IGNORED_LABEL
    found = vocabulary_logits(model, hidden[asked]).argmax(dim=-1)
    return (found == labels[asked]).float().mean().item()
