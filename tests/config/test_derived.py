"""What follows from a short configuration, what messages say of defaults, and names of other systems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from megatron_omega.commands.settings import page
from megatron_omega.config.arguments import parse_arguments, settings
from megatron_omega.config.derived import RULES, derive, followers
from megatron_omega.config.load import load_config, resolve_run
from megatron_omega.config.peers import counterpart, counterparts
from megatron_omega.errors import ConfigError


def given(**sections: Any) -> dict[str, Any]:
    return derive(sections)[0]


def test_sizes_follow_from_the_hidden_size() -> None:
    found = given(model={"hidden_size": 512, "decoder_layers": 6})
    assert found["model"]["ffn_hidden_size"] == 1408 and found["model"]["num_attention_heads"] == 8
    assert found["model"]["encoder_layers"] == 6
    assert found["data"] == {"decoder_seq_length": 1024, "encoder_seq_length": 1024}


def test_a_decoder_alone_has_no_encoder_stream() -> None:
    assert given(model={"encoder_layers": 0}, data={"decoder_seq_length": 256})["data"]["encoder_seq_length"] == 0


@pytest.mark.parametrize(("steps", "warmup"), [(5, 1), (50, 10), (1000, 20), (10_000, 200), (1_000_000, 2000)])
def test_warm_up_is_a_share_of_the_steps(steps: int, warmup: int) -> None:
    assert given(training={"train_steps": steps})["schedule"]["warmup_steps"] == warmup


def test_the_vocabulary_is_that_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps({"vocab_size": 777}))
    found, derived = derive({"data": {"corpora": [{"prefix": str(tmp_path / "text")}]}})
    assert found["model"]["vocab_size"] == 777 and "text.json" in str(derived[0])
    assert "model" not in given(data={"corpora": [{"prefix": str(tmp_path / "nothing")}]})


def test_what_is_given_stays_and_nothing_follows_from_nothing() -> None:
    assert given(model={"hidden_size": 64, "ffn_hidden_size": 7})["model"]["ffn_hidden_size"] == 7
    assert derive({}) == ({}, [])
    for wrong in ("wide", -3, None, [1]):
        assert "ffn_hidden_size" not in given(model={"hidden_size": wrong})["model"]


def test_rules_name_settings_and_stand_behind_their_sources() -> None:
    known, done = {setting.name for setting in settings()}, set[str]()
    later = [rule.name for rule in RULES]
    for rule in RULES:
        assert {rule.name, *rule.sources} <= known
        assert not ({*rule.sources} & {*later} - done), rule.name
        done.add(rule.name)
    assert "data.encoder_seq_length" in followers({"model.hidden_size"})


def findings(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve_run(parse_arguments([*words, "--data.tokenizer", "t", "--data.corpora", "[{prefix: c}]"]))
    return list(error.value.findings)


def test_a_message_about_a_default_says_so() -> None:
    [finding] = findings("--parallel.tensor_parallel_size", "32", "--model.ffn_hidden_size", "16384")
    assert "model.num_attention_heads=48 (default) is not divisible by parallel.tensor_parallel_size=32;" in finding
    [finding] = findings("--parallel.tensor_parallel_size", "3", "--model.hidden_size", "96", "--batch.global_batch_size", "8",
                         "--model.num_attention_heads", "6")  # fmt: skip
    assert "model.ffn_hidden_size=256 (derived)" in finding


def test_a_wrong_name_brings_no_findings_about_the_right_one() -> None:
    found = findings("--model.hiden_size", "64", "--parallel.tensor_parallel_size", "5")
    assert len(found) == 1 and "did you mean model.hidden_size?" in found[0]
    found = findings("--config", "nowhere.yaml", "--parallel.tensor_parallel_size", "5")
    assert len(found) == 1 and "nowhere.yaml cannot be read" in found[0]


NAMES = [(name, one) for name, one in counterparts().items()]


def test_the_table_is_large() -> None:
    assert len(NAMES) >= 60 and {one.owner for _, one in NAMES} == {
        "Megatron-LM", "DeepSpeed", "Hugging Face", "torchtitan",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "one"), NAMES, ids=[name for name, _ in NAMES])
def test_a_name_of_another_system_is_answered_with_ours(name: str, one: Any, tmp_path: Path) -> None:
    known = {setting.name for setting in settings()}
    assert one.setting is None or one.setting == "deepspeed_config" or one.setting in known
    if name in known:
        return  # theirs and ours
    expected = (
        one.answer if name.rpartition(".")[2] not in {full.rpartition(".")[2] for full in known} else "did you mean"
    )
    if "." not in name:
        with pytest.raises(ConfigError) as error:
            parse_arguments([f"--{name.replace('_', '-')}", "3"])
        assert expected in str(error.value)
    file = tmp_path / "run.yaml"
    section, _, field = name.rpartition(".")
    file.write_text(f"{section or 'training'}: {{{field}: 3}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert (one.setting or one.remark) in str(error.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("--hidden-size", "model.hidden_size"), ("--vocab-size", "model.vocab_size"), ("--seed", "training.seed")],
)
def test_a_setting_without_its_section_is_told_the_section(name: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean --{setting}"):
        parse_arguments([name, "3"])


def test_nothing_is_answered_with_a_neighbour_by_spelling() -> None:
    assert counterpart("--colour") is None
    with pytest.raises(ConfigError, match="--help lists every option"):
        parse_arguments(["--loader", "3"])


def test_the_page_of_settings_is_up_to_date() -> None:
    text = "\n".join(page()) + "\n"
    assert (ROOT / "docs/settings.md").read_text() == text, "megatron-omega settings > docs/settings.md"
