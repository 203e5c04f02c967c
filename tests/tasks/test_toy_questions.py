"""64 questions are learned to the last one, as by Transformers' Seq2SeqTrainer on the exported model, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_questions as toy

from megatron_omega.host import run_folder
from megatron_omega.launching.local_ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.mark.distributed
def test_all_questions_are_learned_and_both_take_the_same_steps(tmp_path: Path) -> None:
    toy.write_start(tmp_path)
    toy.write_questions(tmp_path / "questions.jsonl")
    run_ranks(toy.train_ours, 1, toy.words_of(tmp_path))
    ours = toy.losses_of(tmp_path / "ours")
    events = map(json.loads, (tmp_path / "ours" / run_folder.EVENTS).read_text().splitlines())
    scores = [event["answers"]["questions exact_match"] for event in events if event["event"] == "evaluate"]
    theirs, share = toy.train_theirs(tmp_path)
    assert scores[0] == 0 and scores[-1] == share == 1
    assert len(ours) == len(theirs) == toy.STEPS
    assert ours[: toy.SAME_STEPS] == pytest.approx(theirs[: toy.SAME_STEPS], rel=toy.SAME)
