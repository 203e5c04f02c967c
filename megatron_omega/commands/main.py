"""`megatron-omega VERB ...`: one table from verb to module. A verb is imported only when it is called.

Needs the standard library alone, so that an environment without the package's libraries is told what is missing. A
verb's module has `main(argv) -> int | None`; its module docstring is its help page.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence

from megatron_omega import __version__
from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import COMMAND
from megatron_omega.host.open_files import allow_many_files

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "start": {
        "demo": ("demo", "train a tiny model on this machine's CPU and let it write"),
        "configure": ("configure", "write a commented run.yaml for a number of parameters, tokens and devices"),
        "settings": ("settings", "print every setting with its meaning and default"),
        "plan": ("plan", "rank every layout of a configuration on a number of accelerators, without a GPU"),
        "calibrate": ("calibrate", "measure this machine, so that plans and forecasts are about it"),
    },
    "data": {
        "gather-text": ("gather_text", "gather the text that every Python installation carries"),
        "gather-tasks": ("gather_tasks", "gather supervised tasks that every Python installation carries"),
        "train-tokenizer": ("train_tokenizer", "learn a SentencePiece tokenizer with the ids that the objectives need"),
        "preprocess-data": ("preprocess", "tokenize text into memory-mapped shards"),
        "merge-shards": ("merge_shards", "join shards into one"),
        "inspect-data": ("inspect_data", "look at shards, and at what a run read"),
    },
    "train": {
        "train": ("train", "train a configured run, as one of its processes or alone"),
        "finetune": ("finetune", "fine-tune a trained model on supervised tasks, whole or with LoRA"),
        "score": ("score", "measure how well a model answers held-out prompts"),
        "compare": ("compare", "compare models on tasks: a table, and a page with curves and answers"),
        "lm-eval": ("harness", "run lm-evaluation-harness on a trained model"),
        "launch": ("launch", "start all processes of a run: on this machine, on several, under Slurm"),
        "evaluate": ("validate", "measure the validation loss of a checkpoint"),
        "report": ("report", "say what a run learned, beside two guesses"),
        "sweep": ("sweep", "find the best learning rate, or other settings, by successive halving"),
        "goodput": ("goodput", "say how much of a run's time went into steps that count"),
    },
    "use": {
        "generate": ("generate", "continue a text with a trained model"),
        "fill-mask": ("fill_mask", "predict masked tokens with a trained model"),
        "serve": ("serve", "answer over HTTP as OpenAI's API does, with a page to try models"),
        "inspect-checkpoint": ("inspect_checkpoint", "look into checkpoints, verify and compare them"),
        "export-hf": ("export", "export a checkpoint for Transformers, and prove that the export says the same"),
        "import-hf": ("import_hf", "turn a folder of Transformers into a checkpoint that trains on"),
    },
    "prove": {
        "verify-parallel": ("verify_layouts", "train under many layouts and compare every step"),
        "check-device": ("check_device", "check kernels, losses, messages and rates of a GPU (or CPU) before a run"),
        "dry-run": ("rehearse", "run the model code of a planned layout without data, and compare with the plan"),
    },
}  # fmt: skip
"""Group -> verb -> module in commands/ and a line for the list."""

VERBS = {verb: module for verbs in GROUPS.values() for verb, (module, _) in verbs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that a command line names; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print("\n".join(help_lines()))
        return 0
    if words[0] == "--version":
        print(f"{COMMAND} {__version__}")
        return 0
    return run(words[0].replace("_", "-"), words[1:])


def run(verb: str, argv: Sequence[str]) -> int:
    """Run one verb; ends the process with a sentence and an exit code where an OmegaError was raised."""
    allow_many_files()
    with exit_cleanly():
        try:
            module = importlib.import_module(f"megatron_omega.commands.{_module_of(verb)}")
            return module.main(argv) or 0
        except ModuleNotFoundError as missing:
            if (missing.name or "").partition(".")[0] in ("", "megatron_omega"):
                raise  # a fault of ours
            raise ConfigError(_outside_environment(missing.name or "")) from None


def _module_of(verb: str) -> str:
    if verb in VERBS:
        return VERBS[verb]
    near = difflib.get_close_matches(verb, VERBS, n=1)
    raise ConfigError(
        f"there is no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"{COMMAND} --help lists them")
    )


def _outside_environment(library: str) -> str:
    return (
        f"{sys.executable} has no {library}, which {COMMAND} needs; enter the environment it is installed in "
        "(source .venv/bin/activate), or install it: pip install ., in a checkout also make setup"
    )


def help_lines() -> Iterator[str]:
    """Yield the list of verbs, grouped, with a line each."""
    yield f"usage: {COMMAND} VERB [--help] [options]"
    width = max(map(len, VERBS))
    for group, verbs in GROUPS.items():
        yield ""
        yield f"{group}:"
        yield from (f"  {verb:<{width}}  {line}" for verb, (_, line) in verbs.items())
    yield ""
    yield f"{COMMAND} VERB --help describes one; --version prints the version."
