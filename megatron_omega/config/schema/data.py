"""What is read and how it becomes examples: the sections `data` and `objective`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_omega.config.history import with_earlier_meaning
from megatron_omega.config.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from megatron_omega.config.schema.tasks import Task


class Corpus(Section):
    """One corpus of a blend."""

    prefix: str
    """Path of the indexed shard without .bin / .idx; of many: a pattern (data/web-*) or a list."""
    weight: NonNegativeFloat = 1.0
    """Share of samples drawn from this corpus, relative to the other weights; 0 until data.reweight gives it one."""
    from_sample: NonNegative = 0
    """First global sample that may be drawn from it: a corpus that joins in mid-run takes no sample from the others."""


class Reweight(Section):
    """A change of the blend's weights in mid-run."""

    from_sample: Positive
    """First global sample drawn with these weights."""
    weights: tuple[NonNegativeFloat, ...]
    """One weight for each corpus; 0 leaves it out."""


class DataConfig(Section):
    """The corpus, and how samples are drawn from it."""

    tokenizer: str = ""
    """Path of the SentencePiece model."""
    corpora: tuple[Corpus, ...] = ()
    """Corpora to blend: a list of {prefix, weight, from_sample}."""
    reweight: tuple[Reweight, ...] = ()
    """Later weights of the blend, each {from_sample, weights}, ascending. No corpus repeats or loses a sample by it."""
    tasks: tuple[Task, ...] = ()
    """Supervised tasks to fine-tune on: a list of {path, prompt, target, ...}; docs/tasks.md has examples."""
    task_temperature: PositiveFloat = 1.0
    """T: a task without a weight gives pairs in proportion to its number of pairs to the power of 1 / T."""
    text_fraction: Fraction = 0.0
    """Share of samples that are pretraining text of data.corpora, beside data.tasks."""
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (969.0, 30.0, 1.0)
    """Relative sizes of the train, validation and test parts, cut by documents in each corpus."""
    encoder_seq_length: NonNegative = 2048
    """Tokens of the encoder stream of a sample (0 for decoder-only models)."""
    decoder_seq_length: Positive = 2048
    """Tokens of the decoder stream of a sample."""
    order: Literal["flat", "megatron"] = "flat"
    """Order of samples: flat = a stateless permutation, nothing stored; megatron = megatron-core's GPTDataset order."""
    num_workers: NonNegative = 0
    """Loader processes for each rank that reads data; 0 reads in the training process."""
    prefetch_batches: Positive = 2
    """Micro-batches each loader process keeps ready."""

    @property
    def phases(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Weights of the blend: (first sample, a weight for each corpus), ascending, the first from sample 0.

        Before its `from_sample` a corpus has weight 0; afterwards the last entry of `reweight` that knows it decides.
        """
        starts = {
            0,
            *(corpus.from_sample for corpus in self.corpora),
            *(change.from_sample for change in self.reweight),
        }
        return tuple((start, self._weights_at(start)) for start in sorted(starts))

    def _weights_at(self, sample: int) -> tuple[float, ...]:
        changes = [change for change in self.reweight if change.from_sample <= sample]
        last = max(changes, key=lambda change: change.from_sample, default=None)
        return tuple(
            0.0
            if corpus.from_sample > sample
            else last.weights[place]
            if last is not None and place < len(last.weights) and last.from_sample >= corpus.from_sample
            else corpus.weight
            for place, corpus in enumerate(self.corpora)
        )


class ObjectiveConfig(Section):
    """What is asked of the model. Decided per example by (seed, epoch, sample index), never by rank or worker."""

    prefix_lm: NonNegativeFloat = 0.5
    """Weight of prefix language modelling (decoder-only models always use plain language modelling)."""
    span_corruption: NonNegativeFloat = 0.0
    """Weight of span corruption, which teaches to fill in gaps; docs/quality.md says what a tenth of it costs."""
    masked_prefix: NonNegativeFloat = 0.5
    """Weight of masked prefix: tokens of the prefix are masked for the MLM head, the decoder continues it."""
    in_context: NonNegativeFloat = 0.0
    """Weight of in-context examples (encoder-decoders): the encoder reads pieces of a document from other places of it,
    apart by an empty line, then the beginning of one more, which the decoder continues: few-shot as training."""
    empty_prefix_fraction: Fraction = 1 / 6
    """Share of prefix-LM examples with an empty prefix: plain text generation."""
    overlap_labels: bool = True
    """Whether training asks the decoder for the overlap with its prefix too (model.decoder_overlap): the encoder shows
    these tokens, which teaches the decoder to look there. Validation never asks for them."""
    span_rate: Fraction = 0.15
    """Share of tokens replaced by span corruption."""
    span_mean_length: PositiveFloat = 3.0
    """Mean length of a corrupted span, tokens."""
    extreme_span_fraction: Fraction = 1 / 3
    """Share of span-corruption examples that are extreme: rate 0.5, or mean length 32."""
    mask_rate: Fraction = 0.15
    """Share of encoder tokens predicted by the MLM head: 80% masked, 10% replaced, 10% kept."""
    mask_span_length: Annotated[float, Field(ge=1)] = 1.0
    """Mean length of a run of encoder tokens that is masked as one, tokens."""
    mlm_weight: NonNegativeFloat = 1.0
    """Weight of the MLM loss: how many LM labels one MLM label counts as."""
    mlm_weighing: Literal["labels", "means"] = "labels"
    """labels: the MLM loss is divided by the number of LM labels; means: by its own, so that few labels weigh much."""
    z_loss_weight: NonNegativeFloat = 1e-4
    """Weight of the z-loss (squared log-partition) of both heads."""
    loss_chunk_tokens: Positive = 1024
    """Tokens whose logits are held at a time; full logits never are."""

    @model_validator(mode="before")
    @classmethod
    def _as_stored(cls, values: Any) -> Any:
        return with_earlier_meaning("objective", values)
