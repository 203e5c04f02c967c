"""Measure how well a model answers and what it knows of texts, on tasks, on harness files, on text files.

    megatron-omega score --checkpoint runs/omega-tiny-finetuned                 on what its own run held out
    megatron-omega score --checkpoint runs/omega-tiny --tasks tasks.yaml --shots 4 --limit 200
    megatron-omega score --checkpoint runs/omega-tiny --tasks arc.yaml --text book.txt notes.jsonl
    torchrun --nproc-per-node 2 -m megatron_omega score ...                     each rank a share of the questions

The model may be a checkpoint of any layout, an export, or adapters, which are merged into their base. Answers are
generated greedily, all together; choices are compared by likelihood. --text gives bits per byte, perplexities and what
the MLM head finds. Task files of lm-evaluation-harness are read as they are. Intervals hold 95% of the values of
resampled questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_omega.config import yaml_text
from megatron_omega.config.check.data import metrics as wrong_metrics
from megatron_omega.config.schema import DataConfig, Task
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.regular_files import read_text
from megatron_omega.log import configure_logging
from megatron_omega.tasks.finetuning import read_tasks

if TYPE_CHECKING:
    from megatron_omega.export.loading import TextModel
    from megatron_omega.tasks.questions import Exam
    from megatron_omega.tasks.scoring import Score
    from megatron_omega.tasks.sharing import Share

_MOST_RECORD_BYTES = 1 << 30
STREAMS = ("encoder", "decoder", "both")


def takes_questions(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is asked."""
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="RECORDS|YAML", help="as for finetune, or files of lm-evaluation-harness "
        "(default: those of the model's run)")  # fmt: skip
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts: plain, or records with a field text")
    add("--shots", type=int, default=0, help="training pairs shown before each prompt (default 0)")
    add("--shots-in", choices=STREAMS, default="encoder", help="where examples stand (default encoder)")
    add("--limit", type=int, help="questions of each task, drawn by seed (default: all)")
    add("--seed", type=int, default=0, help="of the questions and examples that are drawn (default 0)")
    add("--device", default="cpu", help="where the model runs (default cpu)")


def check_questions(arguments: argparse.Namespace) -> None:
    """Raise ConfigError where an option has no sense."""
    findings = [
        f"--{name} {value} must be {least} or more"
        for name, value, least in (("shots", arguments.shots, 0), ("limit", arguments.limit, 1))
        if value is not None and value < least
    ]
    if findings:
        raise ConfigError(*findings)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    takes_questions(parser)
    parser.add_argument("--examples", type=int, default=3, help="answers of each task to print (default 3)")
    parser.add_argument("--tokenizer", help="SentencePiece model (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, with every answer")
    arguments = parser.parse_args(argv)
    check_questions(arguments)
    return arguments


def tasks_of(names: Sequence[str], own: Sequence[Task]) -> tuple[list[Task], list[Path]]:
    """Return the tasks that were named, else those of the model's run; and the files of lm-evaluation-harness."""
    if not names:
        if not own:
            raise ConfigError("the model's run had no tasks; give --tasks (records, or a YAML list of tasks)")
        return list(own), []
    tasks: list[Task] = []
    files: list[Path] = []
    findings: list[str] = []
    for name in names:
        if is_harness_name(name):
            files.append(Path(name))
            continue
        try:
            tasks += _validated(name)
        except ConfigError as error:
            findings += error.findings
    if findings := [*findings, *wrong_metrics(tasks)]:
        raise ConfigError(*findings)
    return tasks, files


def is_harness_name(name: str) -> bool:
    """Tell whether --tasks names a file of lm-evaluation-harness."""
    from megatron_omega.tasks.harness_files import is_harness_file

    if not name.endswith((".yaml", ".yml")):
        return False
    try:
        text = read_text(name)
    except OSError:
        return False  # whoever reads it says why
    return "!function" in text or is_harness_file(yaml_text.parse(text, name))


def _validated(name: str) -> tuple[Task, ...]:
    from pydantic import ValidationError

    values = yaml_text.parse(read_tasks(name).text, f"--tasks {name}")
    try:
        return DataConfig.model_validate({"tasks": values}).tasks
    except ValidationError as error:
        raise ConfigError(
            *(f"--tasks {name}: {'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        ) from None


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file: all of a plain one, the field `text` of every record."""
    from megatron_omega.corpus.inputs import read_unit, units_of
    from megatron_omega.corpus.reading.finding import expand_inputs
    from megatron_omega.corpus.reading.records import BadRecord, Document

    found: list[str] = []
    for number, file in enumerate(expand_inputs([str(path)])):
        for unit in units_of(number, file, 1 << 62):
            for record in read_unit(file, unit, ("text",), _MOST_RECORD_BYTES):
                if isinstance(record, BadRecord):
                    raise DataError(f"{file.path}, record {record.position + 1}: {record.reason}; mend or remove it")
                found += [text for text in record.texts if text] if isinstance(record, Document) else []
    if not found:
        raise DataError(f"{path} has no text to measure on; name a file that has some")
    return found


def asked_of(arguments: argparse.Namespace, model: TextModel) -> tuple[list[Exam], dict[str, list[str]]]:
    """Return all exams, with one for each text file, and the texts. Raises everything that is wrong, at once."""
    from megatron_omega.tasks.harness_files import harness_exam, read_harness_file
    from megatron_omega.tasks.metrics import require_metrics
    from megatron_omega.tasks.questions import Asking, exams_of
    from megatron_omega.tasks.texts import text_exam

    asking = Asking(arguments.shots, arguments.shots_in, arguments.limit, arguments.seed)
    tasks, files = [], []
    if arguments.tasks or not arguments.text:
        tasks, files = tasks_of(arguments.tasks or (), model.config.data.tasks)
    require_metrics([name for task in tasks for name in task.measured_by])
    data = model.config.data.model_copy(update={"tokenizer": model.tokenizer.path})
    config = model.config.model_copy(update={"data": data})
    exams: list[Exam] = []
    findings: list[str] = []
    makers: list[Any] = [lambda: exams_of(config, tasks, model.tokenizer, asking)] if tasks else []
    makers += [lambda file=file: [harness_exam(read_harness_file(file), model.tokenizer, asking)] for file in files]
    for make in makers:
        try:
            exams += make()
        except DataError as error:
            findings += error.findings
    texts = {}
    for path in arguments.text:
        try:
            texts[path.name] = texts_of(path)[: arguments.limit]
        except DataError as error:
            findings += error.findings
    if findings:
        raise DataError(*findings)
    return [*exams, *(text_exam(model, name, found) for name, found in texts.items())], texts


def scores_of(model: TextModel, name: str, arguments: argparse.Namespace, share: Share) -> Iterator[Score]:
    """Yield the scores of the model, and behind each those of the guesses."""
    from dataclasses import replace

    from megatron_omega.tasks.scoring import guesses, score
    from megatron_omega.tasks.texts import masked_metrics, masked_pieces

    exams, texts = asked_of(arguments, model)
    for exam in exams:
        found = score(model, exam, name=name, share=share, seed=arguments.seed)
        if exam.name in texts and model.config.model.has_mlm_head:
            pieces = masked_pieces(model, texts[exam.name], arguments.seed)
            more = masked_metrics(model, pieces, share, arguments.seed)
            found = replace(found, metrics=found.metrics | more)
        yield found
        yield from guesses(exam, seed=arguments.seed)


def main(argv: Sequence[str]) -> None:
    """Score and print."""
    arguments = read_arguments(argv)
    configure_logging()
    from megatron_omega.commands.together import dealing
    from megatron_omega.export.loading import load_text_model  # torch comes in here

    with dealing(arguments.device) as (device, share):
        model = load_text_model(arguments.checkpoint, device, tokenizer=arguments.tokenizer)
        for one in scores_of(model, str(model.path), arguments, share):
            if share.rank == 0:
                print(json.dumps(asdict(one)) if arguments.json else "\n".join(in_words(one, arguments.examples)))


def in_words(found: Score, examples: int) -> Iterator[str]:
    """Yield the lines of a score; examples of a model, not of a guess."""
    metrics = ", ".join(f"{name} {mean}" for name, mean in found.metrics.items())
    shots = f", {found.shots} shots" if found.shots else ""
    loss = f", loss {found.loss:.4f}" if found.loss == found.loss else ""
    yield f"{found.task}: {found.model}{shots}: {metrics}{loss} over {len(found.answers):,} questions"
    if not found.is_guess:
        for one in found.answers[:examples]:
            if one.answer:
                yield f"    {one.prompt[-60:]!r} -> {one.answer!r} (wanted {one.wanted!r}; {one.source})"
