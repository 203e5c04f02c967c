"""A comparison says what scores say, of our models and of Transformers', and its page stands alone."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from export.export_cases import write_case
from task_parts import write_model_folder, write_records, write_t5, write_tasks
from written_models import tiny_config

from megatron_omega.accounting.counts import training_flops_per_token
from megatron_omega.commands import compare, score
from megatron_omega.errors import ConfigError
from megatron_omega.tasks.comparison import Comparison, Curve, as_json, curve_of, markdown
from megatron_omega.tasks.metrics import Mean, measure
from megatron_omega.tasks.page import html_page
from megatron_omega.tasks.scoring import Answered, Score

HOSTILE = '<script>alert("x")</script> & | <img src=x>'


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def require_accessible(page: Page) -> None:
    """Headings in order, words for every picture, names for rows and columns, nothing from elsewhere."""
    assert page.of("html")[0]["lang"] == "en" and page.of("title") and page.of("main")
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(len(image["alt"] or "") > 20 for image in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table")) and all("scope" in cell for cell in page.of("th"))
    links = [value or "" for _, found in page.tags for name, value in found.items() if name in ("src", "href")]
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not page.of("script") and not page.of("link")


def some_score(model: str, value: float, answer: str, **more: Any) -> Score:
    answers = (Answered("a.jsonl:1", HOSTILE, "right", answer), Answered("a.jsonl:2", "?", "no", HOSTILE))
    return Score("quiz|1", model, 0, {"f1": Mean(value, value - 0.1, value + 0.1)}, 1 - value, answers, **more)


def test_the_page_stands_alone_and_trusts_no_text() -> None:
    scores = (some_score("a", 0.5, "x"), some_score("b", 0.7, HOSTILE), some_score("guess", 0.9, "y", is_guess=True))
    found = Comparison(
        scores,
        (
            Curve("a", (10, 20), (5.0, 4.0), 3.0, {"quiz|1 f1": ((0, 0.1), (20, 0.5))}),
            Curve("b", (10, 30), (5.0, 3.0), 2.0),
        ),
    )
    page = Page(html_page(found))
    require_accessible(page)
    assert len(page.of("img")) == 5  # two of curves, one of answers by tokens, bars of f1 and of loss
    told = [image["alt"] or "" for image in page.of("img")]
    assert any("f1, by training tokens: a goes from 0.100 to 0.500; guess 0.900" in text for text in told)
    assert (
        "".join(page.text).count(HOSTILE) == 5
    )  # asked once; answered by three to the second question, once to the first
    table = markdown(found)
    assert "**0.700 (0.600 to 0.800)**" in table and "**0.900" not in table and "| guess |" in table
    assert found.curves[0].flops == (30.0, 60.0)


def test_leads_are_paired_by_question() -> None:
    """Half of the questions are hard for both: apart the intervals overlap, question by question the lead is certain."""
    wanted = [f"word{n} more" for n in range(40)]
    right = [*(f"word{n}" for n in range(20)), *[""] * 20]  # F1 of 2/3
    close = [*(f"word{n} and else" for n in range(20)), *[""] * 20]  # F1 of 2/5

    def scored(model: str, answers: list[str], **more: Any) -> Score:
        pairs = zip(answers, wanted, strict=True)
        return Score(
            "quiz", model, 0, measure(["f1", "exact_match", "rouge"], answers, wanted), 1.0,
            tuple(Answered("a.jsonl", "?", want, answer) for answer, want in pairs), **more,
        )  # fmt: skip

    model, guess = scored("a|b", right), scored("guess", close, is_guess=True)
    assert model.metrics["f1"].low < guess.metrics["f1"].high
    found = Comparison((model, guess, scored("worse", ["x"] * 40, is_guess=True)))
    leads = {lead.column: lead for lead in found.leads("quiz")}
    assert leads.keys() == {"exact_match", "f1", "rouge1", "rouge2", "rougeL"}
    assert all(lead.model == "a|b" for lead in leads.values()) and leads["f1"].guess == "guess"
    lead = leads["f1"].difference
    assert lead.value == pytest.approx((2 / 3 - 2 / 5) / 2) and 0.08 < lead.low < lead.value < lead.high < 0.19
    assert leads["exact_match"].difference == Mean(0.0, 0.0, 0.0)
    line = f"f1 {lead} above guess"
    assert f"- a\\|b: {line}" in markdown(found) and f"<li>a|b: {line}</li>" in html_page(found)
    assert [one["column"] for one in json.loads(as_json(found))["leads"]] == list(leads)
    others = replace(guess, answers=tuple(replace(one, wanted="other") for one in guess.answers))
    assert not Comparison((model, others)).leads("quiz") and not Comparison((model,)).leads("quiz")


def test_a_curve_is_that_of_the_run(tmp_path: Path) -> None:
    config = tiny_config()
    steps = [{"step": n, "lm_loss": 5 - n / 1000, "consumed_tokens": 100 * n} for n in range(1, 1001)]
    lines = [json.dumps(step) for step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1001, "lm_l']))
    curve = curve_of("a", tmp_path, config)
    assert curve is not None and 300 < len(curve.tokens) <= 400 and curve.tokens[0] == 100
    assert curve.flops_per_token == training_flops_per_token(config)
    reports = [(0, 0.1), (500, 0.2), (500, 0.3), (1000, 0.4)]
    lines = [json.dumps({"event": "evaluate", "step": n, "answers": {"quiz f1": value}}) for n, value in reports]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, "half"]))
    curve = curve_of("a", tmp_path, config)
    assert curve is not None and curve.answers == {"quiz f1": ((0, 0.1), (50_000, 0.3), (100_000, 0.4))}
    assert curve_of("a", tmp_path / "nothing", config) is None


def test_models_of_all_kinds_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra harness)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model_folder(tmp_path / "ours")
    (tmp_path / "ours/metrics.jsonl").write_text('{"step": 1, "lm_loss": 5.0, "consumed_tokens": 64}\n' * 2)
    write_case("llama-like", tmp_path / "llama")
    export, _ = write_case("omega", tmp_path / "run")
    t5 = write_t5(tmp_path / "t5", export / "tokenizer.json")
    tasks = str(write_tasks(tmp_path, metrics=["accuracy", "exact_match"]))
    write_records(tmp_path / "text.jsonl", [{"text": "The quick brown fox."}, {"text": "über den Deich"}])
    models = [f"ours={tmp_path / 'ours'}", f"warm={tmp_path / 'ours'}@2", f"llama={tmp_path / 'llama'}", f"t5={t5}"]
    asked = ["--tasks", tasks, "--text", str(tmp_path / "text.jsonl"), "--limit", "6"]
    compare.main(["--models", *models, "--output", str(tmp_path / "out"), *asked])
    table = capsys.readouterr().out
    for name in ("ours", "warm", "llama", "t5", "most frequent answer", "first words"):
        assert f"| {name} |" in table
    require_accessible(Page((tmp_path / "out/index.html").read_text()))
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    score.main(["--checkpoint", str(tmp_path / "ours"), *asked, "--json"])
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ours = {one["task"]: one for one in found["scores"] if one["model"] == "ours"}
    assert {one["task"] for one in alone} == set(ours) == {"quiz", "text.jsonl"}
    for one in alone:
        if not one["is_guess"]:
            assert ours[one["task"]]["metrics"].keys() == one["metrics"].keys()
            assert {n: m["value"] for n, m in one["metrics"].items()} == {
                n: m["value"] for n, m in ours[one["task"]]["metrics"].items()
            }
    warm = {one["task"]: one for one in found["scores"] if one["model"] == "warm"}
    assert (warm["quiz"]["shots"], ours["quiz"]["shots"]) == (2, 0) and warm["quiz"]["loss"] != ours["quiz"]["loss"]
    assert [one["wanted"] for one in warm["quiz"]["answers"]] == [one["wanted"] for one in ours["quiz"]["answers"]]
    others = {one["task"]: one for one in found["scores"] if one["model"] == "t5"}
    assert {"accuracy", "exact_match"} <= set(others["quiz"]["metrics"]) and not others["text.jsonl"]["metrics"]
    assert len(found["curves"]) == 1


def test_names_of_models_are_checked(tmp_path: Path) -> None:
    one = compare.Contender
    assert compare.named(["a=x", "y"]) == {"a": one(Path("x")), "y": one(Path("y"))}
    assert compare.named(["a=x@4", "b=x@0"]) == {"a": one(Path("x"), 4), "b": one(Path("x"), 0)}
    (tmp_path / "x@4").mkdir()
    path = tmp_path / "x@4"
    assert compare.named([f"a={path}", f"b={path}@2"]) == {"a": one(path), "b": one(path, 2)}
    for words in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(ConfigError, match="NAME=PATH"):
            compare.named(words)
