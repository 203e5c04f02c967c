"""Supervised pairs: every one whole, once an epoch, in any order the same, and nothing wrong with them unsaid."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.packing import Budget
from megatron_omega.data.pairs.packing import group_pairs
from megatron_omega.data.pairs.templates import FieldError, Template
from megatron_omega.data.sources import open_sources
from megatron_omega.errors import DataError

WIDTH = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_records(path: Path, number: int = 40) -> Path:
    rows = [{"question": "reads " * (k % 7 + 1) + str(k), "answer": {"text": [f"answer {k}"]}} for k in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(model_path: Path, *tasks: dict[str, Any], encoder: int = 64, decoder: int = 64, **data: Any) -> RunConfig:
    form = {"prompt": "{question}?", "target": "{answer.text.0}"}
    model = {"axial_width": WIDTH, "local_window": 16, "vocab_size": 600, "hidden_size": 32, "num_attention_heads": 2}
    model |= {"encoder_layers": 1 if encoder else 0, "decoder_layers": 1, "decoder_overlap": 2}
    return RunConfig.model_validate(
        {
            "model": model,
            "data": {"tokenizer": str(model_path), "tasks": [form | task for task in tasks], "split": (8, 2, 0)}
            | {"encoder_seq_length": encoder, "decoder_seq_length": decoder}
            | data,
        }
    )


def rendered(row: Any, tokenizer: Any) -> list[tuple[str, str]]:
    found = []
    for segment in range(1, int(row.decoder_segments.max()) + 1):
        labels = row.lm_labels[0][row.decoder_segments[0] == segment]
        encoder = row.encoder_ids[0][row.encoder_segments[0] == segment]
        found.append((tokenizer.decode(encoder), tokenizer.decode(labels[labels != IGNORED_LABEL])))
    return found


@pytest.mark.parametrize("encoder", [64, 0])
def test_an_epoch_has_every_training_pair_once_and_validation_the_others(
    encoder: int, model_path: Path, tmp_path: Path
) -> None:
    config = config_of(model_path, {"path": str(write_records(tmp_path / "qa.jsonl"))}, encoder=encoder)
    sources = open_sources(config)
    seen: list[int] = []
    for epoch in range(2):
        rows = [sources.train[epoch * len(sources.train) + k] for k in range(len(sources.train))]
        seen = sorted(origin.document for row in rows for origin in row.origins)
        assert len(seen) == 32
        assert all(row.epoch == epoch for row in rows)
    held = [sources.validation[k] for k in range(len(sources.validation) + 3)]
    assert sorted([*seen, *(origin.document for row in held for origin in row.origins)]) == list(range(40))
    assert all((row.row.lm_labels == IGNORED_LABEL).all() for row in held[-3:])
    sample = pickle.loads(pickle.dumps(sources.train))[5]
    assert (sample.row.decoder_ids == sources.train[5].row.decoder_ids).all()


def test_a_row_has_pairs_apart_and_labels_on_targets_alone(model_path: Path, tmp_path: Path) -> None:
    sources = open_sources(config_of(model_path, {"path": str(write_records(tmp_path / "qa.jsonl"))}))
    for index in range(len(sources.train)):
        sample = sources.train[index]
        texts = rendered(sample.row, sources.tokenizer)
        wanted = [("reads " * (k % 7 + 1) + f"{k}?", f"answer {k}") for k in (o.document for o in sample.origins)]
        assert texts == wanted
        for segments in (sample.row.encoder_segments[0], sample.row.decoder_segments[0]):
            firsts = [int(np.flatnonzero(segments == s)[0]) for s in range(1, segments.max() + 1)]
            assert all(first % WIDTH == 0 for first in firsts)


def test_a_decoder_only_model_reads_the_prompt_unlabelled(model_path: Path, tmp_path: Path) -> None:
    sources = open_sources(config_of(model_path, {"path": str(write_records(tmp_path / "qa.jsonl"))}, encoder=0))
    row, special = sources.train[0].row, sources.tokenizer.special
    inside = row.decoder_segments[0] == 1
    ids, labels = row.decoder_ids[0][inside], row.lm_labels[0][inside]
    assert ids[0] == special.bos and labels[-1] == special.eos
    known = labels != IGNORED_LABEL
    assert not known[0] and (np.diff(known.astype(int)) >= 0).all()  # the prompt first, then the target, to the end
    assert (ids[1:][known[:-1]] == labels[:-1][known[:-1]]).all()


def test_what_is_cut_is_counted_and_said(model_path: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "qa.jsonl")
    tasks = [{"path": str(path), "long_targets": how} for how in ("cut", "leave_out")]
    short = [open_sources(config_of(model_path, task, encoder=8, decoder=9)) for task in tasks]
    told = ["\n".join(sources.notices) for sources in short]
    assert "prompts are too long and lose their end" in told[0]
    lost = 0
    tokenizer = short[0].tokenizer
    for number in {o.document for k in range(len(short[0].train)) for o in short[0].train[k].origins}:
        lost += max(0, len(tokenizer.encode("reads " * (number % 7 + 1) + f"{number}?")) - 7)
    assert f" {lost:,} of " in told[0]
    targets = [len(tokenizer.encode(f"answer {k}")) + 1 for k in range(40)]
    repeated = [min(2, len(tokenizer.encode("reads " * (k % 7 + 1) + f"{k}?"))) - 1 for k in range(40)]
    assert f"{sum(one + more > 9 for one, more in zip(targets, repeated, strict=True))} pairs are left out" in told[1]


def test_everything_wrong_is_found_at_once(model_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = ['{"question": "a", "answer": {"text": ["b"]}}', "{", "[1]", '{"question": "a"}']
    lines += ['{"question": "a", "answer": {"text": [" "]}}', '{"question": ["a"], "answer": {"text": ["b"]}}']
    bad.write_text("\n".join(lines))
    long = write_records(tmp_path / "long.jsonl", 5)
    tasks = [{"path": str(bad)}, {"path": str(long), "target": "{answer.text.0} " * 30}, {"path": "gone.jsonl"}]
    tasks += [{"path": str(long), "prompt": "{unknown}"}, {"path": str(long), "prompt": "{a"}]
    with pytest.raises(DataError) as caught:
        open_sources(config_of(model_path, *tasks))
    text = str(caught.value)
    for part in (
        "bad.jsonl:2 is not JSON", "bad.jsonl:3 is a JSON list", "bad.jsonl:4 has no {answer.text.0}",
        "bad.jsonl:5 has an empty target", "bad.jsonl:6 has a list in {question}",
        "5 of 5 targets of data.tasks[1] (long) are longer than data.decoder_seq_length=64",
        "gone.jsonl does not exist", "long.jsonl:1 has no {unknown}, as have 4 of the other 4", "is no template",
    ):  # fmt: skip
        assert part in text, part


def test_other_kinds_of_files_hold_the_same_pairs(model_path: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "qa.jsonl")
    zipped = tmp_path / "zipped.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "table.parquet")
    rows = []
    for place in (path, zipped, tmp_path / "saved", tmp_path / "table.parquet"):
        source = open_sources(config_of(model_path, {"path": str(place)})).train
        rows.append([source[k].row.decoder_ids.tolist() for k in range(len(source))])
    assert rows[0] == rows[1] == rows[2] == rows[3]


def test_tasks_and_text_are_blended_by_their_weights(model_path: Path, prefix: str, tmp_path: Path) -> None:
    tasks = [{"path": str(write_records(tmp_path / f"{k}.jsonl", number))} for k, number in ((0, 80), (1, 20))]
    config = config_of(model_path, *tasks, text_fraction=0.25, corpora=[{"prefix": prefix}], split=(8, 2, 1))
    source = open_sources(config).train
    samples = [source[k] for k in range(400)]
    kinds = [{origin.corpus for origin in sample.origins} for sample in samples]
    assert all(len(kind) == 1 for kind in kinds)
    shares = [sum(kind == {corpus} for kind in kinds) / 400 for corpus in range(3)]
    assert shares[0] == pytest.approx(0.25, abs=0.01)
    epochs = source.epochs(400)[1]
    assert epochs["task 0"] == pytest.approx(epochs["task 1"], rel=0.1)
    for sample in samples[:40]:
        for origin in sample.origins:
            assert sample.index in source.samples_of(origin.corpus, origin.document, 400)


def test_temperature_and_weights_decide_how_often_a_task_is_drawn(model_path: Path, tmp_path: Path) -> None:
    paths = [str(write_records(tmp_path / f"{k}.jsonl", number)) for k, number in ((0, 160), (1, 20))]
    for settings, wanted in (([{}, {}], 1.0), ([{"weight": 1.0}, {"weight": 1.0}], 1.0)):
        tasks = [{"path": path} | more for path, more in zip(paths, settings, strict=True)]
        source = open_sources(config_of(model_path, *tasks, task_temperature=1e9)).train
        pairs = [0, 0]
        for index in range(300):
            for origin in source[index].origins:
                pairs[origin.corpus] += 1
        assert pairs[0] / pairs[1] == pytest.approx(wanted, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 48)), min_size=1, max_size=60), st.sampled_from([1, 8]))
def test_rows_hold_every_pair_once_and_never_too_much(lengths: list[tuple[int, int]], width: int) -> None:
    encoder, decoder = (np.array(side) for side in zip(*lengths, strict=True))
    grouping = group_pairs(encoder, decoder, Budget(64, 48, width), np.arange(len(lengths))[::-1])
    assert sorted(grouping.members.tolist()) == list(range(len(lengths)))
    for row in range(len(grouping)):
        for side, room in ((encoder, 64), (decoder, 48)):
            end = 0
            for pair in grouping.row(row):
                end = -(-end // width) * width + side[pair]
            assert end <= room


def test_templates_name_what_is_missing() -> None:
    template = Template.parse("{{{a.0.b}}} {c}")
    assert template.render({"a": [{"b": 3}], "c": "x"}) == "{3} x"
    assert template.fields == ["a.0.b", "c"]
    with pytest.raises(FieldError, match="has no {c}"):
        template.render({"a": [{"b": 3}]})
    for wrong in ("{", "{}", "{a!r}", "{a:3}"):
        with pytest.raises(ValueError, match=r".+"):
            Template.parse(wrong)
