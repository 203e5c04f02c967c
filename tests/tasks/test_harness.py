"""lm-evaluation-harness, through the adapter, finds what `score` finds in the same task files; and its HF class, too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from export.export_cases import write_case
from task_parts import records, write_records
from written_models import TEXT

from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.tasks.harness_files import harness_exam, read_harness_file
from megatron_omega.tasks.likelihood import Asked, likelihoods
from megatron_omega.tasks.questions import Asking, text_asked
from megatron_omega.tasks.scoring import score

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra harness)")

TASKS: dict[str, dict[str, Any]] = {
    "quiz_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "gold",
        "doc_to_choice": "options", "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "quiz_shots": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{gold}}", "num_fewshot": 2,
        "doc_to_choice": "{{options}}", "fewshot_config": {"sampler": "first_n"}, "description": "Short quiz.\n",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    },
    "quiz_write": {
        "output_type": "generate_until", "doc_to_text": "{{question}} Answer:", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}, {"metric": "chrf"}],
    },
    "quiz_last": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}} ", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "quiz_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}  # fmt: skip
OURS = {"acc": "accuracy", "acc_bytes": "accuracy_byte", "acc_norm": "accuracy_character", "exact_match": "same"}
"""The harness's columns -> ours."""


def write_harness_tasks(folder: Path) -> Path:
    """Write task files, and records whose texts are longer than the model reads at once."""
    folder.mkdir(parents=True)
    found = [one | {"text": TEXT[number % 2] * (1 + number)} for number, one in enumerate(records(8, 3))]
    files = {"train": str(write_records(folder / "train.jsonl", records(6, 4)))}
    files["test"] = str(write_records(folder / "test.jsonl", found))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": "train", "test_split": "test", "metadata": {"version": 1},
    }  # fmt: skip
    for name, task in TASKS.items():
        files_here = (
            common
            if "fewshot_config" in task
            else common
            | {
                "training_split": None,
                "dataset_kwargs": {"data_files": {"test": files["test"]}, "cache_dir": str(folder / "cache")},
            }
        )
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files_here, **task}))
    return folder


def by_harness(model: Any, folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the figures of the harness: task -> metric -> value."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False)
    return {
        task: {
            key.partition(",")[0]: value
            for key, value in values.items()
            if key.endswith(",none") and "stderr" not in key
        }
        for task, values in found["results"].items()
    }


def by_us(model: TextModel, folder: Path, name: str) -> dict[str, float]:
    exam = harness_exam(read_harness_file(folder / f"{name}.yaml"), model.tokenizer, Asking())
    return {key: mean.value for key, mean in score(model, exam, name="m").metrics.items()}


@pytest.mark.parametrize("case", ["omega", "llama-like"])
def test_the_adapter_finds_what_we_find(case: str, tmp_path: Path) -> None:
    from megatron_omega.tasks.harness import OmegaLM

    export, _ = write_case(case, tmp_path / "run")
    folder = write_harness_tasks(tmp_path / "tasks")
    model = load_text_model(tmp_path / "run")
    make: Any = OmegaLM
    found = by_harness(make(checkpoint=str(export)), folder, list(TASKS))
    for name, values in found.items():
        ours = by_us(model, folder, name)
        values = {key: value for key, value in values.items() if isinstance(value, float)}
        assert len(values) >= len(TASKS[name]["metric_list"]), values
        for key, value in values.items():
            mine = ours["greedy" if name == "quiz_last" and key == "acc" else OURS.get(key, key)]
            if key.endswith("perplexity"):  # exp of up to 90 nats here, which are what is to be equal
                mine, value = math.log(mine), math.log(value)
            assert mine == pytest.approx(value, rel=1e-6), (name, key)
    assert found["quiz_text"]["bits_per_byte"] > 1


@pytest.mark.parametrize(("case", "backend"), [("omega", "seq2seq"), ("llama-like", "causal")])
def test_what_transformers_class_of_the_harness_finds(case: str, backend: str, tmp_path: Path) -> None:
    """Choices and what follows a context are as ours; whole texts are not."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    export, _ = write_case(case, tmp_path / "run")
    folder = write_harness_tasks(tmp_path / "tasks")
    model = load_text_model(tmp_path / "run")
    load: Any = HFLM
    rival = load(
        pretrained=str(export), backend=backend, trust_remote_code=True, dtype="float32", batch_size=4, device="cpu"
    )
    found = by_harness(rival, folder, ["quiz_choice", "quiz_last"])
    choice, last = by_us(model, folder, "quiz_choice"), by_us(model, folder, "quiz_last")
    for key in ("acc", "acc_norm", "acc_bytes"):
        assert choice[OURS[key]] == found["quiz_choice"][key]
    assert math.log(last["perplexity"]) == pytest.approx(math.log(found["quiz_last"]["perplexity"]), rel=1e-6)
    pairs = [("The quick", " brown fox"), ("über den ", "Deich")]
    asked: list[Any] = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    ours = likelihoods(model, [text_asked(model.tokenizer, *pair) for pair in pairs])
    for (nats, _), mine in zip(rival.loglikelihood(asked, disable_tqdm=True), ours, strict=True):
        assert mine.nats == pytest.approx(float(nats), rel=1e-6)
    whole: Any = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT[0],), idx=0)
    (theirs,) = rival.loglikelihood_rolling([whole], disable_tqdm=True)
    mine = likelihoods(model, [Asked((), tuple(model.tokenizer.encode(TEXT[0])))])[0].nats
    assert mine != pytest.approx(float(theirs), rel=1e-6)  # once it is the same, docs/likelihoods.md has a line less
