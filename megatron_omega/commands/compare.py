"""Compare models on tasks: a table with intervals, as Markdown, JSON and one HTML page with curves and answers.

    megatron-omega compare --models runs/omega-tiny-finetuned runs/omega-tiny --tasks tasks.yaml --output comparison
    megatron-omega compare --models ours=runs/omega-tiny t5=runs/t5-like other=folder/of/transformers \\
        --tasks tasks.yaml arc.yaml --text book.txt --output comparison

    megatron-omega compare --models cold=runs/omega-tiny warm=runs/omega-tiny@4 --tasks tasks.yaml --output comparison

Models are checkpoints, runs, exports, adapters, or folders that Transformers loads (extras hf and harness). The first
has to be one of ours: its split says which pairs are held out, and its tokenizer cuts the questions that others are
asked as text. PATH@4 shows that model four examples, whatever --shots says. Beside the models stand two guesses. Curves
come from a run's metrics.jsonl and events.jsonl. The page needs no network and no other file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_omega.commands.score import asked_of, check_questions, scores_of, takes_questions
from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.command_line import CommandLine, output_folder, writing
from megatron_omega.log import configure_logging, get_logger

if TYPE_CHECKING:
    from megatron_omega.export.loading import TextModel
    from megatron_omega.tasks.comparison import Comparison, Curve
    from megatron_omega.tasks.scoring import Score
    from megatron_omega.tasks.sharing import Share

log = get_logger(__name__)
FILES = ("comparison.json", "comparison.md", "index.html")


@dataclass(frozen=True)
class Contender:
    """A model, and how many examples it is shown."""

    path: Path
    shots: int | None = None
    """None: as many as --shots says."""


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="[NAME=]PATH[@SHOTS]", help="models, each with a name")
    add("--output", type=output_folder, required=True, help="folder for the table and the page")
    takes_questions(parser)
    arguments = parser.parse_args(argv)
    check_questions(arguments)
    return arguments


def named(words: Sequence[str]) -> dict[str, Contender]:
    """Return the models by name: the path, if none was given."""
    pairs = [(word.partition("=")[0], word.partition("=")[2]) if "=" in word else (word, word) for word in words]
    found = {name: _contender(path) for name, path in pairs}
    if len(found) < len(pairs) or not all(name and path for name, path in pairs):
        raise ConfigError(f"--models {' '.join(words)} gives a name twice, or none; use NAME=PATH for each")
    return found


def _contender(text: str) -> Contender:
    """Return PATH@SHOTS as both, if no file has that name."""
    match = None if Path(text).exists() else re.fullmatch(r"(.+)@(\d+)", text)
    return Contender(Path(match[1]), int(match[2])) if match else Contender(Path(text))


def compared(models: dict[str, Contender], arguments: argparse.Namespace, share: Share, device: str) -> Comparison:
    """Ask every model, one after the other."""
    from megatron_omega.export.loading import load_text_model  # torch comes in here
    from megatron_omega.tasks.comparison import Comparison
    from megatron_omega.tasks.foreign import Foreign, is_foreign

    names = list(models)
    path = models[names[0]].path
    if is_foreign(path):
        raise ConfigError(f"--models: {path} is no model of ours; name one of ours first")
    first = load_text_model(path, device)
    scores: list[Score] = []
    curves: list[Curve] = []
    drawn: set[Path] = set()  # a run has one curve, with however many examples it is asked
    for name, one in models.items():
        log.info("%s: %s", name, one.path)
        asked = arguments if one.shots is None else argparse.Namespace(**{**vars(arguments), "shots": one.shots})
        if is_foreign(one.path):
            rival = Foreign(one.path, device)
            exams, _ = asked_of(asked, first)
            scores += [rival.score(exam, first.tokenizer, name=name, seed=arguments.seed) for exam in exams]
            continue
        model = first if one.path == path else with_split_of(first, load_text_model(one.path, device))
        found = list(scores_of(model, name, asked, share))
        scores += [score for score in found if not score.is_guess or name == names[0]]
        if one.path not in drawn:
            drawn.add(one.path)
            curves += curves_of(name, one.path, model)
    return Comparison(tuple(scores), tuple(curves))


def with_split_of(first: TextModel, model: TextModel) -> TextModel:
    """Return `model` with what says which pairs are held out taken from `first`: all are asked the same."""
    from dataclasses import replace

    data = model.config.data.model_copy(update={"split": first.config.data.split, "tasks": first.config.data.tasks})
    training = model.config.training.model_copy(update={"seed": first.config.training.seed})
    return replace(model, config=model.config.model_copy(update={"data": data, "training": training}))


def curves_of(name: str, path: Path, model: TextModel) -> Iterator[Curve]:
    """Yield the curve of the run that a path lies in, if there is one."""
    from megatron_omega.tasks.comparison import curve_of

    for folder in (path, *path.absolute().parents[:2]):
        if (folder / run_folder.METRICS).is_file():
            curve = curve_of(name, folder, model.config)
            if curve is not None:
                yield curve
            return


def main(argv: Sequence[str]) -> None:
    """Compare, write, and print the table."""
    arguments = read_arguments(argv)
    models = named(arguments.models)
    configure_logging()
    from megatron_omega.commands.together import dealing
    from megatron_omega.tasks.comparison import as_json, markdown
    from megatron_omega.tasks.page import html_page

    with dealing(arguments.device) as (device, share):
        found = compared(models, arguments, share, device)
    if share.rank:
        return
    texts = (as_json(found), markdown(found), html_page(found))
    for name, text in zip(FILES, texts, strict=True):
        path = arguments.output / name
        with writing(path):
            path.write_text(text, encoding="utf-8")
    print(texts[1])
    print(f"{arguments.output / FILES[-1]}: the same with curves and answers side by side")
