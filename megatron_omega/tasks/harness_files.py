"""Task files of lm-evaluation-harness, as far as they are data: YAML, Jinja templates, records. Needs no harness.

What such a file asks is asked as the harness asks it (its version 0.4): prompts, delimiters, choices, stop strings and
metrics are the same, so both find the same figures. What only code can say (`!function`, process_docs, filters) is
refused; `megatron-omega lm-eval` runs the harness itself. Templates run in Jinja's sandbox.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_omega.config import yaml_text
from megatron_omega.data.pairs.records import open_records
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import read_text
from megatron_omega.tasks.questions import Asking, Choice, Exam, Question, text_asked

METRICS: dict[str, dict[str, str]] = {
    "multiple_choice": {"acc": "accuracy", "acc_norm": "accuracy", "acc_bytes": "accuracy"},
    "generate_until": {"exact_match": "same", "bleu": "bleu", "chrf": "chrf"},
    "loglikelihood": {"acc": "greedy", "perplexity": "perplexity"},
    "loglikelihood_rolling": {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
}
"""Output type -> its metrics, and what they are called here."""
DEFAULTS = {
    "multiple_choice": ("accuracy",), "generate_until": ("same",), "loglikelihood": ("perplexity", "greedy"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}  # fmt: skip
_LISTS = {"json": ".jsonl", "parquet": ".parquet", "arrow": ".arrow"}
_SAYS_NOTHING = {
    "task_alias", "tag", "group", "metadata", "should_decontaminate", "doc_to_decontamination_query", "dataset_name",
    "repeats", "process_docs", "filter_list", "include", "gen_prefix", "process_results", "use_prompt",
}  # fmt: skip
_NEEDS_HARNESS = ("process_docs", "filter_list", "include", "gen_prefix", "process_results", "use_prompt")
_NEW_TOKENS = 256
Record = Mapping[str, Any]


@dataclass(frozen=True)
class HarnessFile:
    """What a task file says."""

    task: str
    dataset_path: str
    folder: Path
    output_type: str = "generate_until"
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    fewshot_config: Mapping[str, Any] = field(default_factory=dict)
    num_fewshot: int = 0
    description: str = ""
    doc_to_text: str = ""
    doc_to_target: Any = ""
    doc_to_choice: Any = None
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    metric_list: Sequence[Mapping[str, Any]] = ()
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)


def is_harness_file(values: Any) -> bool:
    """Tell whether what a YAML file says is a task of lm-evaluation-harness."""
    return isinstance(values, Mapping) and ("dataset_path" in values or "output_type" in values)


def read_harness_file(path: Path) -> HarnessFile:
    """Read a task file. Raises DataError with everything in it that this reader cannot do."""
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a task file") from None
    if "!function" in text:
        raise DataError(f"{path} {_only('!function')}")
    values = yaml_text.parse(text, str(path))
    if not isinstance(values, Mapping):
        raise DataError(f"{path} holds no task; begin it with `task: NAME`")
    known = set(HarnessFile.__dataclass_fields__) - {"folder"}
    findings = [f"{path} {_only(name)}" for name in _NEEDS_HARNESS if values.get(name)]
    findings += [f"{path} has {name}, which is no field of a task" for name in set(values) - known - _SAYS_NOTHING]
    findings += [f"{path} has no {name}; give it one" for name in ("task", "dataset_path") if not values.get(name)]
    if (kind := values.get("output_type", "generate_until")) not in METRICS:
        findings.append(f"{path} has output_type {kind}; use {', '.join(METRICS)}")
    if values.get("repeats", 1) != 1:
        findings.append(f"{path} {_only('repeats')}")
    if findings:
        raise DataError(*findings)
    given = {name: value for name, value in values.items() if name in known and value is not None}
    return HarnessFile(folder=path.parent, **given)


def _only(what: str) -> str:
    return f"uses {what}, which only lm-evaluation-harness itself can run: megatron-omega lm-eval --tasks NAME"


def harness_exam(file: HarnessFile, tokenizer: Tokenizer, asking: Asking) -> Exam:
    """Return the exam that a task file describes. Raises DataError if its records or templates are wrong."""
    docs = _Docs(file)
    split = file.test_split or file.validation_split
    if split is None:
        raise DataError(f"{file.task} has neither test_split nor validation_split; name one")
    records = docs.of(split)
    if asking.limit is not None:
        records = records[: asking.limit]
    shots = asking.shots or file.num_fewshot
    pool = docs.of(_shot_split(file, split)) if shots else []
    examples = _Examples(file, docs, pool, shots, asking.seed)
    questions = tuple(
        _question(file, docs, record, examples.before(record), tokenizer, f"{file.task}:{number}")
        for number, record in enumerate(records, start=1)
    )
    until = file.generation_kwargs.get("until", [file.fewshot_delimiter])
    most = int(file.generation_kwargs.get("max_gen_toks", _NEW_TOKENS))
    stop = tuple([until] if isinstance(until, str) else until)
    return Exam(file.task, _metrics(file), questions, most, stop, shots)


def _shot_split(file: HarnessFile, asked: str) -> str:
    return (
        file.fewshot_config.get("split") or file.fewshot_split or file.training_split or file.validation_split or asked
    )


def _metrics(file: HarnessFile) -> tuple[str, ...]:
    known, found, findings = METRICS[file.output_type], list[str](), list[str]()
    for one in file.metric_list:
        name = one.get("metric")
        options = {
            key for key, value in one.items() if key not in ("metric", "aggregation", "higher_is_better") and value
        }
        if name not in known or options:
            what = f"metric {name}" + (f" with {', '.join(sorted(options))}" if options else "")
            findings.append(f"{file.task} ({file.output_type}) {_only(what)}")
        elif known[name] not in found:
            found.append(known[name])
    if findings:
        raise DataError(*findings)
    return tuple(found) or DEFAULTS[file.output_type]


class _Docs:
    """The records of a task, and what its templates make of one."""

    def __init__(self, file: HarnessFile) -> None:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        self._file = file
        self._jinja = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

    def of(self, split: str) -> list[Record]:
        """Return the records of a split."""
        found: list[Record] = []
        for path in self._paths(split):
            for part in open_records(path, split):
                for number, record in enumerate(part.records, start=1):
                    if not isinstance(record, Mapping):
                        raise DataError(f"{part.place}:{number} {record.reason}; mend it or leave it out")
                    found.append(record)
        if not found:
            raise DataError(f"{self._file.task} has no records in its split {split}")
        return found

    def _paths(self, split: str) -> list[str]:
        file = self._file
        if file.dataset_path not in _LISTS:
            return [file.dataset_path]
        files = file.dataset_kwargs.get("data_files", ())
        found = files.get(split) if isinstance(files, Mapping) else files if split == "train" else None
        paths = [found] if isinstance(found, str) else list(found or ())
        if not paths:
            raise DataError(f"{file.task} has no dataset_kwargs.data_files for its split {split}; name its files")
        return [path if Path(path).exists() else str(file.folder / path) for path in paths]

    def render(self, template: str, record: Record) -> str:
        """Return a field of that name, or the template of the record."""
        from jinja2 import TemplateError

        if template in record:
            return record[template]
        try:
            return self._jinja.from_string(template).render(**record)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{self._file.task}: the template {template!r} fails ({error}); mend it") from None

    def choices(self, record: Record) -> list[str]:
        """Return the choices of a record."""
        said = self._file.doc_to_choice
        if isinstance(said, Mapping):
            return [str(choice) for choice in said.values()]
        if isinstance(said, str):
            said = self.render(said, record)
            said = _literal(said) if isinstance(said, str) else said
        if not isinstance(said, Sequence) or isinstance(said, str):
            raise DataError(f"{self._file.task}: doc_to_choice gives {said!r}, which is no list of choices")
        return [str(choice) for choice in said]

    def target(self, record: Record) -> Any:
        """Return the target: a text, the number of a choice, or several texts."""
        said = self._file.doc_to_target
        if not isinstance(said, str):
            return said
        found = self.render(said, record)
        if said in record or not isinstance(found, str):
            return found
        if found.isdigit() and self._file.doc_to_choice is not None:
            return int(found)
        return _literal(found) if found[:1] == "[" and found[-1:] == "]" else found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text


class _Examples:
    """What stands before a question: the description, and examples."""

    def __init__(self, file: HarnessFile, docs: _Docs, pool: Sequence[Record], shots: int, seed: int) -> None:
        self._file, self._docs, self._pool, self._shots = file, docs, pool, shots
        self._draw = random.Random(seed)
        if shots > len(pool):
            raise DataError(f"{file.task} has {len(pool)} records for examples, {shots} are asked for; ask for fewer")

    def before(self, record: Record) -> str:
        """Return the text before the question of `record`."""
        pool = [one for one in self._pool if one != record]
        takes_first = self._file.fewshot_config.get("sampler") == "first_n"
        shown = pool[: self._shots] if takes_first else self._draw.sample(pool, min(self._shots, len(pool)))
        start = self._docs.render(self._file.description, record) if self._file.description else ""
        return start + "".join(map(self._turn, shown))

    def _turn(self, record: Record) -> str:
        file, target = self._file, self._docs.target(record)
        if file.doc_to_choice is not None and isinstance(target, int):
            target = self._docs.choices(record)[target]
        target = target[0] if isinstance(target, list) else target
        return f"{self._docs.render(file.doc_to_text, record)}{file.target_delimiter}{target}{file.fewshot_delimiter}"


def _question(
    file: HarnessFile, docs: _Docs, record: Record, before: str, tokenizer: Tokenizer, source: str
) -> Question:
    target = docs.target(record)
    if file.output_type == "loglikelihood_rolling":
        return Question(source, str(target)[:60], str(target), (), tuple(tokenizer.encode(str(target))))
    prompt = docs.render(file.doc_to_text, record)
    if file.output_type != "multiple_choice":
        target = str(target[0] if isinstance(target, list) else target)
        said = target if file.output_type == "loglikelihood" else f"{file.target_delimiter}{target}"
        context = tuple(tokenizer.encode(before + prompt))
        asked = text_asked(tokenizer, before + prompt, said)
        if file.output_type == "loglikelihood":
            context = asked.context
        return Question(source, prompt, target, context, asked.continuation)
    choices = docs.choices(record)
    right = choices.index(target) if isinstance(target, str) and target in choices else target
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"{source} has the target {target!r}, which is none of its {len(choices)} choices")
    asked = [text_asked(tokenizer, before + prompt, f"{file.target_delimiter}{choice}") for choice in choices]
    options = tuple(Choice(choice, one.continuation) for choice, one in zip(choices, asked, strict=True))
    return Question(source, prompt, choices[right], asked[0].context, asked[right].continuation, (), options, right)
