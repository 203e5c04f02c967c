"""Questions are made of pairs as training reads them; choices, texts and masks are measured as they are defined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from task_parts import DECODER_ONLY, WORDS, records, text_model, write_model_folder, write_records, write_tasks
from tiny import run_python
from written_models import TEXT, tiny_tokenizer

from megatron_omega.commands import score as command
from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import RunConfig, Task
from megatron_omega.data.batch import stack
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.studies.held_out import masked_logits
from megatron_omega.tasks.harness_files import harness_exam, read_harness_file
from megatron_omega.tasks.likelihood import Asked, likelihoods
from megatron_omega.tasks.questions import Asking, Exam, exams_of, held_out
from megatron_omega.tasks.scoring import choose, guesses, score
from megatron_omega.tasks.texts import masked_metrics, masked_pieces, text_exam


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(model: TextModel, folder: Path) -> RunConfig:
    path = folder / "tokenizer.model"
    path.write_bytes(tiny_tokenizer().model)
    data = model.config.data.model_copy(update={"tokenizer": str(path)})
    return model.config.model_copy(update={"data": data})


def tasks_in(path: Path) -> list[Task]:
    return [Task.model_validate(one) for one in yaml.safe_load(path.read_text())]


@torch.inference_mode()
def packed_loss(model: TextModel, config: RunConfig, tasks: list[Task]) -> float:
    """The loss of training's own forward pass over packed rows of the held-out pairs."""
    (held,) = held_out(config, tasks)[1]
    batch = stack([held.build(row, 0)[0] for row in range(len(held))])
    streams = [batch.decoder_ids, batch.decoder_segments]
    streams = [batch.encoder_ids, batch.encoder_segments, *streams] if held.fit.has_encoder else streams
    labels = [torch.from_numpy(part) for part in (batch.lm_labels, batch.mlm_labels)]
    model.model(tuple(map(torch.from_numpy, streams)), (*labels, torch.ones(2), torch.empty(0, dtype=torch.long)))
    return float(model.model.loss_parts["lm_loss"]) / float((batch.lm_labels != IGNORED_LABEL).sum())


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("sections", [{}, DECODER_ONLY], ids=["encoder-decoder", "decoder-only"])
def test_the_loss_is_that_of_a_validation(sections: dict[str, Any], tmp_path: Path) -> None:
    model = text_model(**sections)
    config, tasks = config_of(model, tmp_path), tasks_in(write_tasks(tmp_path, metrics=["accuracy"]))
    (exam,) = exams_of(config, tasks, model.tokenizer, Asking())
    found = score(model, exam, name="m")
    assert found.loss == pytest.approx(packed_loss(model, config, tasks), rel=1e-6)
    assert found.loss == pytest.approx(
        -sum(one.log_probability for one in found.answers) / sum(len(one.target) for one in exam.questions)
    )


@pytest.mark.usefixtures("_own_cache")
def test_a_choice_is_made_by_sum_by_token_and_by_byte(tmp_path: Path) -> None:
    model = text_model()
    (exam,) = exams_of(config_of(model, tmp_path), tasks_in(write_tasks(tmp_path)), model.tokenizer, Asking(shots=1))
    encode = model.tokenizer.encode
    picked = choose(model, exam.questions)
    for question, made, record in zip(exam.questions, picked, records(10, 2), strict=True):
        assert [choice.text for choice in question.choices] == [f" {option}" for option in record["options"]]
        assert question.right == record["gold"]
        nats = []
        for option in record["options"]:
            nats.append(likelihoods(model, [Asked(question.context, tuple(encode(f" {option}")))])[0].nats)
        sizes = [[1] * 4, [len(encode(f" {option}")) for option in record["options"]]]
        sizes.append([len(f" {option}".encode()) for option in record["options"]])
        sizes.append([len(f" {option}") for option in record["options"]])
        assert made == tuple(int(np.argmax(np.array(nats) / size)) for size in sizes)
    found = score(model, exam, name="m").metrics
    rights = [question.right for question in exam.questions]
    for column, name in enumerate(("accuracy", "accuracy_token", "accuracy_byte", "accuracy_character")):
        assert found[name].value == np.mean([made[column] == right for made, right in zip(picked, rights, strict=True)])
    assert len(set(picked)) > 1 and len({one[0] == one[1] for one in picked}) == 2


@pytest.mark.usefixtures("_own_cache")
def test_examples_stand_where_they_are_asked_for(tmp_path: Path) -> None:
    model, path = text_model(), write_tasks(tmp_path)
    config, tasks = config_of(model, tmp_path), tasks_in(path)

    def exam(**asking: Any) -> Exam:
        return exams_of(config, tasks, model.tokenizer, Asking(**asking))[0]

    none, encoder = exam().questions[0], exam(shots=2).questions[0]
    decoder, both = exam(shots=2, stream="decoder").questions[0], exam(shots=2, stream="both").questions[0]
    prompt, examples = none.context, both.before
    assert encoder.context == both.context == (*examples, *prompt) and decoder.context == prompt
    assert decoder.before == examples and not encoder.before and not none.before
    text = model.tokenizer.decode(examples)
    shown = [one for one in records(12, 1) if one["question"] in text]
    assert len(shown) == 2 and all(f"{one['question']} {one['answer']}\n\n" in text for one in shown)
    assert exam(shots=2) == exam(shots=2) != exam(shots=2, seed=1)
    assert len(exam(limit=3).questions) == 3


@pytest.mark.usefixtures("_own_cache")
def test_guesses_know_training_alone(tmp_path: Path) -> None:
    model = text_model()
    path = write_tasks(tmp_path, metrics=["exact_match", "accuracy"])
    (exam,) = exams_of(config_of(model, tmp_path), tasks_in(path), model.tokenizer, Asking())
    frequent, first = guesses(exam)
    assert {one.answer for one in frequent.answers} == {exam.train[0]}
    assert all(one.prompt.startswith(one.answer) for one in first.answers)
    assert set(frequent.metrics) == {"exact_match", "accuracy"} and set(first.metrics) == {"exact_match"}


def test_a_text_is_measured_whole() -> None:
    model = text_model()
    texts = [TEXT[0] * 4, TEXT[-1] * 3, "Ü"]
    found = score(model, text_exam(model, "a.txt", texts), name="m")
    nats = -sum(
        one.nats for one in likelihoods(model, [Asked((), tuple(model.tokenizer.encode(text))) for text in texts])
    )
    num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split(" ")) for text in texts)
    assert found.metrics["bits_per_byte"].value == pytest.approx(nats / num_bytes / math.log(2))
    assert found.metrics["byte_perplexity"].value == pytest.approx(math.exp(nats / num_bytes))
    assert found.metrics["word_perplexity"].value == pytest.approx(math.exp(nats / words))


def test_masked_tokens_are_found_as_the_model_finds_them() -> None:
    model = text_model()
    pieces = masked_pieces(model, [*TEXT[:3], TEXT[-1] * 6, "x"])
    assert max(len(piece.ids) for piece in pieces) == 95
    hits, losses = [], []
    for piece in pieces:
        ids, chosen = np.array([piece.ids]), np.zeros((1, len(piece.ids)), dtype=bool)
        chosen[0, list(piece.places)] = True
        logits = masked_logits(model.model, ids, chosen, model.tokenizer.special)
        wanted = torch.from_numpy(ids[chosen])
        hits += (logits.argmax(-1) == wanted).tolist()
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    found = masked_metrics(model, pieces)
    assert found["masked_accuracy"].value == pytest.approx(np.mean(hits))
    assert found["masked_loss"].value == pytest.approx(np.mean(losses), rel=1e-6)
    assert len(losses) == sum(len(piece.places) for piece in pieces)


@pytest.mark.usefixtures("_own_cache")
def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    run = write_model_folder(tmp_path / "run")
    bad = [{"question": "?", "options": ["a", "b"], "answer": "c"}, {"question": "?", "options": ["a"], "answer": "a"}]
    good = write_tasks(tmp_path)
    task = yaml.safe_load(good.read_text())[0] | {"validation": str(write_records(tmp_path / "bad.jsonl", bad))}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump([task]))
    (tmp_path / "empty.txt").write_text("")
    words = ["--checkpoint", str(run), "--tasks", str(tmp_path / "bad.yaml"), "--text", str(tmp_path / "empty.txt")]
    with pytest.raises(DataError) as caught:
        command.main(words)
    findings = "\n".join(caught.value.findings)
    assert "bad.jsonl:1 has a target that is none of its choices" in findings
    assert "bad.jsonl:2 has 1 choices" in findings and "empty.txt" in findings
    (tmp_path / "kind.yaml").write_text(yaml.safe_dump([task | {"choices": [], "metrics": ["accuracy"]}]))
    with pytest.raises(ConfigError, match="has no choices"):
        command.main(["--checkpoint", str(run), "--tasks", str(tmp_path / "kind.yaml")])


@pytest.mark.distributed
def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    run = write_model_folder(tmp_path / "run")
    tasks = write_tasks(tmp_path, metrics=["accuracy", "exact_match", "chrf"])
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 8))
    words = ["score", "--checkpoint", run, "--tasks", tasks, "--text", tmp_path / "a.txt", "--shots", "1", "--json"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    alone = run_python("-m", "megatron_omega", *words, **cache)
    ranks = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "megatron_omega", *words, **cache,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert ranks.returncode == 0, ranks.stderr
    assert len(alone.stdout.splitlines()) == 4
    assert alone.stdout == ranks.stdout


HARNESS_FILE = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: held.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: options
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("process_docs: !function utils.f", "uses !function, which only lm-evaluation-harness itself can run"),
        ("filter_list: [{name: x}]", "uses filter_list, which only lm-evaluation-harness"),
        ("colour: blue", "has colour, which is no field of a task"),
        ("output_type: dance", "has output_type dance; use multiple_choice"),
        ("metric_list: [{metric: f1}]", "uses metric f1, which only"),
        ("test_split: null", "has neither test_split nor validation_split"),
        ("test_split: dev", "has no dataset_kwargs.data_files for its split dev"),
        ('doc_to_text: "{{missing}}"', "the template '{{missing}}' fails"),
        ('doc_to_text: "{{ question.__class__.__mro__[1].__subclasses__() }}"', "fails"),
        ("doc_to_target: question", "which is none of its 4 choices"),
        ("num_fewshot: 100", "has 10 records for examples, 100 are asked for"),
    ],
)
def test_a_harness_file_that_is_no_data_is_refused_by_name(change: str, reason: str, tmp_path: Path) -> None:
    write_records(tmp_path / "held.jsonl", records(10, 2))
    name = change.partition(":")[0]
    kept = [line for line in HARNESS_FILE.splitlines() if not line.startswith(f"{name}:")]
    path = tmp_path / "quiz.yaml"
    path.write_text("\n".join([*kept, change]))
    with pytest.raises(DataError) as caught:
        harness_exam(read_harness_file(path), tiny_tokenizer(), Asking())
    assert reason in str(caught.value)
    path.write_text(HARNESS_FILE)
    assert len(harness_exam(read_harness_file(path), tiny_tokenizer(), Asking()).questions) == 10
