"""The public interface for Python programs and notebooks; `import megatron_omega` shows it.

    model = megatron_omega.load("runs/omega-tiny")
    model.generate("This function returns")

Holds no logic of its own: it knows which rooms answer which question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omega.config.arguments import Arguments, ConfigSource, Override
from megatron_omega.config.load import resolve_run
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.indexed import IndexedShard, without_suffix
from megatron_omega.data.objectives import first_decoder_ids
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.export.hugging_face.registration import register as register_transformers
from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.generation.decoding import generate, stream_text
from megatron_omega.generation.fill_mask import Filled, fill_mask
from megatron_omega.generation.prompts import check_length
from megatron_omega.generation.sampling import Sampling
from megatron_omega.host.environment import complete_environment
from megatron_omega.model.omega import Omega, vocabulary_logits
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import StepReport, TrainState

__all__ = ["Filled", "Hook", "Model", "StepReport", "Tokenizer", "load", "open_shard", "register_transformers", "train"]

Text = str | Sequence[int]
"""A text, or the ids of its tokens."""


class Model:
    """A trained model with its tokenizer, whole, in this process. Made by `load`."""

    def __init__(self, text_model: TextModel) -> None:
        self._text_model = text_model

    @property
    def config(self) -> RunConfig:
        """All settings it was trained with."""
        return self._text_model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text_model.tokenizer

    @property
    def module(self) -> Omega:
        """The torch module; its forward pass takes packed ids with segments, and returns the loss."""
        return self._text_model.model

    @property
    def path(self) -> Path:
        """The checkpoint or export that it was read from."""
        return self._text_model.path

    def generate(self, prompt: str = "", **settings: Any) -> str:
        """Return the text that continues `prompt`; settings as of `stream`."""
        return "".join(self.stream(prompt, **settings))

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the text that continues `prompt`, as it comes. A temperature of 0 is greedy.

        Raises:
            ConfigError: a setting makes no sense.
            DataError: the prompt is longer than learned positions.
        """
        sampling = Sampling(temperature, top_k, top_p)
        ids = generate(self._text_model, prompt, sampling, max_new_tokens=max_new_tokens, seed=seed)
        return stream_text(self.tokenizer, ids)

    def fill_mask(self, text: str, *, top_k: int = 5) -> Filled:
        """Fill each <mask> or [MASK] of `text`: candidates with probabilities, by the encoder and its MLM head."""
        return fill_mask(self._text_model, text, top_k=top_k)

    @torch.inference_mode()
    def logits(self, encoder: Text, decoder: Text = "") -> Tensor:
        """Return the logits [t + 1, vocab_size] of what follows each beginning of `decoder`, given `encoder`.

        Row 0 is what comes first, row t what comes after all t tokens. A decoder-only model reads both as one text.

        Raises:
            DataError: a text is longer than learned positions.
        """
        before, after = self._ids(encoder), self._ids(decoder)
        special, settings = self.tokenizer.special, self.config.model
        if settings.is_decoder_only:
            streams, first = [[special.bos, *before, *after]], len(before)
        else:
            opening = first_decoder_ids(before, special, settings.resolved_overlap)
            streams, first = [[special.modes.prefix, *before], [*opening, *after]], len(opening) - 1
        inputs: list[Tensor] = []
        for ids, stack in zip(streams, ("encoder", "decoder")[-len(streams) :], strict=True):
            check_length(ids, self.config, stack)
            tensor = torch.tensor([ids], device=self._text_model.device)
            inputs += [tensor, torch.ones_like(tensor)]
        hidden, *_ = self.module.hidden(tuple(inputs))
        return vocabulary_logits(self.module, hidden)[0, first:]

    def loss(self, encoder: Text, decoder: Text) -> float:
        """Return the mean cross-entropy of the tokens of `decoder` given `encoder`, nats per token.

        Raises:
            DataError: `decoder` is empty.
        """
        ids = self._ids(decoder)
        if not ids:
            raise DataError("the decoder's text is empty; there is nothing to measure")
        wanted = torch.tensor(ids, device=self._text_model.device)
        return torch.nn.functional.cross_entropy(self.logits(encoder, ids)[:-1].float(), wanted).item()

    __call__ = logits

    def _ids(self, text: Text) -> list[int]:
        return self.tokenizer.encode(text) if isinstance(text, str) else list(text)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        return f"<Model of {count:,} parameters from {self.path}>"


def load(
    path: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, tokenizer: Path | str | None = None
) -> Model:
    """Load a model: of a run folder, a checkpoints or step-... folder, or an export.

    Raises:
        CheckpointError: there is none, or none is whole.
        DataError: the tokenizer is missing, or not the one that the model was trained with.
    """
    return Model(load_text_model(path, device, dtype, tokenizer))


def open_shard(path: Path | str) -> IndexedShard:
    """Open a shard (.bin/.idx, ours or Megatron's): `len(shard)` documents, `shard.document(i)` is an array of ids."""
    return IndexedShard(without_suffix(str(path)))


class _Callback(Hook):
    """A function as a hook."""

    def __init__(self, function: Callable[[StepReport], None]) -> None:
        self._function = function

    def on_step_end(self, report: StepReport) -> None:
        self._function(report)


def train(
    config: ConfigSource,
    callbacks: Sequence[Hook | Callable[[StepReport], None]] = (),
    *,
    deepspeed_config: Path | str | None = None,
    **overrides: Any,
) -> TrainState:
    """Train a run as this process (one of several under a launcher); return where it stands at the end.

    Args:
        config: a YAML file, the name of a preset, or the settings themselves: {"model": {...}, "data": {...}}.
        callbacks: hooks, or functions that are called with the `StepReport` of every step.
        overrides: settings by their name with two underscores for the dot: training__train_steps=50.

    Raises:
        OmegaError: what is wrong, every finding; Preempted if the run was asked to stop and has saved.
    """
    from megatron_omega.export.starting import starting_weights
    from megatron_omega.run.train import train as train_run
    from megatron_omega.tasks.answering import Answers

    words = tuple(Override(name.replace("__", "."), _as_yaml(value)) for name, value in overrides.items())
    place = complete_environment()
    resolved = resolve_run(Arguments(config, deepspeed_config, words), place.world_size)
    hooks = [one if isinstance(one, Hook) else _Callback(one) for one in callbacks]
    initial = starting_weights(resolved.config.checkpoint.load)
    return train_run(resolved, place, hooks, initial=initial, answering=Answers)


def _as_yaml(value: Any) -> str:
    from megatron_omega.config import yaml_text

    return value if isinstance(value, str) else yaml_text.dump(value).strip().removesuffix("\n...")
