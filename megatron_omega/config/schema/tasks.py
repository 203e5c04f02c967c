"""Supervised tasks: what stands in `data.tasks`, and the section `lora`."""

from __future__ import annotations

from typing import Literal

from megatron_omega.config.schema.base import NonNegative, NonNegativeFloat, PositiveFloat, Section

AdapterTarget = Literal["qkv", "out", "gate_up", "down", "cross"]
TrainedWhole = Literal["table", "vectors"]
Metric = Literal["exact_match", "f1", "rouge", "bleu", "chrf", "accuracy"]
METRIC_PACKAGES: dict[Metric, tuple[str, str]] = {
    "rouge": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu", "sacrebleu"), "chrf": ("sacrebleu", "sacrebleu"),
}  # fmt: skip
"""Of a metric that is another project's: its module and its package, of the extra `tasks`."""
ADAPTER_TARGETS: tuple[AdapterTarget, ...] = ("qkv", "out", "gate_up", "down", "cross")


class Task(Section):
    """One supervised task: records, and how each becomes a pair of a prompt and a target."""

    path: str
    """Records: a JSON Lines, Parquet or Arrow file, a folder of such files or of datasets.save_to_disk, or a name of
    the Hugging Face hub."""
    name: str = ""
    """How logs and tables call it; the last part of the path without its suffix if it is not given."""
    prompt: str = "{prompt}"
    """Template of what the encoder reads: {field} for a field of the record, {field.inner.0} for what is inside of it.
    A decoder-only model reads it first, unlabelled."""
    target: str = "{target}"
    """Template of what the decoder has to say."""
    validation: str = ""
    """Held-out records, as path; without them the second share of data.split is held out of path."""
    split: str = "train"
    """Split of a data set that has several."""
    validation_split: str = "validation"
    """Split of the data set that `validation` names."""
    weight: NonNegativeFloat | None = None
    """Share of pairs drawn from it, relative to the other tasks; follows from its size and data.task_temperature if it
    is not given."""
    cut_prompts: Literal["end", "start"] = "end"
    """Where a prompt that is too long is cut."""
    long_targets: Literal["refuse", "cut", "leave_out"] = "refuse"
    """What happens to a pair whose target is longer than the decoder stream."""
    choices: tuple[str, ...] = ()
    """Templates of what there is to choose from; one that is a single field holding a list stands for all of the list.
    The right choice is the one that equals the target."""
    metrics: tuple[Metric, ...] = ()
    """How answers are measured: exact_match and f1 (SQuAD), rouge, bleu, chrf, accuracy (of choices, by likelihood).
    Without any: accuracy if there are choices, else exact_match and f1."""

    @property
    def measured_by(self) -> tuple[Metric, ...]:
        """The metrics that count, defaults filled in."""
        return self.metrics or (("accuracy",) if self.choices else ("exact_match", "f1"))


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): only they are trained and saved, beside the weights of checkpoint.load."""

    rank: NonNegative = 0
    """Rank of every adapter; 0 trains the model itself."""
    alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by alpha / rank."""
    targets: tuple[AdapterTarget, ...] = ADAPTER_TARGETS
    """Products that get one: qkv, out (self-attention), gate_up, down (feed-forward), cross (q, kv and out)."""
    also: tuple[TrainedWhole, ...] = ()
    """What is trained whole beside the adapters: table (token embeddings), vectors (norms, gains of queries and keys,
    gates, sinks). A base that has seen few tokens needs its table trained. The export in PEFT's format holds adapters
    alone."""

    @property
    def is_on(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """Factor on what an adapter adds."""
        return self.alpha / self.rank
