"""Every argument of every verb that names a file, and what may stand there instead: a pipe, a device, a folder, 10 GB.

A verb that gets a new argument of this kind gets a line here; `unlisted` finds the ones that were forgotten.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostile.attacks import Trial
from hostile.trials import run_command
from megatron_omega.commands.main import VERBS

SECONDS = 5
"""Of the processor, at most: "at once", with torch already imported."""
SPARSE_BYTES = 10 << 30

TRAIN = 'train --logging.run_directory {folder}/new --config {run} --data.tokenizer {tokenizer} --data.corpora [{{"prefix":"{shard}"}}]'
PLAN = "plan --config omega-125m --gpus 8 --gpu h100-80g"
GENERATE = "generate --max-new-tokens 1 --prompt x"
PREPROCESS = "preprocess-data --quiet --workers 1 --output-prefix {folder}/out"
LAUNCH = "--config omega-tiny --ranks-per-node 1"

READ = (
    "train --dry-run --config @",
    "train --dry-run --config omega-tiny --deepspeed_config @",
    f"{TRAIN} --data.tokenizer @",
    f'{TRAIN} --data.corpora [{{{{"prefix":"@"}}}}]',
    f"{TRAIN} --checkpoint.load @",
    "evaluate --checkpoint @",
    "evaluate --checkpoint {checkpoint} --config @",
    "evaluate --checkpoint {checkpoint} --deepspeed_config @",
    "evaluate --checkpoint {checkpoint} --shard @",
    "evaluate --checkpoint {checkpoint} --input @",
    f"{GENERATE} --checkpoint @",
    f"{GENERATE} --checkpoint {{checkpoint}} --tokenizer @",
    "generate --max-new-tokens 1 --checkpoint {checkpoint} --prompt-file @",
    "serve --port 0 --checkpoint @",
    "serve --port 0 --checkpoint {checkpoint} --tokenizer @",
    "serve --port 0 --checkpoint {checkpoint} --api-key-file @",
    "import-hf --output {folder}/imported --folder @",
    "import-hf --output {folder}/imported --folder {folder}/folder --tokenizer @",
    "import-hf --output {folder}/imported --folder {folder}/folder --base @",
    "fill-mask --text <mask> --checkpoint @",
    "fill-mask --text <mask> --checkpoint {checkpoint} --tokenizer @",
    "export-hf --output {folder}/export-2 --checkpoint @",
    "export-hf --output {folder}/export-2 --checkpoint {checkpoint} --tokenizer @",
    "inspect-checkpoint @",
    "inspect-checkpoint {checkpoint} --diff @",
    "inspect-data @",
    "inspect-data --run @",
    "inspect-data {shard} --check --tokenizer-model @",
    "merge-shards --output-prefix {folder}/merged --input @",
    f"{PREPROCESS} --tokenizer-model {{tokenizer}} --input @",
    f"{PREPROCESS} --tokenizer-model {{tokenizer}} --dataset @",
    f"{PREPROCESS} --input {{text}} --tokenizer-model @",
    "train-tokenizer --output {folder}/new.model --input @",
    "plan --gpus 8 --gpu h100-80g --config @",
    f"{PLAN} --hardware @",
    "configure --parameters 1e8 --gpus 8 --gpu h100-80g --hardware @",
    "dry-run --gpus 8 --config @",
    "dry-run --gpus 8 --config omega-125m --hardware @",
    "sweep --output {folder}/sweep --steps 10 --vary optimizer.learning_rate=1e-3,2e-3 --config @",
    "sweep --output {folder}/sweep --steps 10 --vary optimizer.learning_rate=1e-3,2e-3 --config {run} --deepspeed_config @",
    "verify-parallel --layouts tp1 --config @",
    "score --checkpoint @",
    "score --checkpoint {checkpoint} --tasks @",
    "score --checkpoint {checkpoint} --text @",
    "lm-eval --checkpoint @",
    "report --run @",
    "goodput --run @",
    "launch local --ranks 1 --config @",
    "launch begin --config @",
    f"launch begin --nodes 1 {LAUNCH} --hostfile @",
    "launch slurm --nodes 1 --ranks-per-node 1 --dry-run --config @",
    "launch hostfile --hosts a b --ranks-per-node 1 --dry-run --config @",
)
"""Command lines with `@` in the place of the file. An `@` after a folder's argument is what a user may mistake for it."""

WRITTEN = (
    "configure --parameters 1e8 --gpus 8 --gpu h100-80g --output @",
    "calibrate --output @",
    "check-device --device cpu --json @",
    "import-hf --folder {checkpoint} --output @",
    "gather-text --output @",
    "gather-tasks --output @",
    "train-tokenizer --input {text} --output @",
    "inspect-data {shard} --histogram @",
    f"{PLAN} --plot @",
    f"{PLAN} --write @",
    f"launch slurm --nodes 1 {LAUNCH} --output @",
    f"launch hostfile --hosts a b {LAUNCH} --output @",
    "export-hf --checkpoint {checkpoint} --output @",
    "preprocess-data --quiet --workers 1 --tokenizer-model {tokenizer} --input {text} --output-prefix @/x",
    "merge-shards --input {shard} --output-prefix @/x",
    "sweep --config {run} --steps 10 --vary optimizer.learning_rate=1e-3,2e-3 --output @",
    f"{TRAIN} --logging.run_directory @",
    "demo --run @",
)
"""The same for what is written; a file is overwritten, and a folder is filled."""


OTHER_NAMES = {"evaluate --load"}
"""Of an option that is listed."""


def imposters(folder: Path) -> dict[str, Path]:
    """Make one of each thing that may stand in the place of a file."""
    made = {name: folder / name for name in ("pipe", "folder", "sparse")}
    os.mkfifo(made["pipe"])
    made["folder"].mkdir()
    with made["sparse"].open("wb") as file:
        file.truncate(SPARSE_BYTES)
    return {**made, "device": Path("/dev/zero")}


def mistaken_arguments(folder: Path, good: Path, lines: Sequence[str], kinds: Sequence[str]) -> Iterator[Trial]:
    """Give each argument each imposter. `folder` is empty; `good` holds one good file of each kind (`write_targets`)."""
    lines = [line for line in lines if line.split()[0] in VERBS]
    for verb in {line.split()[0] for line in lines}:
        importlib.import_module(f"megatron_omega.commands.{VERBS[verb]}")  # once, not in each child
    names = {
        "folder": folder, "run": good / "run.yaml", "tokenizer": good / "tokenizer.model", "text": good / "a.jsonl",
        "shard": good / "shards" / "t_text_document", "checkpoint": good / "run",
    }  # fmt: skip
    found = imposters(folder)
    for line in lines:
        for kind in kinds:
            words = [word.format(**names).replace("@", str(found[kind])) for word in line.split()]
            yield Trial(f"{line} [{kind}]", run_command(words, folder, SECONDS), (2, 3, 4))


def unlisted() -> set[str]:
    """Return the arguments that have the type of a path, and no line above gives a file to: `verb --option`."""
    found = set[str]()
    for verb, module in VERBS.items():
        spec = importlib.util.find_spec(f"megatron_omega.commands.{module}")
        text = Path(spec.origin).read_text() if spec and spec.origin else ""
        given = " ".join(line for line in (*READ, *WRITTEN) if line.split()[0] == verb)
        options = re.findall(r'"(--[a-z_-]+)",[^)"]{0,40}?type=(?:Path|output_file)', text)
        found |= {f"{verb} {option}" for option in options if f"{option} @" not in given}
    return found - OTHER_NAMES
