"""The tools that use a model: what they print for people and for programs, and how they refuse."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from written_models import tiny_tokenizer, write_run

from megatron_omega.errors import CheckpointError, ConfigError, DataError
from megatron_omega.export.native import open_export

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a tool inside this process and returns what it printed."""

    def call(tool: str, *arguments: object, stdin: str = "") -> str:
        module = importlib.import_module(f"megatron_omega.commands.{tool}")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        module.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run(path)
    return path


def test_a_text_is_continued(run: Run, folder: Path) -> None:
    arguments = ("--checkpoint", folder, "--max-new-tokens", 9, "--seed", 3)
    lines = run("generate", *arguments, "--prompt", "The quick", "", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert (first["prompt"], second["prompt"]) == ("The quick", "")
    assert first["finished"] == "eos" or first["num_tokens"] == 9
    assert run("generate", *arguments, "--prompt", "The quick") == f"The quick{first['text']}\n"


def test_prompts_come_from_files_and_standard_input(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The lazy\ndog\n")
    arguments = ("--checkpoint", folder, "--max-new-tokens", 2, "--json")
    found = [json.loads(line)["prompt"] for line in run(
        "generate", *arguments, "--prompt", "a", "--prompt-file", tmp_path / "prompt.txt", "-", stdin="from a pipe\n"
    ).splitlines()]  # fmt: skip
    assert found == ["a", "The lazy\ndog", "from a pipe"]
    assert json.loads(run("generate", *arguments, stdin="only this"))["prompt"] == "only this"


def test_texts_of_several_prompts_come_in_order(run: Run, folder: Path) -> None:
    arguments = ("--checkpoint", folder, "--max-new-tokens", 9, "--seed", 3, "--prompt", "The quick", "Zwölf")
    found = [json.loads(line) for line in run("generate", *arguments, "--num-samples", 2, "--json").splitlines()]
    assert [(one["prompt"], one["sample"], one["seed"]) for one in found] == [
        ("The quick", 0, 3), ("The quick", 1, 3), ("Zwölf", 0, 4), ("Zwölf", 1, 4),
    ]  # fmt: skip
    shown = run("generate", *arguments, "--num-samples", 2)
    assert shown == "\n".join(f"{one['prompt']}{one['text']}\n" for one in found)
    assert run("generate", *arguments, "--num-samples", 2, "--sequences", 2) == shown
    streamed = [json.loads(line) for line in run("generate", *arguments, "--json", "--stream").splitlines()]
    tokens = "".join(one["text"] for one in streamed if "log_probability" in one and one["prompt"] == "Zwölf")
    assert tokens == next(one["text"] for one in streamed if "seed" in one and one["prompt"] == "Zwölf")


def test_beams_and_stop_strings(run: Run, folder: Path) -> None:
    arguments = ("--checkpoint", folder, "--max-new-tokens", 12, "--prompt", "The", "--json")
    best = [json.loads(line) for line in run("generate", *arguments, "--beams", 3, "--num-samples", 2).splitlines()]
    assert [one["sample"] for one in best] == [0, 1] and best[0]["text"] != best[1]["text"]
    whole = json.loads(run("generate", *arguments, "--seed", 1))["text"]
    stopped = json.loads(run("generate", *arguments, "--seed", 1, "--stop", whole[3:5]))
    assert stopped["text"] == whole[: whole.index(whole[3:5])] and stopped["finished"] == "stop"


def test_greedy_needs_no_seed(run: Run, folder: Path) -> None:
    arguments = ("--checkpoint", folder, "--prompt", "The", "--max-new-tokens", 12)
    assert run("generate", *arguments, "--greedy", "--seed", 1) == run("generate", *arguments, "--temperature", 0)


def test_masks_are_filled(run: Run, folder: Path) -> None:
    text = "The <mask> fox[MASK]."
    data = json.loads(run("fill_mask", "--checkpoint", folder, "--text", text, "--top-k", 3, "--json"))
    assert data["masked"] == text and [len(candidates) for candidates in data["masks"]] == [3, 3]
    shown = run("fill_mask", "--checkpoint", folder, "--text", text, "--top-k", 3)
    assert shown.splitlines()[0] == data["text"].splitlines()[0]
    assert repr(data["masks"][1][2]["piece"]) in shown


@pytest.mark.parametrize("tool", ["generate", "fill_mask", "export"])
def test_what_is_missing_is_said(run: Run, tool: str, folder: Path, tmp_path: Path) -> None:
    more = {"generate": [], "fill_mask": ["--text", "<mask>"], "export": ["--output", tmp_path / "export"]}[tool]
    with pytest.raises(CheckpointError, match="does not exist"):
        run(tool, "--checkpoint", tmp_path / "nothing", *more)
    with pytest.raises(DataError, match="cannot be read"):
        run(tool, "--checkpoint", folder, "--tokenizer", tmp_path / "none", *more)
    other = tmp_path / "other.model"
    other.write_bytes(tiny_tokenizer().processor.serialized_model_proto() + b"\x12\x00")
    with pytest.raises(DataError, match="trained with"):
        run(tool, "--checkpoint", folder, "--tokenizer", other, *more)


def test_settings_that_make_no_sense_are_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ConfigError, match=f"device {device} cannot be used"):
            run("generate", "--checkpoint", folder, "--device", device)
    with pytest.raises(ConfigError, match="temperature"):
        run("generate", "--checkpoint", folder, "--temperature", -1)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        run("generate", "--checkpoint", folder, "--prompt", "a", "--max-new-tokens", 0)
    with pytest.raises(ConfigError, match="shard-gigabytes"):
        run("export", "--checkpoint", folder, "--output", tmp_path / "export", "--shard-gigabytes", 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_is_proved_and_writes_the_same(run: Run, dtype: str, folder: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    data = json.loads(run("export", "--checkpoint", folder, "--output", export, "--dtype", dtype, "--json"))
    assert data["is_same"] and data["changed"] == []
    assert (data["logit_difference"] == 0) == (dtype == "fp32")
    prompt = ("--prompt", "The quick", "--max-new-tokens", 9, "--greedy")
    if dtype == "fp32":
        assert run("generate", "--checkpoint", export, *prompt) == run("generate", "--checkpoint", folder, *prompt)
    with pytest.raises(CheckpointError, match="is an export already"):
        run("export", "--checkpoint", export, "--output", tmp_path / "again")


def test_a_wrong_export_is_found(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_omega.export import native as export

    def save_wrongly(tensors: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        tensors["model.token_table.weight"].mul_(1.001)
        save_file(tensors, *arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(export, "save_file", save_wrongly)
    with pytest.raises(CheckpointError, match="does not say what"):
        run("export", "--checkpoint", folder, "--output", tmp_path / "export")
    assert len(load_file(tmp_path / "export" / "model.safetensors")) == len(open_export(tmp_path / "export").names())


def test_a_tool_ends_with_one_line_and_its_code(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "tools/generate.py"), "--checkpoint", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
