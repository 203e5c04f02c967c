"""Sources: any global sample index -> a `Sample`. The composition of windows, blend, plan and objectives.

A sample depends on the corpora, the settings, the seed and its own index, on nothing else: no rank, worker or layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_omega.config.schema import ObjectiveConfig, RunConfig
from megatron_omega.data.batch import PARTS, Origin, Part, Sample, pack_row
from megatron_omega.data.blending import Blend
from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.megatron_order import MegatronWindows
from megatron_omega.data.objectives import (
    MOST_SEPARATOR_TOKENS,
    SEPARATOR,
    Example,
    Masking,
    Opening,
    causal_example,
    masked_example,
    prefix_example,
    shots_example,
    span_example,
)
from megatron_omega.data.packing import Budget, PieceLength, Plan, Slot, plan_causal, plan_two_streams, span_overhead
from megatron_omega.data.permutation import derive_key
from megatron_omega.data.sidecar import check_sidecar
from megatron_omega.data.tokenizer import SpecialIds, Tokenizer
from megatron_omega.data.windows import Span, Windows, WindowShape, WindowSource, probe_lengths, split_documents
from megatron_omega.errors import DataError


@dataclass(frozen=True)
class Recipe:
    """How a window becomes a row."""

    budget: Budget
    objective: ObjectiveConfig
    special: SpecialIds
    text_ids: tuple[int, ...]
    vocab_size: int
    has_shared_mode: bool = False
    """Whether masked prefixes open with the mode token of plain ones."""
    separator: tuple[int, ...] = ()
    """Ids between in-context examples."""
    is_plain_stream: bool = False
    """Megatron's rows: tokens as they stand in the shard, documents neither parted nor opened by a begin token."""

    @property
    def masking(self) -> Masking:
        modes = self.special.modes
        mode = modes.prefix if self.has_shared_mode else modes.mask
        return Masking(self.objective.mask_rate, self.objective.mask_span_length, mode)


class SampleSource:
    """The samples of one part of the split. `source[i]` works for every i >= 0: epochs roll over. Cheap to pickle."""

    part: Part

    def __init__(self, part: Part, corpora: Sequence[WindowSource], blend: Blend, recipe: Recipe, seed: int) -> None:
        self.part, self.corpora, self._blend, self._recipe, self._seed = part, tuple(corpora), blend, recipe, seed
        self._text_ids = np.asarray(recipe.text_ids, dtype=np.int64)
        self._keys = [derive_key(seed, part, corpus) for corpus in range(len(self.corpora))]

    def __len__(self) -> int:
        """Samples of one epoch: the windows of all corpora."""
        return sum(len(windows) for windows in self.corpora)

    def epochs(self, samples: int) -> tuple[float, dict[str, float]]:
        """Return how often the first `samples` go through the text: all of it, and each corpus by its prefix."""
        drawn = zip(self.corpora, self._blend.counts(samples), strict=True)
        return samples / max(1, len(self)), {
            windows.shard.prefix: count / max(1, len(windows)) for windows, count in drawn
        }

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"samples are numbered from 0, not {index}")
        epoch, spans = self.window(index)
        if self._recipe.is_plain_stream:
            return _plain_sample(index, epoch, spans, self._recipe)
        random = np.random.Generator(np.random.PCG64([self._seed, PARTS.index(self.part), epoch, index]))
        plan = self._plan(spans, random)
        examples = [
            (self._example(spans[slot.piece], slot, random), slot.encoder_at, slot.decoder_at) for slot in plan.slots
        ]
        row = pack_row(
            examples,
            encoder_seq_length=self._recipe.budget.encoder,
            decoder_seq_length=self._recipe.budget.decoder,
            pad=self._recipe.special.pad,
        )
        return Sample(index, epoch, row, _origins(spans, plan), plan.lost_tokens)

    def window(self, index: int) -> tuple[int, list[Span]]:
        """Return (epoch in its corpus, document spans) of sample `index`."""
        corpus, ordinal = self._blend.locate(index)
        windows = self.corpora[corpus]
        if not len(windows):
            raise DataError(_too_short(self.part, windows))
        return windows.take(ordinal, self._keys[corpus])

    def held(self, index: int) -> list[tuple[int, int]]:
        """Return (corpus, document) of all whose text a sample holds."""
        return [(span.corpus, span.document) for span in self.window(index)[1]]

    def samples_of(self, corpus: int, document: int, stop: int) -> list[int]:
        """Return, ascending, the samples before `stop` whose window holds text of a document of a corpus."""
        given = self._blend.counts(stop)[corpus]
        ordinals = self.corpora[corpus].ordinals_of(document, self._keys[corpus], given)
        found = [self._blend.sample_of(corpus, ordinal, stop) for ordinal in ordinals]
        return [sample for sample in found if sample is not None]

    def _plan(self, spans: Sequence[Span], random: np.random.Generator) -> Plan:
        pieces = [PieceLength(len(span.tokens), span.is_end) for span in spans]
        if self._recipe.budget.encoder == 0:
            return plan_causal(pieces, self._recipe.budget)
        return plan_two_streams(pieces, self._recipe.budget, self._recipe.objective, random)

    def _example(self, span: Span, slot: Slot, random: np.random.Generator) -> Example:
        tokens, special = span.tokens[slot.start : slot.stop], self._recipe.special
        if slot.kind == "span" or slot.kind == "extreme":
            return span_example(slot.kind, tokens, slot.noise, slot.spans, special, random)
        if slot.kind == "causal":
            return causal_example(tokens, special, is_end=slot.is_end)
        opening = Opening(self._recipe.budget.overlap, self._recipe.objective.overlap_labels and self.part == "train")
        if slot.kind == "shots":
            separator = np.asarray(self._recipe.separator, dtype=np.int64)
            return shots_example(tokens, slot.prefix, slot.shots, separator, special, random, opening=opening)
        if slot.kind == "prefix":
            return prefix_example(tokens, slot.prefix, special, is_end=slot.is_end, opening=opening)
        masking = self._recipe.masking
        return masked_example(
            tokens, slot.prefix, masking, special, self._text_ids, random, is_end=slot.is_end, opening=opening
        )


def open_text(config: RunConfig, tokenizer: Tokenizer) -> tuple[SampleSource, SampleSource, SampleSource]:
    """Open the shards of `config.data.corpora`, in constant time; return the train, validation and test parts.

    Raises DataError with every finding: missing or damaged files, a shard of another tokenizer, too little text for one
    sample.
    """
    if not config.data.corpora:
        raise DataError("data.corpora is empty; list at least one {prefix, weight}")
    shards = _open_shards(config, tokenizer)
    recipe = _recipe(config, tokenizer)
    train, validation, test = (_source(part, config, shards, recipe) for part in PARTS)
    needed = train if config.data.split[0] else validation  # without a train part the run only validates
    short = [_too_short(needed.part, windows) for windows in needed.corpora if not len(windows)]
    if not short and needed is train and config.evaluation.interval_steps and config.data.split[1]:
        short += [
            _too_short("validation", windows) + ", or turn validation off (evaluation.interval_steps: 0)"
            for windows, corpus in zip(validation.corpora, config.data.corpora, strict=True)
            if corpus.weight and not len(windows)
        ]
    if short:
        raise DataError(*short)
    return train, validation, test


def _open_shards(config: RunConfig, tokenizer: Tokenizer) -> list[IndexedShard]:
    shards: list[IndexedShard] = []
    findings: list[str] = []
    for corpus in config.data.corpora:
        try:
            shard = IndexedShard(corpus.prefix)
            check_sidecar(shard, tokenizer)
        except DataError as error:
            findings += error.findings
            continue
        if not shard.num_tokens:
            findings.append(f"corpus {corpus.prefix} is empty; make it from files that have text")
        shards.append(shard)
    if findings:
        raise DataError(*findings)
    return shards


def _recipe(config: RunConfig, tokenizer: Tokenizer) -> Recipe:
    encoder = 0 if config.model.is_decoder_only else config.data.encoder_seq_length
    budget = Budget(encoder, config.data.decoder_seq_length, config.model.axial_width, config.model.resolved_overlap)
    is_plain = config.data.order == "megatron" and encoder == 0
    model, separator = config.model, tokenizer.encode(SEPARATOR)[:MOST_SEPARATOR_TOKENS]
    return Recipe(
        budget, config.objective, tokenizer.special, tokenizer.text_ids, model.vocab_size,
        has_shared_mode=model.shared_mode_token, is_plain_stream=is_plain,
        separator=tuple(separator),
    )  # fmt: skip


def _source(part: Part, config: RunConfig, shards: Sequence[IndexedShard], recipe: Recipe) -> SampleSource:
    number = PARTS.index(part)
    parts = [split_documents(len(shard), config.data.split)[number] for shard in shards]
    (_, weights), *changes = config.data.phases
    blend = Blend(weights, changes if part == "train" else [])  # validation stays as it began: its losses compare
    if config.data.order == "megatron":
        corpora: list[WindowSource] = _megatron_windows(part, config, shards, parts, recipe, blend)
    else:
        corpora = [
            Windows(
                shard,
                documents,
                window_shape(recipe, probe_lengths(shard, documents)),
                vocab_size=recipe.vocab_size,
                eos_id=recipe.special.eos,
                corpus=corpus,
            )
            for corpus, (shard, documents) in enumerate(zip(shards, parts, strict=True))
        ]
    return SampleSource(part, corpora, blend, recipe, config.training.seed)


def _megatron_windows(
    part: Part, config: RunConfig, shards: Sequence[IndexedShard], parts: list[range], recipe: Recipe, blend: Blend
) -> list[WindowSource]:
    """Return the windows in GPTDataset's order, for as many samples as the run draws of each corpus."""
    if part == "train":
        samples = config.training.train_steps * config.batch.global_batch_size
    else:
        samples = config.evaluation.num_batches * config.batch.global_batch_size
    return [
        MegatronWindows(
            shard,
            documents,
            seq_length=_megatron_length(recipe, probe_lengths(shard, documents)),
            num_samples=drawn,
            seed=config.training.seed,
            corpus=corpus,
            vocab_size=recipe.vocab_size,
            eos_id=None if recipe.is_plain_stream else recipe.special.eos,
        )
        for corpus, (shard, documents, drawn) in enumerate(zip(shards, parts, blend.counts(samples), strict=True))
    ]


def _megatron_length(recipe: Recipe, lengths: Sequence[int]) -> int:
    """Return the tokens of a sample in Megatron's order, which counts tokens only: room for the usual documents."""
    if recipe.is_plain_stream:
        return recipe.budget.decoder
    shape = window_shape(recipe, lengths)
    usual = float(np.mean(lengths or [1])) or 1.0
    return max(1, round(shape.tokens * usual / (usual + shape.overhead)) - 1)


def window_shape(recipe: Recipe, lengths: Sequence[int]) -> WindowShape:
    """Return the window that fills a row, for documents of such `lengths`.

    A document costs, beside its tokens, its specials and on average half a row of gap in each stream; a document
    shorter than a row costs a whole row in each. Sentinels of span corruption get a reserve.
    """
    budget, objective, width = recipe.budget, recipe.objective, recipe.budget.width
    if budget.encoder == 0:
        costs = [max(width // 2 + 1, width - length) for length in lengths]
        return WindowShape(max(1, budget.decoder - 1), round(float(np.mean(costs or [0]))))
    repeated = max(0, budget.overlap - 1)
    costs = [max(width + 1, 2 * width - length) + repeated for length in lengths]
    room = budget.encoder + budget.decoder
    reserve = 2 + width * 256 // room
    if objective.span_corruption:
        reserve += round(room * span_overhead(objective)) + width
    if objective.in_context:
        reserve += width
    return WindowShape(max(1, room - reserve), round(float(np.mean(costs or [0]))))


def _too_short(part: Part, windows: WindowSource) -> str:
    return (
        f"the {part} part of {windows.shard.prefix} has {windows.num_tokens} tokens in {len(windows.documents)} "
        f"documents, fewer than one sample ({windows.shape.tokens}); give it more text or a larger share of data.split"
    )


def _origins(spans: Sequence[Span], plan: Plan) -> tuple[Origin, ...]:
    return tuple(
        Origin(
            segment,
            slot.kind,
            spans[slot.piece].corpus,
            spans[slot.piece].document,
            spans[slot.piece].offset + slot.start,
            slot.tokens,
        )
        for segment, slot in enumerate(plan.slots, start=1)
    )


def _plain_sample(index: int, epoch: int, spans: Sequence[Span], recipe: Recipe) -> Sample:
    text = np.concatenate([span.tokens for span in spans])
    example = Example("causal", text[:0], text[:-1], text[1:])
    row = pack_row(
        [(example, 0, 0)], encoder_seq_length=0, decoder_seq_length=recipe.budget.decoder, pad=recipe.special.pad
    )
    return Sample(index, epoch, row, _plain_origins(spans), 0)


def _plain_origins(spans: Sequence[Span]) -> tuple[Origin, ...]:
    return tuple(Origin(1, "causal", span.corpus, span.document, span.offset, len(span.tokens)) for span in spans)
