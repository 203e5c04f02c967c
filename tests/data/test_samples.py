from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import Corpus, ModelConfig, Reweight, RunConfig
from megatron_omega.data.batch import Batch
from megatron_omega.data.indexed import token_dtype, write_shard
from megatron_omega.data.objectives import restore
from megatron_omega.data.sidecar import Sidecar, sidecar_path, to_json
from megatron_omega.data.sources import open_sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

MakeConfig = Callable[..., RunConfig]
OVERLAP = ModelConfig().decoder_overlap


def segments_of(batch: Batch) -> set[int]:
    return set(np.unique(batch.decoder_segments)) - {0}


def test_rows_keep_the_contract(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    source = open_sources(make_config()).train
    special = tokenizer.special
    for index in range(60):
        row = source[index].row
        assert row.encoder_ids.shape == row.encoder_segments.shape == row.mlm_labels.shape == (1, 256)
        assert row.decoder_ids.shape == row.decoder_segments.shape == row.lm_labels.shape == (1, 256)
        assert row.encoder_ids.dtype == np.int64
        assert set(np.unique(row.encoder_segments)) - {0} == segments_of(row)
        for segment in segments_of(row):
            encoder = np.flatnonzero(row.encoder_segments[0] == segment)
            decoder = np.flatnonzero(row.decoder_segments[0] == segment)
            assert encoder[0] % 16 == 0 and decoder[0] % 16 == 0
            assert (np.diff(encoder) == 1).all() and (np.diff(decoder) == 1).all()
            assert row.encoder_ids[0, encoder[0]] in special.modes
            is_open = row.encoder_ids[0, encoder[0]] in (special.modes.prefix, special.modes.mask) and len(encoder) > 1
            was = np.where(row.mlm_labels >= 0, row.mlm_labels, row.encoder_ids)[0, encoder[1:]][-OVERLAP:]
            opening = was.tolist() if is_open else [special.bos]
            assert row.decoder_ids[0, decoder[: len(opening)]].tolist() == opening
            assert (row.decoder_ids[0, decoder[1:]] == row.lm_labels[0, decoder[:-1]]).all()
        assert (row.lm_labels[row.decoder_segments == 0] == IGNORED_LABEL).all()
        assert (row.lm_labels[row.decoder_segments > 0] != IGNORED_LABEL).all()
        masked = row.mlm_labels != IGNORED_LABEL
        assert (row.encoder_segments[masked] > 0).all()


def test_every_example_holds_the_text_it_says(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    source = open_sources(make_config()).train
    special = tokenizer.special
    kinds: Counter[str] = Counter()
    for index in range(80):
        sample = source[index]
        row = sample.row
        for origin in sample.origins:
            kinds[origin.kind] += 1
            document = source.corpora[origin.corpus].shard.document(origin.document)
            text = document[origin.offset : origin.offset + origin.num_tokens].tolist()
            encoder = row.encoder_ids[0][row.encoder_segments[0] == origin.segment][1:]
            answers = row.mlm_labels[0][row.encoder_segments[0] == origin.segment][1:]
            labels = row.lm_labels[0][row.decoder_segments[0] == origin.segment]
            if origin.kind in ("span", "extreme"):
                assert restore(encoder, labels, special).tolist() == text
                continue
            encoder = np.where(answers == IGNORED_LABEL, encoder, answers)
            whole = [*encoder, *labels[max(0, min(OVERLAP, len(encoder)) - 1) :]]
            if whole[-1] == special.eos:
                assert origin.offset + origin.num_tokens == len(document) - 1
                whole = whole[:-1]
            assert whole == text
    assert set(kinds) == {"prefix", "span", "extreme", "mask"}


def test_in_context_examples_come_by_their_weight_and_hold_a_documents_text(
    make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    config = make_config()
    shown = {"prefix_lm": 1.0, "in_context": 1.0, "masked_prefix": 0.0, "span_corruption": 0.0}
    config = config.model_copy(update={"objective": config.objective.model_copy(update=shown)})
    source = open_sources(config).train
    separator = tokenizer.encode("\n\n")
    found = 0
    for index in range(60):
        sample = source[index]
        for origin in (origin for origin in sample.origins if origin.kind == "shots"):
            document = source.corpora[origin.corpus].shard.document(origin.document)
            text = document[origin.offset : origin.offset + origin.num_tokens].tolist()
            inside = sample.row.encoder_segments[0] == origin.segment
            labels = sample.row.lm_labels[0][sample.row.decoder_segments[0] == origin.segment].tolist()[OVERLAP - 1 :]
            read = sample.row.encoder_ids[0][inside].tolist()[1:]
            more = Counter([*read, *labels]) - Counter(text)
            assert more and set(more) <= set(separator) and not Counter(text) - Counter([*read, *labels])
            found += 1
    assert found > 30


def test_validation_asks_for_nothing_that_the_encoder_shows(make_config: MakeConfig) -> None:
    sources = open_sources(make_config())
    for part in (sources.train, sources.validation):
        counts = []
        for index in range(20):
            row = part[index].row
            for segment in segments_of(row):
                inside = row.decoder_segments[0] == segment
                asked = row.lm_labels[0][inside] != IGNORED_LABEL
                shown = int((~asked).sum())
                assert asked[shown:].all() and shown < OVERLAP, "what is not asked for stands before what is"
                counts.append(shown)
        assert not any(counts) if part is sources.train else max(counts) == OVERLAP - 1


def test_a_sample_depends_on_nothing_but_its_index(make_config: MakeConfig) -> None:
    source, again = open_sources(make_config()).train, open_sources(make_config()).train
    for index in (17, 3, 250, 17):
        for name in Batch.__dataclass_fields__:
            assert np.array_equal(getattr(source[index].row, name), getattr(again[index].row, name))


def test_another_seed_or_part_gives_other_samples(make_config: MakeConfig) -> None:
    config = make_config()
    other = config.model_copy(update={"training": config.training.model_copy(update={"seed": 99})})
    first, second = open_sources(config), open_sources(other)
    assert not np.array_equal(first.train[0].row.encoder_ids, second.train[0].row.encoder_ids)
    documents = [
        {o.document for i in range(len(s)) for o in s[i].origins} for s in (first.train, first.validation, first.test)
    ]
    assert max(documents[0]) < min(documents[1]) and max(documents[1]) < min(documents[2])


def test_epochs_roll_over(make_config: MakeConfig) -> None:
    source = open_sources(make_config()).train
    sample = source[len(source) + 1]
    assert sample.epoch == 1 and sample.origins


def test_decoder_only_rows_have_no_encoder(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    source = open_sources(make_config(encoder=0)).train
    row = source[0].row
    assert row.encoder_ids.shape == (1, 0) and row.mlm_labels.shape == (1, 0)
    assert np.count_nonzero(row.decoder_segments) > 200
    starts = np.flatnonzero(np.diff(row.decoder_segments[0], prepend=0) > 0)
    assert (starts % 16 == 0).all() and (row.decoder_ids[0, starts] == tokenizer.special.bos).all()


def test_megatron_order_without_an_encoder_is_the_bare_stream(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    source = open_sources(make_config(encoder=0, decoder=64, order="megatron")).train
    row = source[0].row
    assert (row.decoder_segments == 1).all()
    assert (row.decoder_ids[0, 1:] == row.lm_labels[0, :-1]).all()
    following = {int(source[n].row.decoder_ids[0, 0]) for n in range(len(source))}
    assert int(row.lm_labels[0, -1]) in following  # the last label of a cut is the first token of the next


def test_megatron_order_with_an_encoder_keeps_the_contract(make_config: MakeConfig) -> None:
    source = open_sources(make_config(order="megatron")).train
    samples = [source[n] for n in range(40)]
    assert all(segments_of(sample.row) for sample in samples)
    assert sum(sample.lost_tokens for sample in samples) < 0.1 * sum(o.num_tokens for s in samples for o in s.origins)


def test_both_streams_are_full_and_nothing_is_lost(make_config: MakeConfig, long_prefix: str) -> None:
    source = open_sources(
        make_config(encoder=2048, decoder=2048, width=32, corpora=(Corpus(prefix=long_prefix),))
    ).train
    samples = [source[index] for index in range(100)]
    fill = [np.mean([np.count_nonzero(s.row.encoder_segments) for s in samples]) / 2048]
    fill.append(np.mean([np.count_nonzero(s.row.decoder_segments) for s in samples]) / 2048)
    assert min(fill) > 0.95
    tokens = sum(o.num_tokens for s in samples for o in s.origins)
    assert sum(s.lost_tokens for s in samples) < 0.005 * tokens


def test_objectives_come_by_weight(make_config: MakeConfig, long_prefix: str) -> None:
    mixture = {"prefix_lm": 0.60, "span_corruption": 0.25, "masked_prefix": 0.15}
    source = open_sources(
        make_config(encoder=2048, decoder=2048, width=32, corpora=(Corpus(prefix=long_prefix),), objective=mixture)
    ).train
    tokens: Counter[str] = Counter()
    for index in range(200):
        for origin in source[index].origins:
            tokens[{"extreme": "span"}.get(origin.kind, origin.kind)] += origin.num_tokens
    total = sum(tokens.values())
    assert abs(tokens["prefix"] / total - 0.60) < 0.08
    assert abs(tokens["span"] / total - 0.25) < 0.08
    assert abs(tokens["mask"] / total - 0.15) < 0.05


def test_a_blend_reads_every_corpus_by_weight(make_config: MakeConfig, prefix: str) -> None:
    corpora = (Corpus(prefix=prefix, weight=3), Corpus(prefix=prefix, weight=1))
    source = open_sources(make_config(corpora=corpora, reweight=(Reweight(from_sample=40, weights=(0, 1)),))).train
    assert Counter(source[n].origins[0].corpus for n in range(40)) == {0: 30, 1: 10}
    assert {source[n].origins[0].corpus for n in range(40, 50)} == {1}


def test_the_samples_of_a_document_are_told(make_config: MakeConfig, prefix: str) -> None:
    corpora = (Corpus(prefix=prefix, weight=3), Corpus(prefix=prefix, weight=1))
    source = open_sources(make_config(corpora=corpora)).train
    for order in ("flat", "megatron"):
        source = open_sources(make_config(corpora=corpora, order=order)).train
        seen = [n for n in range(90) if any((o.corpus, o.document) == (1, 42) for o in source[n].origins)]
        assert set(seen) <= set(source.samples_of(1, 42, 90)) and len(source.samples_of(1, 42, 90)) <= len(seen) + 2


def test_sources_go_to_another_process(make_config: MakeConfig) -> None:
    for order in ("flat", "megatron"):
        source = open_sources(make_config(order=order)).train
        data = pickle.dumps(source)
        assert len(data) < 20_000
        assert np.array_equal(pickle.loads(data)[5].row.encoder_ids, source[5].row.encoder_ids)


def expect(config: RunConfig, *messages: str) -> None:
    with pytest.raises(DataError) as caught:
        open_sources(config)
    assert len(caught.value.findings) == len(messages), caught.value.findings
    for finding, message in zip(caught.value.findings, messages, strict=True):
        assert message in finding


def test_what_is_wrong_is_said_all_at_once(make_config: MakeConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "empty", [], token_dtype(600))
    corpora = tuple(Corpus(prefix=str(tmp_path / name)) for name in ("nowhere", "empty"))
    expect(make_config(corpora=corpora), "nowhere.idx does not exist", "empty is empty")


def test_bad_settings_are_refused_in_words(make_config: MakeConfig, tmp_path: Path) -> None:
    expect(make_config(corpora=()), "data.corpora is empty")
    expect(make_config(tokenizer=""), "no tokenizer is set")
    expect(make_config(tokenizer=str(tmp_path / "none")), "cannot be read")
    config = make_config()
    expect(config.model_copy(update={"model": ModelConfig(vocab_size=500)}), "set model.vocab_size to 600")
    write_shard(tmp_path / "short", [[200] * 20] * 4, token_dtype(600))
    expect(
        make_config(corpora=(Corpus(prefix=str(tmp_path / "short")),)),
        "60 tokens in 3 documents, fewer than one sample",
    )


def test_a_shard_of_another_tokenizer_is_refused(make_config: MakeConfig, prefix: str, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"s.{suffix}").write_bytes(Path(f"{prefix}.{suffix}").read_bytes())
    shard = make_config(corpora=(Corpus(prefix=str(tmp_path / "s")),))
    open_sources(shard)
    sidecar = Sidecar("f" * 64, 600, 300, 1, "uint16", "text", {"tokenizer_model": "other.model"})
    sidecar_path(tmp_path / "s").write_text(to_json(sidecar))
    expect(shard, "was made with tokenizer ffffffffffff (other.model)")
    sidecar_path(tmp_path / "s").write_text("{")
    expect(shard, "s.json is damaged")


def test_a_sidecar_that_counts_otherwise_is_refused(
    make_config: MakeConfig, prefix: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"s.{suffix}").write_bytes(Path(f"{prefix}.{suffix}").read_bytes())
    sidecar_path(tmp_path / "s").write_text(to_json(Sidecar(tokenizer.fingerprint, 600, 299, 5, "uint16", "text")))
    expect(make_config(corpora=(Corpus(prefix=str(tmp_path / "s")),)), "its sidecar promises 299, 5 of uint16")


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(make_config: MakeConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "wild", [[200] * 90 + [777]] * 90, token_dtype(600))
    source = open_sources(make_config(corpora=(Corpus(prefix=str(tmp_path / "wild")),))).train
    with pytest.raises(DataError, match=r"wild.bin holds token id 777 in document \d+ at token 90"):
        source[0]


def test_a_part_without_a_window_says_so_when_it_is_read(make_config: MakeConfig) -> None:
    sources = open_sources(make_config(split=(100.0, 0.0, 0.0)))
    assert len(sources.validation) == 0
    with pytest.raises(DataError, match="the validation part of .* fewer than one sample"):
        sources.validation[0]


@pytest.mark.parametrize("others", [0, 1])
def test_a_validation_part_without_a_sample_is_found_at_the_start(
    make_config: Callable[..., RunConfig], prefix: str, tmp_path: Path, tokenizer: Tokenizer, others: int
) -> None:
    write_shard(tmp_path / "three", [[5] * 400 + [tokenizer.eos_id]] * 3, "<u2")
    corpora = (Corpus(prefix=str(tmp_path / "three")), *[Corpus(prefix=prefix)] * others)
    config = make_config(corpora=corpora, encoder=32, decoder=32, split=(98.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"the validation part of .*three has 0 tokens in 0 documents"):
        open_sources(config)
    without = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"interval_steps": 0})})
    assert len(open_sources(without).train)
