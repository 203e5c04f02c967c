"""Every figure of the README is true, or names the command that gives it. What it shows as output, test_pasting checks."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_omega import errors
from megatron_omega.accounting import parameter_count
from megatron_omega.config.load import load_config
from megatron_omega.studies.layouts import every_layout

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def in_words(count: int) -> str:
    """Return a number of parameters as the table of presets has it."""
    if count > 10e9:
        return f"{count:,}"
    return f"{count / 1e9:.1f} B" if count >= 0.95e9 else f"{count / 1e6:.{0 if count >= 10e6 else 1}f} M"


def test_the_table_of_presets_says_how_large_they_are() -> None:
    table = README.partition("## Presets")[2].partition("## The house")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `examples/")]
    found = {name: size.strip() for names, size in rows for name in re.findall(r"`examples/([\w.-]+)`", names)}
    presets = {path.parent.name: path for path in ROOT.glob("examples/*/run.yaml")}
    assert found.keys() == presets.keys()
    assert found == {name: in_words(parameter_count(load_config(path).model)) for name, path in presets.items()}


def test_attention_modules_are_as_many_as_it_says() -> None:
    counts = {}
    for name in ("omega-11.9b", "omega-11.9b-hd32"):
        model = load_config(ROOT / f"examples/{name}/run.yaml").model
        branches = len(model.layer_branches("encoder", 0)) + len(model.layer_branches("decoder", 0)) + 1  # cross
        counts[name] = (branches, model.resolved_head_dim)
    (first, first_dim), (second, second_dim) = counts["omega-11.9b"], counts["omega-11.9b-hd32"]
    assert f"{second} attention modules of head size {second_dim} in the place of {first} of size {first_dim}" in README


def test_twenty_layouts_are_twenty() -> None:
    tiny = load_config(ROOT / "examples/omega-tiny/run.yaml").model
    assert "under twenty" in README and len(every_layout(tiny)) >= 20


def test_the_demo_and_the_language_are_as_it_says() -> None:
    assert "Python 3.10 or newer" in README and 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert (
        "8 CPU ranks (TP 2 x PP 2 x DP 2)" in README
        and "8 CPU ranks (TP 2 x PP 2 x DP 2)" in (ROOT / "Makefile").read_text()
    )


def test_exit_codes_are_those_of_the_errors() -> None:
    (sentence,) = re.findall(r"Exit codes: (.*?)\. The file", README, re.DOTALL)
    told = {int(code) for code in re.findall(r"\b(\d+)\b", sentence)}
    kinds = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.OmegaError)
    }
    assert told == kinds - {errors.BUG} | {errors.DONE, errors.LOST}
