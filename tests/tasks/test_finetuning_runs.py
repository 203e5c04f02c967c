"""A fine-tuning as it is started: from a base that is kept to, on records that are the same, resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from written_models import tiny_config, tiny_model, write_model, write_run

from megatron_omega.checkpoint.catalogue import newest_whole
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.errors import CheckpointError, ConfigError
from megatron_omega.export.adapted import AdaptedReader, open_whole
from megatron_omega.export.hugging_face.adapter_folder import import_adapters, write_adapters
from megatron_omega.export.loading import load_text_model
from megatron_omega.host import run_folder
from megatron_omega.host.environment import complete_environment
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.tasks.answering import MORE_THAN_LONGEST, written
from megatron_omega.tasks.finetuning import as_finetuning, read_tasks

ANSWERS = "answers.jsonl"
SHORT = ("--training.train_steps", "4", "--evaluation.interval_steps", "2", "--checkpoint.interval_steps", "2",
         "--checkpoint.keep_last", "9", "--evaluation.answers", "7", "--logging.tensorboard", "false",
         "--batch.global_batch_size", "4", "--data.split", "[2, 1, 0]", "--resilience.monitor", "false",
         "--evaluation.patience", "0", "--optimizer.learning_rate", "0.02")  # fmt: skip
MODES = {"whole": (), "lora": ("--lora.rank", "2"), "more": ("--lora.rank", "2", "--lora.also", "[table, vectors]")}


def finetune(words: list[str], zero: int = 1) -> None:
    """Fine-tune as one rank; leave the answers of each validation in the run folder."""
    from megatron_omega.run.train import train
    from megatron_omega.tasks.answering import Answers

    class Listening(Answers):
        def _answered(self, model: Any, rows: Any, pairs: Any) -> list[str]:
            found = super()._answered(model, rows, pairs)
            prompts = [rows.fit.cut(*rows.shard.pair(pair))[0].tolist() for pair in pairs]
            if self._run.topology.rank == 0:
                with (Path(self._run.config.logging.run_directory) / ANSWERS).open("a") as file:
                    file.write(json.dumps([prompts, found]) + "\n")
            return found

    place = complete_environment()
    arguments = parse_arguments([*words, "--deepspeed_config", f"zero{zero}"])
    overrides = (*arguments.overrides, read_tasks(arguments.tasks or ""))
    run = as_finetuning(replace(arguments, tasks=None, overrides=overrides), place.world_size)
    train(resolve_run(run.arguments, place.world_size), place, answering=Listening)


def write_pairs(path: Path, word: str = "there") -> Path:
    rows = [{"prompt": "where is " + "it " * (k % 5) + str(k), "target": f" {word}" * (k % 3 + 1)} for k in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(folder: Path, run: Path, mode: str) -> list[str]:
    given = ("--load", folder / "base", "--tasks", folder / "pairs.jsonl", "--logging.run_directory", run)
    return [*map(str, given), *SHORT, *MODES[mode]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    with open_checkpoint(run / run_folder.CHECKPOINTS / f"step-{step:08d}") as reader:
        return {name: reader.tensor(name) for name in reader.names()}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / run_folder.EVENTS).read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.distributed
@pytest.mark.parametrize("mode", list(MODES))
def test_it_resumes_bit_for_bit_beside_a_base_that_trains_on(mode: str, folder: Path) -> None:
    run_ranks(finetune, 1, words_of(folder, folder / "unbroken", mode))
    broken = folder / "broken"
    run_ranks(finetune, 1, words_of(folder, broken, mode))
    shutil.rmtree(broken / run_folder.CHECKPOINTS / "step-00000004")
    (broken / run_folder.SUCCESS).unlink()
    config = tiny_config(data={"tokenizer": str(folder / "base/tokenizer.model")})
    write_model(tiny_model(config, seed=1), config, folder / "base/checkpoints", step=9)
    run_ranks(finetune, 1, words_of(folder, broken, mode))
    expected, found = weights_at(folder / "unbroken", 4), weights_at(broken, 4)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert [event["step"] for event in events(broken, "start")] == [0, 2]
    scores = [event["answers"] for event in events(broken, "evaluate")]
    assert scores and all(0 <= value <= 1 for each in scores for value in each.values())
    write_pairs(folder / "pairs.jsonl", word="elsewhere")
    (broken / run_folder.SUCCESS).unlink()
    with pytest.raises(ConfigError, match=r"the records of .*pairs\.jsonl are not those"):
        run_ranks(finetune, 1, [*words_of(folder, broken, mode), "--training.train_steps", "6"])


def answers_of(run: Path) -> list[Any]:
    """Return prompts and answers of each validation."""
    return [json.loads(line) for line in (run / ANSWERS).read_text().splitlines()]


def require_answers_of_its_checkpoint(run: Path) -> None:
    prompts, answers = answers_of(run)[-1]
    model = load_text_model(run)
    longest = max(len(model.tokenizer.encode(" there" * (k + 1))) for k in range(3))
    limit = min(round(MORE_THAN_LONGEST * longest) + 1, model.config.data.decoder_seq_length)
    assert len(answers) == 7 and len(set(map(tuple, prompts))) == 7
    assert written(model, prompts, limit) == answers and len(set(answers)) > 1


@pytest.mark.distributed
def test_answers_are_those_of_the_checkpoint_whatever_the_layout(folder: Path) -> None:
    layout = ["--parallel.tensor_parallel_size", "2", "--parallel.pipeline_parallel_size", "2"]
    run_ranks(finetune, 4, [*words_of(folder, folder / "run", "whole"), "--training.train_steps", "2", *layout])
    require_answers_of_its_checkpoint(folder / "run")


@pytest.mark.distributed
def test_adapters_answer_too_and_train_on_under_another_layout_after_a_journey_to_peft(folder: Path) -> None:
    run = folder / "run"
    run_ranks(finetune, 2, [*words_of(folder, run, "lora"), "--training.train_steps", "2"], 3)
    require_answers_of_its_checkpoint(run)
    with open_whole(newest_whole(run)) as source:
        assert isinstance(source, AdaptedReader)
        write_adapters(folder / "peft", source)
    import_adapters(folder / "peft", folder / "imported", folder / "base")
    words = words_of(folder, folder / "on", "whole")
    words[1] = str(folder / "imported")
    run_ranks(finetune, 2, [*words, "--training.train_steps", "1", "--parallel.tensor_parallel_size", "2"])
    first, last = answers_of(folder / "on")[0], answers_of(run)[-1]
    assert dict(zip(map(tuple, first[0]), first[1], strict=True)) == dict(
        zip(map(tuple, last[0]), last[1], strict=True)
    )
    trained = weights_at(folder / "on", 1)
    before = weights_at(run, 2)
    assert trained.keys() == before.keys() and any(not torch.equal(trained[name], before[name]) for name in trained)


def finetune_and_count_readings(words: list[str], kept_bytes: int) -> None:
    """Leave in the run folder how often the base was opened to answer."""
    from megatron_omega.tasks import answering

    opened: list[Path] = []
    real = answering.open_checkpoint
    answering.open_checkpoint = lambda path: opened.append(path) or real(path)
    answering.KEPT_BYTES = kept_bytes
    finetune(words)
    run = words[words.index("--logging.run_directory") + 1]
    (Path(run) / "readings.json").write_text(json.dumps(len(opened)))


@pytest.mark.distributed
def test_what_is_trained_whole_beside_adapters_answers_too_and_trains_on_but_does_not_go_to_peft(folder: Path) -> None:
    run = folder / "run"
    run_ranks(finetune, 2, [*words_of(folder, run, "more"), "--training.train_steps", "2"], 3)
    require_answers_of_its_checkpoint(run)
    words = words_of(folder, folder / "on", "whole")
    words[1] = str(run)
    run_ranks(finetune, 2, [*words, "--training.train_steps", "1", "--parallel.tensor_parallel_size", "2"])
    first, last = answers_of(folder / "on")[0], answers_of(run)[-1]
    assert dict(zip(map(tuple, first[0]), first[1], strict=True)) == dict(
        zip(map(tuple, last[0]), last[1], strict=True)
    )
    with (
        open_whole(newest_whole(run)) as source,
        pytest.raises(CheckpointError, match=r"lora\.also=\[table, vectors\]"),
    ):
        assert isinstance(source, AdaptedReader)
        write_adapters(folder / "peft", source)
    assert not (folder / "peft").exists()


@pytest.mark.distributed
def test_a_base_that_may_be_kept_is_read_once(folder: Path) -> None:
    found = {}
    for kept in (1 << 30, 0):
        run = folder / f"kept-{kept}"
        run_ranks(finetune_and_count_readings, 1, words_of(folder, run, "lora"), kept)
        found[json.loads((run / "readings.json").read_text())] = answers_of(run)
    (once, answers), (often, again) = sorted(found.items())
    assert once == 1 and often == len(again) == 3 and answers == again
    require_answers_of_its_checkpoint(folder / "kept-0")


SCORES = (0.2, 0.3, 0.9, 0.1, 0.8, 0.4)
"""Of the validations before the first step and after each."""


def finetune_with_scores(words: list[str]) -> None:
    """Fine-tune; what answers are worth is told beforehand."""
    from megatron_omega.run.train import train

    place = complete_environment()
    arguments = parse_arguments(words)
    overrides = (*arguments.overrides, read_tasks(arguments.tasks or ""))
    run = as_finetuning(replace(arguments, tasks=None, overrides=overrides), place.world_size)
    values = iter(SCORES)
    train(resolve_run(run.arguments, place.world_size), place, answering=lambda _: lambda _: {"a f1": next(values)})


@pytest.mark.distributed
def test_the_best_checkpoint_by_its_answers_stays_while_later_ones_come_and_go(folder: Path) -> None:
    words = [*words_of(folder, folder / "run", "whole"), "--training.train_steps", "5"]
    words += ["--evaluation.interval_steps", "1", "--checkpoint.interval_steps", "1", "--checkpoint.keep_last", "1"]
    run_ranks(finetune_with_scores, 1, words)
    reports = {event["step"]: event for event in events(folder / "run", "evaluate")}
    assert tuple(reports[step]["score"] for step in range(6)) == SCORES
    saved = [event["saved_step"] for event in events(folder / "run", "checkpoint")]
    kept = sorted(path.name for path in (folder / "run" / run_folder.CHECKPOINTS).glob("step-*"))
    assert saved == [1, 2, 3, 4, 5] and kept == ["step-00000002", "step-00000005"]
    assert min(range(6), key=lambda step: reports[step]["loss"]) != 2  # by its loss it would be another one


def test_what_cannot_be_started_is_said(folder: Path) -> None:
    (folder / "export").mkdir()
    (folder / "export/omega.json").write_text('{"format": "megatron-omega-export"}')
    words = words_of(folder, folder / "run", "whole")
    words[1] = str(folder / "export")
    arguments = parse_arguments(words)
    with pytest.raises(CheckpointError, match="import-hf"):
        as_finetuning(replace(arguments, overrides=(*arguments.overrides, read_tasks(str(folder / "pairs.jsonl")))), 1)
