"""Reading a configuration: every error in one list, and nothing read that was not written."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_omega.config import arguments, yaml_text
from megatron_omega.config.load import dump_config, load_config, parse_arguments, resolve_run
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
TINY = {"model": {"encoder_layers": 1, "decoder_layers": 1}}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def findings_of(path: Path | None, **overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, {name.replace("__", "."): text for name, text in overrides.items()})
    return list(caught.value.findings)


def test_defaults_without_a_file() -> None:
    assert load_config(None) == RunConfig()


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  hidden_size: 480\noptimizer:\n  learning_rate: 1e-3\nlogging:\n  wandb: off\n")
    parsed = parse_arguments(
        ["--config", str(path), "--training.seed", "1", "--training.seed=2", "--training.deterministic"]
    )
    config = load_config(parsed.config, parsed.overrides)
    assert (config.model.hidden_size, config.optimizer.learning_rate, config.logging.wandb) == (480, 1e-3, "off")
    assert (config.training.seed, config.training.deterministic) == (2, True)


def test_lists_mappings_and_absent_sections_can_be_given_on_the_command_line() -> None:
    config = load_config(
        None,
        {
            "model.encoder_branches": "[full, local]",
            "data.corpora": "[{prefix: a/b, weight: 2}, {prefix: c}]",
            "batch.ramp_up.start": "4",
            "batch.ramp_up.increment": "4",
            "batch.ramp_up.samples": "64",
        },
    )
    assert config.model.encoder_branches == ("full", "local")
    assert [(corpus.prefix, corpus.weight) for corpus in config.data.corpora] == [("a/b", 2.0), ("c", 1.0)]
    assert config.batch.ramp_up is not None and config.batch.ramp_up.start == 4


def test_a_pattern_of_branches_is_read_and_written_back() -> None:
    config = load_config(None, {"model.encoder_branches": "[[full, local], [local, axial]]"})
    assert config.model.encoder_branches == (("full", "local"), ("local", "axial"))
    assert config.model.layer_branches("encoder", 5) == ("local", "axial")
    assert config.model.layer_branches("decoder", 5) == config.model.decoder_branches
    assert RunConfig.model_validate(yaml_text.parse(dump_config(config), "it")) == config


def test_a_wrong_branch_is_named_with_its_place() -> None:
    flat = findings_of(None, model__encoder_branches="[full, locall]")
    assert len(flat) == 1 and flat[0].startswith("model.encoder_branches[1]=locall: must be 'full', ")
    nested = findings_of(None, model__decoder_branches="[[causal], [local, axal]]")
    assert len(nested) == 1 and nested[0].startswith("model.decoder_branches[1][1]=axal: must be 'full', ")


def test_every_error_is_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model:\n  hiden_size: 480\n  ffn_hidden_size: 16384\n  num_attention_heads: 0\nmodle: {}\nlearning_rate: 1\n",
    )
    found = findings_of(path, parallel__tensor_parallel_size="5", optimizer__beta1="1.5")
    assert "model.hiden_size=480: there is no such setting; did you mean model.hidden_size?" in found
    assert any(line.startswith("model.num_attention_heads=0: must be greater than 0") for line in found)
    assert any(line.startswith("modle=") and "did you mean model?" in line for line in found)
    assert any(line.startswith("learning_rate=1:") and "optimizer.learning_rate" in line for line in found)
    assert any(line.startswith("optimizer.beta1=1.5:") for line in found)
    assert any("ffn_hidden_size=16384 is not divisible by parallel.tensor_parallel_size=5" in line for line in found)
    assert len(found) == 6


def test_a_default_in_the_place_of_a_faulty_value_makes_no_error_of_its_own() -> None:
    found = findings_of(
        None, model__num_attention_heads="x", parallel__tensor_parallel_size="3", model__ffn_hidden_size="300"
    )
    assert [line.partition("=")[0] for line in found] == ["model.num_attention_heads"]


def test_a_setting_in_the_wrong_section_names_the_right_one() -> None:
    (finding,) = findings_of(None, training__learning_rate="1")
    assert finding.endswith("did you mean optimizer.learning_rate?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [1", "is not plain YAML: line"),
        ("model: !!python/object/apply:os.getcwd []", "is not plain YAML: line 1"),
        ("training: {seed: 1}\ntraining: {seed: 2}", "'training' stands here a second time"),
        ("- 1", "must hold sections"),
        ("model: 3", "model=3: must be a section"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    (finding,) = findings_of(write(tmp_path, text))
    assert expected in finding


def test_missing_file() -> None:
    (finding,) = findings_of(Path("no/such/run.yaml"))
    assert "no/such/run.yaml cannot be read" in finding


@pytest.mark.parametrize("text", ["off", "no", "yes", "12e", "e5", "1:30", "2024-01-01", "0b11", "1_000", "="])
def test_words_stay_words(text: str) -> None:
    assert yaml_text.parse(text, "test") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0100", 100),
        ("0o17", 15),
        ("0x1F", 31),
        ("1.", 1.0),
        ("-.5e+2", -50.0),
        ("7", 7),
        ("true", True),
    ],
)
def test_numbers_are_numbers(text: str, value: object) -> None:
    parsed = yaml_text.parse(text, "test")
    assert parsed == value and type(parsed) is type(value)


NO_NUL = st.characters(codec="utf-8", exclude_characters="\0")


@settings(max_examples=30)
@example(1.0, "0E0", [], False)
@example(1.0, "\x85", [("a\u2028b", 1.0), ("\r", 1.0)], False)
@given(
    st.floats(min_value=1e-12, max_value=1e3),
    st.text(NO_NUL, max_size=12),
    st.lists(st.tuples(st.text(NO_NUL, max_size=8), st.floats(min_value=1e-6, max_value=1e6)), max_size=3),
    st.booleans(),
)
def test_dump_and_load_are_inverse(
    tmp_path_factory: pytest.TempPathFactory, rate: float, name: str, corpora: list[tuple[str, float]], flag: bool
) -> None:
    config = RunConfig.model_validate(
        {
            "optimizer": {"learning_rate": rate},
            "logging": {"run_directory": name, "progress_bar": flag},
            "data": {"corpora": [{"prefix": prefix, "weight": weight} for prefix, weight in corpora]},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("argv", [["--local_rank=3"], ["--local-rank", "3"], ["--deepspeed"], []])
def test_launcher_arguments_are_tolerated(argv: list[str]) -> None:
    assert parse_arguments(argv).overrides == ()


def test_short_forms() -> None:
    parsed = parse_arguments(["--load", "runs/a", "--load-weights-only", "--dry-run", "--json"])
    config = load_config(parsed.config, parsed.overrides)
    assert (config.checkpoint.load, config.checkpoint.load_weights_only) == ("runs/a", True)
    assert parsed.dry_run and parsed.json


def test_unknown_options() -> None:
    with pytest.raises(ConfigError, match="no option --confg; did you mean --config"):
        parse_arguments(["--confg", "x.yaml"])
    with pytest.raises(ConfigError, match="'stray' belongs to no option"):
        parse_arguments(["stray"])
    with pytest.raises(ConfigError, match="expected one argument"):
        parse_arguments(["--config"])


def test_tools_have_options_of_their_own_and_overrides() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(["--config", "x", "--training.deterministic", "--training.seed", "7"])
    overrides = arguments.read_overrides(rest, parser)
    config = load_config(None, overrides)
    assert known.config == "x" and (config.training.deterministic, config.training.seed) == (True, 7)
    with pytest.raises(ConfigError, match="no option --confg; did you mean --config"):
        arguments.read_overrides(["--confg=x"], parser)


def test_a_misspelt_setting_is_reported_with_the_other_errors() -> None:
    parsed = parse_arguments(["--model.hiden_size=64", "--data.nope", "--optimizer.epsilon", "0"])
    with pytest.raises(ConfigError) as caught:
        load_config(parsed.config, parsed.overrides)
    assert [line.partition("=")[0] for line in caught.value.findings] == [
        "model.hiden_size",
        "data.nope",
        "optimizer.epsilon",
    ]


def test_help_shows_every_setting_with_its_documentation() -> None:
    text = "".join(arguments.build_parser("pretrain_omega.py").format_help().split())
    for setting in arguments.settings():
        assert f"--{setting.name}" in text
        assert setting.field.description and "".join(setting.help.split()) in text


def test_yaml_and_json_errors_come_together(tmp_path: Path) -> None:
    json_path = tmp_path / "zero.json"
    json_path.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": 99}')
    parsed = parse_arguments(
        ["--deepspeed_config", str(json_path), "--parallel.pipeline_parallel_size", "2", "--model.hiden_size", "1",
         "--data.tokenizer", "t", "--data.corpora", "[{prefix: x}]"]
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        resolve_run(parsed, world_size=2)
    text = str(caught.value)
    assert len(caught.value.findings) == 3
    assert "hiden_size" in text and "train_batch_size=99" in text and "zero_optimization.stage=3" in text


def test_a_checked_run() -> None:
    argv = ["--data.tokenizer", "t", "--data.corpora", "[{prefix: x}]", "--batch.global_batch_size", "12"]
    run = resolve_run(parse_arguments(argv), world_size=2)
    assert run.deepspeed.values["gradient_accumulation_steps"] == 6
    assert run.notices == ()


def test_configuration_needs_no_tensor_library() -> None:
    program = "import sys, megatron_omega.config.load as _; sys.exit(' '.join({'torch', 'numpy', 'deepspeed'} & {*sys.modules}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stderr.strip() == ""


@pytest.mark.parametrize(
    "text", ["runs/exp #1", "runs: 2", "'quoted'", "0100", "*", "{x", "1:30", "- a", "true", "", "null"]
)
def test_text_is_taken_as_it_was_typed(text: str) -> None:
    config = load_config(None, {"logging.run_directory": text, "data.tokenizer": text})
    assert (config.logging.run_directory, config.data.tokenizer) == (text, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training.seed", str(2**64)),
        ("training.seed", "9" * 6000),
        ("model.decoder_layers", "1000000000000"),
        ("optimizer.learning_rate", "1e300"),
        ("data.split", "[1e300, 1, 1]"),
        ("model.local_window", "100000000"),
        ("data.tokenizer", "a\udcff"),
        ("data.corpora", '[{prefix: "a\\0b"}]'),
        ("model.encoder_branches", "[" * 5000),
        ("model.encoder_branches", "&a [*a]"),
        ("model.encoder_branches", "{[full]: 1}"),
        ("model.encoder_branches", "<<: 1"),
    ],
)
def test_values_beyond_sense_are_refused_at_once(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {name: text})
    assert all(len(finding) < 400 and "\n" not in finding for finding in caught.value.findings)


def test_anchors_cannot_grow_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="it holds more than"):
        yaml_text.parse("\n".join(lines), "bomb")
