"""Metrics by their published rules, and tasks gathered from source files."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import yaml

from megatron_omega.commands.gather_tasks import package_of
from megatron_omega.tasks.installed import Origin, gather, write_tasks
from megatron_omega.tasks.metrics import exact_match, f1, mean_of, normalized


@pytest.mark.parametrize(
    ("answer", "wanted", "exact", "overlap"),
    [
        ("The cat.", "cat", 1, 1),
        ("a cat sat", "the cat", 0, 2 / 3),
        ("", "", 1, 1),
        ("", "cat", 0, 0),
        ("the", "a", 1, 1),
        ("cat cat", "cat", 0, 2 / 3),
        ("Ümlaut-Wort", "ümlautwort", 1, 1),
        ("dog", "cat", 0, 0),
    ],
)
def test_metrics_follow_squads_rules(answer: str, wanted: str, exact: float, overlap: float) -> None:
    assert exact_match(answer, wanted) == exact
    assert f1(answer, wanted) == pytest.approx(overlap)


def test_metrics_are_symmetric_bounded_and_one_for_the_same() -> None:
    source = random.Random(0)
    for _ in range(500):
        texts = ["".join(source.choice("abthe n.,!? \n\t") for _ in range(source.randrange(30))) for _ in range(2)]
        assert 0 <= f1(*texts) <= 1
        assert f1(*texts) == pytest.approx(f1(*reversed(texts)))
        assert exact_match(texts[0], texts[0]) == f1(texts[0], texts[0]) == 1
        assert normalized(normalized(texts[0])) == normalized(texts[0])
        assert exact_match(*texts) <= f1(*texts)


def test_an_interval_holds_its_mean_and_narrows() -> None:
    few, many = mean_of([0.0, 1.0] * 10), mean_of([0.0, 1.0] * 1000)
    for mean in (few, many):
        assert mean.low < mean.value == 0.5 < mean.high
    assert many.high - many.low < few.high - few.low
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=0.2)
    assert math.isnan(mean_of([]).value)


SOURCE = '''
def scale(values, factor=2, offset=None):
    """Scale every value, then add an offset.

    More of it.
    """
    return [value * factor + (offset or 0) for value in values]
'''


def test_tasks_are_gathered_from_functions(tmp_path: Path) -> None:
    origins = []
    for number in range(20):
        path = tmp_path / f"package{number % 2}/file{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SOURCE.replace("scale", f"scale_{number}").replace("Scale", f"Scale {number}"))
        origins.append(Origin(path, path.parent.name))
    found = gather(origins, 100)
    assert found["summary"][0]["answer"] == "Scale 0 every value, then add an offset."
    assert "Scale" not in found["summary"][0]["text"]
    assert {one["answer"] for one in found["default"]} <= {"2", "None"}
    path = write_tasks(tmp_path / "tasks", found)
    tasks = yaml.safe_load(path.read_text())
    assert [task["name"] for task in tasks] == ["summary", "default", "package", "name"]
    assert found["name"][0]["spelled"] == found["name"][0]["answer"] == "scale 0"
    lines = [json.loads(line) for task in tasks for line in Path(task["path"]).read_text().splitlines()]
    held = [json.loads(line) for task in tasks for line in Path(task["validation"]).read_text().splitlines()]
    assert {one["source"] for one in lines}.isdisjoint({one["source"] for one in held})
    assert all(one["licence"] and one["source"] for one in lines)


def test_no_answer_has_more_than_its_share_and_held_out_ones_are_few(tmp_path: Path) -> None:
    draw = random.Random(0)
    origins = []
    for number in range(120):
        answers = draw.choices(["None", "True", "0", "1", "'a'", "2.5"], [50, 10, 10, 10, 10, 10], k=8)
        lines = [
            f"def f{number}_{k}(self, first_of_all=None, second={answer}):\n    'Is documented.'"
            for k, answer in enumerate(answers)
        ]
        path = tmp_path / f"a/package/file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
        origins.append(Origin(path, f"package{number % 7}"))
    origins.sort(key=lambda one: hashlib.blake2b("/".join(one.path.parts[-3:]).encode(), digest_size=8).hexdigest())
    found = gather(origins, 300)["default"]
    for part, least, most in (("train", 250, 270), ("held out", 20, 30)):
        answers = [one["answer"] for one in found if one["part"] == part]
        assert least <= len(answers) <= most
        assert max(answers.count(answer) for answer in set(answers)) <= 0.2 * len(answers)
    assert len({(one["text"].partition("(")[0], one["argument"]) for one in found}) == len(found)


def test_more_names_than_anything_else_are_gathered(tmp_path: Path) -> None:
    source = "\n".join(f"def take{k}_of_NUMBER(self):\n    'Is documented.'\n    return {k}\n" for k in range(30))
    origins = []
    for number in range(8):
        path = tmp_path / f"a/package/file{number}.py"  # what is held out follows from these three names
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace("NUMBER", str(number)))
        origins.append(Origin(path, f"package{number}"))
    names = gather(origins, 30)["name"]
    assert 75 <= len(names) <= 90
    assert all(one["answer"] == one["spelled"] and 1 < len(one["answer"].split()) <= 6 for one in names)
    assert len({one["answer"] for one in names}) == len(names)


def test_a_file_knows_its_package() -> None:
    assert package_of(Path("json/decoder.py")) == "json"
    assert package_of(Path("abc.py")) == "abc"
    assert package_of(Path("site-packages/numpy/core/x.py")) == "numpy"
