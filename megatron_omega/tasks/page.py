"""One HTML page of a comparison: tables, bars with intervals, curves, answers side by side. It needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from megatron_omega.tasks.comparison import LEADS, Comparison, Curve
from megatron_omega.tasks.metrics import CORPUS
from megatron_omega.tasks.scoring import Score

_EXAMPLES = 8
_LONGEST = 240
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
caption { text-align: left; color: #444; padding: .3rem 0 }
th, td { border: 1px solid #bbb; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.best { font-weight: 700 }
td.text { white-space: pre-wrap; font: 14px/1.4 ui-monospace, monospace; max-width: 22rem }
img { max-width: 100% }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #161616 } caption { color: #bbb } img { background: #fff } }
"""  # noqa: E501


def html_page(found: Comparison, title: str = "Comparison") -> str:
    """Return the page. Everything that models wrote is escaped."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if found.curves:
        parts += ["<h2>How they learned</h2>", *curve_pictures(found.curves), *_answer_pictures(found)]
    for task in found.tasks:
        parts += [f"<h2>{escape(task)}</h2>", _table(found, task), *_leads(found, task), *_bars(found, task)]
        parts += _examples(found, task)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width='
        f'device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _table(found: Comparison, task: str) -> str:
    columns = found.columns(task)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("model", *columns))
    rows = "".join(
        f'<tr><th scope="row">{escape(model)}</th>'
        + "".join(_cell(found, task, model, column) for column in columns)
        + "</tr>\n"
        for model in found.models
        if found.of(task, model) is not None
    )
    count = max(len(one.answers) for one in found.scores if one.task == task)
    caption = f"{count:,} questions. In brackets: 95% of the values of resampled questions. Bold: the best model."
    return f"<table>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"


def _cell(found: Comparison, task: str, model: str, column: str) -> str:
    mean = found.value(task, model, column)
    is_best = mean is not None and mean.value == found.best(task, column)
    kind = ' class="best"' if is_best else ""
    return f"<td{kind}>{'-' if mean is None else mean}</td>"


def _leads(found: Comparison, task: str) -> Iterator[str]:
    """Yield by how much models are above the best guess, question by question."""
    if leads := found.leads(task):
        yield f"<p>{escape(LEADS)}</p>\n<ul>{''.join(f'<li>{escape(str(lead))}</li>' for lead in leads)}</ul>"


def _bars(found: Comparison, task: str) -> Iterator[str]:
    """Yield a picture of each figure that two models or more have."""
    for column in found.columns(task):
        pairs = [(model, found.value(task, model, column)) for model in found.models]
        bars = [(model, mean) for model, mean in pairs if mean is not None and mean.value == mean.value]
        if len(bars) < 2:
            continue

        def draw(axes: Any, bars: Sequence[Any] = bars, column: str = column) -> None:
            values = [mean.value for _, mean in bars]
            spread = [[max(0.0, _or(mean.value - mean.low)) for _, mean in bars]]
            spread.append([max(0.0, _or(mean.high - mean.value)) for _, mean in bars])
            axes.barh(range(len(bars)), values, xerr=spread, color="tab:blue", ecolor="black", capsize=4)
            axes.set_yticks(range(len(bars)), [_short(model) for model, _ in bars])
            axes.invert_yaxis()
            axes.set_xlabel(column)

        told = "; ".join(f"{model} {mean}" for model, mean in bars)
        yield _picture(draw, f"Bars of {column} on {task}: {told}.", height=0.8 + 0.4 * len(bars))


def _or(value: float) -> float:
    return value if value == value else 0.0


def curve_pictures(curves: Sequence[Curve]) -> Iterator[str]:
    """Yield training losses by tokens and by FLOPs."""
    ends = "; ".join(f"{one.model} ends at {one.losses[-1]:.3f} after {one.tokens[-1]:,} tokens" for one in curves)
    for label, values in (("training tokens", _tokens), ("training FLOPs", _flops)):

        def draw(axes: Any, values: Callable[[Curve], Sequence[float]] = values, label: str = label) -> None:
            for one in curves:
                axes.plot(values(one), one.losses, label=_short(one.model), linewidth=1.2)
            axes.set(xlabel=label, ylabel="training loss, nats a token")
            axes.grid(alpha=0.3)
            axes.legend()

        yield _picture(draw, f"Training loss by {label}: {ends}.")


def _answer_pictures(found: Comparison) -> Iterator[str]:
    """Yield what answers in validations were worth, by tokens, with what guesses reach in the comparison."""
    for name in dict.fromkeys(name for one in found.curves for name in one.answers):
        task, column = name.rsplit(" ", 1)
        runs = [(one.model, one.answers[name]) for one in found.curves if name in one.answers]
        scale = 100 if column in CORPUS else 1  # validations have shares only
        guesses = [(guess, mean.value / scale) for guess, mean in found.guesses(task, column)]

        def draw(axes: Any, runs: Sequence[Any] = runs, guesses: Sequence[Any] = guesses, name: str = name) -> None:
            for model, points in runs:
                axes.plot(*zip(*points, strict=True), label=_short(model), marker="o", markersize=4, linewidth=1.2)
            for (guess, value), style in zip(guesses, ("--", ":"), strict=False):
                axes.axhline(value, color="black", linestyle=style, linewidth=1, label=_short(guess))
            axes.set(xlabel="training tokens", ylabel=name)
            axes.grid(alpha=0.3)
            axes.legend()

        ends = [f"{model} goes from {points[0][1]:.3f} to {points[-1][1]:.3f}" for model, points in runs]
        told = "; ".join([*ends, *(f"{guess} {value:.3f}" for guess, value in guesses)])
        yield _picture(draw, f"Validation answers, {name}, by training tokens: {told}.")


def _tokens(curve: Curve) -> Sequence[float]:
    return curve.tokens


def _flops(curve: Curve) -> Sequence[float]:
    return curve.flops


def _picture(draw: Callable[[Any], None], told: str, height: float = 3.6) -> str:
    """Return an image that stands in the page itself, with words for those who do not see it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure.add_subplot())
    written = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "omega"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    data = base64.b64encode(written.getvalue()).decode()
    return f'<p><img alt="{escape(told)}" src="data:image/svg+xml;base64,{data}"></p>'


def _examples(found: Comparison, task: str) -> Iterator[str]:
    """Yield what the models answered to the same questions, side by side."""
    scores = [one for model in found.models if (one := found.of(task, model)) and any(a.answer for a in one.answers)]
    if not scores:
        return
    head = "".join(
        f'<th scope="col">{escape(name)}</th>' for name in ("question", "wanted", *(s.model for s in scores))
    )
    rows = "".join(_example(scores, number) for number in range(min(_EXAMPLES, *(len(s.answers) for s in scores))))
    yield (
        f"<h3>Answers to the same questions</h3>\n<table>\n<caption>The first questions of {escape(task)}.</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"
    )


def _example(scores: Sequence[Score], number: int) -> str:
    asked = scores[0].answers[number]
    texts = [asked.prompt, asked.wanted, *(one.answers[number].answer for one in scores)]
    return "<tr>" + "".join(f'<td class="text">{escape(_cut(text))}</td>' for text in texts) + "</tr>\n"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else "…" + text[-_LONGEST:]


def _short(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]
