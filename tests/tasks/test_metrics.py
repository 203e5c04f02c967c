"""Metrics equal those of the packages that define them, on random and hostile pairs."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from megatron_omega.config.check import data as config_check
from megatron_omega.config.check.data import metrics as wrong_metrics
from megatron_omega.config.schema import RunConfig, Task
from megatron_omega.errors import ConfigError
from megatron_omega.tasks.metrics import corpus_score, exact_match, f1, measure, require_metrics, rouge

PAIRS = 2000
HOSTILE = (
    "", " ", "\n\t", "a", "the", "The the THE", "a an the", "...", "?!", "U+2581 \u2581", "\u200b", "\ufeffword", "Ü", "U\u0308",
    "naïve café", "中文 没有 空格", "עברית", "🙂🙂 🙂", "\ud7ff", "İstanbul", "ﬁne", "x" * 500, "word " * 200, "1,000.5", "don't",
    "can't won't", "A-B_C", "an apple", "anthem", "theatre the", "\x00", "\x1c\x1d", "a\u00a0b", "<mask>", "{}", "$x^2$", "[UNK]",
)  # fmt: skip
WORDS = (
    "the",
    "a",
    "cat",
    "Cat.",
    "sat,",
    "on",
    "mat",
    "dog!",
    "an",
    "running",
    "runs",
    "42",
    "é",
    "\u2014",
    "'s",
    "中",
)


def random_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of words, of characters, hostile ones, and near-copies of each other."""
    draw = random.Random(seed)

    def words() -> str:
        return draw.choice([" ", "  ", "\n", " , "]).join(draw.choices(WORDS, k=draw.randrange(14)))

    def characters() -> str:
        return "".join(
            chr(draw.choice([draw.randrange(32, 127), draw.randrange(1, 0xD7FF)])) for _ in range(draw.randrange(40))
        )

    kinds = (words, words, characters, lambda: draw.choice(HOSTILE))
    pairs = []
    for _ in range(count):
        first = draw.choice(kinds)()
        second = draw.choice([draw.choice(kinds)(), first, first.upper(), first[: len(first) // 2], f"the {first}."])
        pairs.append((first, second))
    return pairs


def squads_script() -> ModuleType:
    """SQuAD's own functions, as lm-evaluation-harness carries them; without importing the rest of it."""
    harness = importlib.util.find_spec("lm_eval")
    if harness is None or harness.origin is None:
        pytest.skip("lm-eval, which carries SQuAD's script, is not installed")
    path = Path(harness.origin).parent / "tasks/qasper/metrics.py"
    spec = importlib.util.spec_from_file_location("squads_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_squads_metrics_are_those_of_its_script() -> None:
    script = squads_script()
    for answer, wanted in random_pairs(PAIRS, 0):
        texts = [script.normalize_answer(text) for text in (answer, wanted)]
        assert exact_match(answer, wanted) == float(texts[0] == texts[1]), (answer, wanted)
        # Where nothing is left of either, SQuAD 2.0 counts agreement; 1.1 has no such answers.
        expected = script.f1_abstractive([answer], [wanted]) if all(texts) else float(texts[0] == texts[1])
        assert f1(answer, wanted) == pytest.approx(expected, abs=1e-12), (answer, wanted)


def test_rouge_is_that_of_rouge_score() -> None:
    names, pairs = ["rouge1", "rouge2", "rougeL"], random_pairs(PAIRS, 1)
    oracle = RougeScorer(names, use_stemmer=False)
    sums = dict.fromkeys(names, 0.0)
    for answer, wanted in pairs:
        expected = {name: score.fmeasure for name, score in oracle.score(wanted, answer).items()}
        assert rouge(answer, wanted) == expected
        sums = {name: sums[name] + expected[name] for name in names}
    found = measure(["rouge"], [one for one, _ in pairs], [one for _, one in pairs])
    assert list(found) == names
    assert {name: mean.value for name, mean in found.items()} == pytest.approx({n: s / PAIRS for n, s in sums.items()})


@pytest.mark.parametrize(("name", "oracle"), [("bleu", corpus_bleu), ("chrf", corpus_chrf)])
def test_corpus_metrics_are_sacrebleus(name: str, oracle) -> None:  # noqa: ANN001
    pairs = random_pairs(PAIRS, 2)
    for size in (1, 3, 40, PAIRS):
        answers, wanted = zip(*pairs[:size], strict=True)
        found = corpus_score(name, answers, wanted)
        assert found.value == oracle(list(answers), [list(wanted)]).score
        assert found.low <= found.high
    assert corpus_score(name, ["the cat sat on the mat"] * 2, ["the cat sat on the mat"] * 2).value == pytest.approx(
        100
    )
    assert corpus_score(name, [], []).value != corpus_score(name, [], []).value


def test_a_metric_of_the_wrong_kind_is_one_sentence_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(path="a.jsonl", metrics=("accuracy",)), Task(path="b.jsonl", choices=("x", "y"))]
    (finding,) = wrong_metrics([*tasks, Task(path="c.jsonl", metrics=("rouge", "f1"))])
    assert "data.tasks[0].metrics has accuracy" in finding and "a.jsonl" in finding
    assert [task.measured_by for task in tasks] == [("accuracy",), ("accuracy",)]
    assert Task(path="x").measured_by == ("exact_match", "f1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        require_metrics(["rouge", "bleu", "exact_match"])
    assert len(caught.value.findings) == 2 and all("install" in one for one in caught.value.findings)
    asked = {"data": {"tasks": [{"path": "c.jsonl", "metrics": ["rouge"]}]}, "evaluation": {"answers": 8}}
    assert any("rouge-score" in one for one in config_check.tasks(RunConfig.model_validate(asked)))
