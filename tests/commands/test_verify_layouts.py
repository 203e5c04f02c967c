"""What the tool makes of figures: comparisons, exit codes, refusals. The runs themselves are in training/test_layouts.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_omega.commands import verify_layouts
from megatron_omega.commands.main import run
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import ModelConfig
from megatron_omega.studies.layouts import COMPARED, LayoutUnderTest, compare, every_layout, tolerance_of

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/omega-tiny/run.yaml"
Tool = Callable[..., int]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Return a function that runs the tool with made-up figures: `off` is added to those of a layout."""

    def call(*arguments: object, off: dict[str, float] | None = None) -> int:

        def measured(config: Path, layout: LayoutUnderTest, *_: Any, steps: int, **__: Any) -> list[dict[str, float]]:
            return [dict.fromkeys(COMPARED, 2.0 + (off or {}).get(layout.label, 0.0))] * steps

        monkeypatch.setattr(verify_layouts, "measure", measured)
        return run("verify-parallel", ["--config", *map(str, arguments)])

    return call


def test_agreement_is_0_and_disagreement_1(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(TINY, "--layouts", "tp2,dp2", off={"dp2": 1.9e-5}) == 0
    assert "PASS: all 2 layouts agree" in capsys.readouterr().out
    assert tool(TINY, "--layouts", "tp2,dp2", off={"dp2": 2.1e-5}) == 1
    assert "FAIL: 1 of 2 layouts" in capsys.readouterr().out
    assert tool(TINY, "--layouts", "tp2", "--tolerance", 0, off={"tp2": 1e-9}) == 1


def test_what_is_not_a_number_fails(tool: Tool) -> None:
    assert tool(TINY, "--layouts", "tp2", off={"tp2": math.nan}) == 1


def test_figures_may_be_missing_only_where_no_token_was_masked() -> None:
    whole: dict[str, Any] = dict.fromkeys(COMPARED, 2.0)
    for name in COMPARED:
        missing = [whole, whole | {name: None}]
        assert compare("both", missing, missing, 1.0).passed == (name == "mlm_loss")
        assert not compare("one", [whole, whole], missing, 1.0).passed
    assert not compare("short", [whole, whole], [whole], 1.0).passed


def test_a_program_can_read_it(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(TINY, "--layouts", "tp2,dp2", "--json", off={"dp2": 1.0}) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layout"], row["passed"], row["grad_norm"]) for row in rows] == [("tp2", True, 0), ("dp2", False, 0.5)]


def test_the_whole_list_is_the_default(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(TINY, "--json") == 0
    found = [row["layout"] for row in json.loads(capsys.readouterr().out)]
    assert found == every_layout(load_config(TINY).model)
    assert {"tp2-pp2-dp2", "zero0", "dp2-zero2", "dp2-zero3", "tp3", "pp4-cut2.4.5", "tp2-pp2v-dp2", "tp2sp"} <= {
        *found
    }


def test_layouts_a_model_cannot_run(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    four_heads = ("--model.num_attention_heads", 4, "--json")
    assert tool(TINY, *four_heads) == 0
    left = capsys.readouterr()
    assert left.err.count("left out") == 1 and "left out: layout tp3: model.num_attention_heads=4" in left.err
    with pytest.raises(SystemExit) as ended:
        tool(TINY, "--layouts", "tp3,tp2,tp5", *four_heads)
    assert ended.value.code == 2
    refused = capsys.readouterr().err
    assert "layout tp3: model.num_attention_heads=4" in refused and "layout tp5: model" in refused


@pytest.mark.parametrize("arguments", [["--layouts", "tp2-xx3"], ["--steps", "0"], ["--model.hiden_size", "3"]])
def test_mistakes_are_refused(arguments: list[str], tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool(TINY, *arguments)
    assert ended.value.code == 2 and arguments[1].split("-")[-1] in capsys.readouterr().err


def test_the_tolerance_follows_from_format_and_depth() -> None:
    tiny = load_config(TINY)
    assert tolerance_of(tiny) == 1e-5
    half = tiny.model_copy(update={"precision": tiny.precision.model_copy(update={"dtype": "bf16"})})
    assert tolerance_of(half) == pytest.approx(2 * 0.42 / 256 * 20**0.5)
    deep = half.model_copy(update={"model": ModelConfig(encoder_layers=8, decoder_layers=8)})
    assert tolerance_of(deep) == pytest.approx(2 * tolerance_of(half))
