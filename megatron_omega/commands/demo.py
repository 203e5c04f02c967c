"""Train a tiny GPT-Omega on this machine's CPU and let it write: every step of a real run, in a few minutes.

    megatron-omega demo
    megatron-omega demo --run runs/other --ranks 4 --parallel.tensor_parallel_size 1

Works in the current folder: the corpus goes to runs/corpus, the run to runs/omega-tiny. A second call goes on from the
last checkpoint, under any layout. What is not an option of this verb is a setting of the run.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_omega import accounting
from megatron_omega.commands import (
    gather_text,
    generate,
    launch,
    preprocess,
    report,
    train_tokenizer,
)
from megatron_omega.config.load import load_config
from megatron_omega.host import run_folder
from megatron_omega.host.command_line import COMMAND, CommandLine, output_folder
from megatron_omega.host.json_lines import read_objects

PRESET = "omega-tiny"
CORPUS = Path("runs/corpus")
"""Where the preset expects its corpus."""
TEXT, TOKENIZER, SHARD = CORPUS / "text.jsonl", CORPUS / "tokenizer.model", CORPUS / "text_text_document"
SHORTEST_CURVE = 10
PROMPT = "This function returns"


def main(argv: Sequence[str]) -> int:
    """Do everything that has not been done yet; return the exit code of the step that failed, or what was learned."""
    arguments, settings = read_arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more ranks than cores: threads of their own would fight
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    make_corpus()
    _say(f"training on {arguments.ranks} ranks")
    run = ["--config", PRESET, "--deepspeed_config", "zero1", "--logging.run_directory", str(arguments.run), *settings]
    if code := launch.main(["local", "--ranks", str(arguments.ranks), *run]):
        return code
    _say("what it learned")
    code = report.main(["--run", str(arguments.run)])
    print("\n".join(what_it_means(arguments.run)))
    _say("what it writes")
    generate.main(["--checkpoint", str(arguments.run), "--prompt", PROMPT, "--max-new-tokens", "48", "--seed", "1"])
    print("\n".join(last_words(arguments.run)))
    return code


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=8, help="processes (default 8: TP 2 x PP 2 x DP 2)")
    parser.add_argument(
        "--run", type=output_folder, default=Path("runs/omega-tiny"), help="run folder (default runs/omega-tiny)"
    )
    return parser.parse_known_args(argv)


def make_corpus() -> None:
    """Gather text, learn a tokenizer and write a shard, each unless it is there."""
    vocabulary = ["--vocab-size", "2048", "--input", str(TEXT)]
    shard = ["--input", str(TEXT), "--output-prefix", str(CORPUS / "text"), "--tokenizer-model", str(TOKENIZER)]
    _unless(TEXT, "gathering text that this Python installation carries", gather_text.main, ["--output", str(TEXT)])
    _unless(TOKENIZER, "learning a tokenizer", train_tokenizer.main, [*vocabulary, "--output", str(TOKENIZER)])
    _unless(
        SHARD.with_suffix(".idx"), "writing the corpus", preprocess.main, [*shard, "--append-eod", "--workers", "2"]
    )


def _unless(made: Path, what: str, step: Callable[[Sequence[str]], object], words: list[str]) -> None:
    if not made.exists():
        _say(what)
        step(words)


def what_it_means(run: Path) -> list[str]:
    """Return what the losses of a run say, and what more steps would give, by its own curve."""
    rows = [row for row in read_objects(run / run_folder.METRICS) if row.get("lm_loss") is not None]
    if len(rows) < SHORTEST_CURVE:
        return []
    config = load_config(run / run_folder.CONFIG)
    steps, tokens = rows[-1]["step"], rows[-1]["consumed_tokens"]
    half, end = (_mean_around(rows, place) for place in (len(rows) // 2, len(rows)))
    slope = max(0.0, half - end)
    share = tokens / accounting.parameter_count(config.model)
    lines = [
        "",
        f"{steps:,} steps were {tokens / 1e6:.2f} million tokens, {share:.1g} a parameter; 20 and more are useful.",
        "It has learned which pieces are frequent and which follow each other: what it writes below is gibberish.",
        f"At each place it is as unsure as between {math.exp(end):,.0f} equally likely pieces "
        f"of {config.model.vocab_size:,}.",
    ]
    if slope > 0.01:
        later = math.exp(max(end - slope * math.log2(10), 0.5))
        lines.append(f"By its own curve, ten times the steps would leave {later:,.0f}: words, then phrases.")
    return lines


def _mean_around(rows: Sequence[dict[str, Any]], end: int) -> float:
    """Return the mean loss of the last tenth of the steps before place `end`."""
    some = rows[max(0, end - max(3, len(rows) // 10)) : end]
    return sum(row["lm_loss"] for row in some) / len(some)


def last_words(run: Path) -> list[str]:
    """Return where everything is, and commands to go on with."""
    layout = "--ranks 4 --run runs/other --parallel.tensor_parallel_size 1"
    tries = {
        "longer": ["demo", "--run", str(run), "--training.train_steps", "2000"],
        "another layout": ["demo", *layout.split()],
        "proof": ["verify-parallel", "--config", PRESET, "--layouts", "tp2,pp2-dp2", "--steps", "4"],
        "write": ["generate", "--checkpoint", str(run), "--prompt", "Open the file and"],
        "what would run": ["train", "--config", "omega-1b", "--dry-run"],
    }
    return [
        "",
        "== where everything is",
        f"  losses            {run / run_folder.PLOT}",
        f"  every step        {run / run_folder.METRICS}, {run / run_folder.EVENTS}",
        f"  tensorboard       tensorboard --logdir {run / 'tensorboard'}",
        f"  checkpoints       {run / run_folder.CHECKPOINTS}",
        f"  configuration     {run / run_folder.CONFIG}",
        f"  corpus            {SHARD}.bin, tokenizer {TOKENIZER}",
        "",
        "== what to try next",
        *(f"  {what:<17} {COMMAND} {shlex.join(words)}" for what, words in tries.items()),
    ]


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)
