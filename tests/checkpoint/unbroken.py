# ruff: noqa: E402, T201
"""[20 steps] = [7 steps, resume, 13 steps], bit for bit, through pretrain_omega.py itself: losses, norms, final weights.

    python tests/checkpoint/unbroken.py [--only z1]

Each case trains 20 steps and saves every 7; a second run folder gets nothing but the checkpoint of step 7 and trains on
to step 20. Steps 8 to 20 of metrics.jsonl and the last checkpoints must be equal to the last bit. The batch size grows and an epoch
ends both before and after the break, which is checked; the corpus is this package's own source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY)]

import yaml

import pretrain_omega
from megatron_omega.checkpoint.inspection import compare
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.load import load_config
from megatron_omega.data.sources import open_sources
from megatron_omega.launching.local_ranks import run_ranks

STEPS, BREAK = 20, 7
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "encoder_layers": 2, "decoder_layers": 2,
              "vocab_size": 512, "local_window": 16, "axial_width": 8},
    "data": {"encoder_seq_length": 64, "decoder_seq_length": 64, "split": [8, 1, 1]},
    "batch": {"micro_batch_size": 2, "global_batch_size": 16, "ramp_up": {"start": 8, "increment": 4, "samples": 120}},
    "parallel": {"recompute": "none", "timeout_seconds": 300},
    "schedule": {"warmup_steps": 5},
    "training": {"train_steps": STEPS},
    "evaluation": {"interval_steps": 5, "num_batches": 1},
    "checkpoint": {"interval_steps": BREAK, "keep_last": 9},
    "logging": {"progress_bar": False, "tensorboard": False},
}  # fmt: skip
COMPARED = ("loss", "lm_loss", "mlm_loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens")


@dataclass(frozen=True)
class Setup:
    """One way to run."""

    pipeline: int
    data: int
    tensor: int
    deepspeed: str
    dtype: str

    @property
    def label(self) -> str:
        return f"({self.pipeline},{self.data},{self.tensor}) {self.deepspeed} {self.dtype}"


SETUPS = [
    Setup(*layout, deepspeed, dtype)
    for dtype in ("fp32", "bf16")
    for layout, names in (
        ((1, 1, 1), ("zero1",)),
        ((2, 2, 2), ("zero1",)),
        ((1, 2, 2), ("zero2", "zero3", "zero3_offload")),
    )
    for deepspeed in names
]


def make_corpus(folder: Path) -> None:
    """Write a tokenizer and a corpus of this package's sources."""
    texts = [path.read_text() for path in sorted((REPOSITORY / "megatron_omega").glob("*/*.py"))][:12]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text[:900]}) + "\n" for text in texts))
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run_python(
        "tools/train_tokenizer.py",
        "--input",
        folder / "all.jsonl",
        "--output",
        folder / "tokenizer.model",
        "--vocab-size",
        512,
    )
    run_python("tools/preprocess_data.py", "--input", folder / "text.jsonl", "--output-prefix", folder / "text", "--json-keys", "text",
               "--tokenizer-model", folder / "tokenizer.model", "--append-eod", "--workers", 1)  # fmt: skip


def run_python(*arguments: object) -> None:
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(
            f"{arguments} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )


def train(setup: Setup, corpus: Path, run: Path) -> None:
    """Train (or go on) to the last step."""
    settings = json.loads(json.dumps(SETTINGS))
    settings["data"] |= {
        "tokenizer": str(corpus / "tokenizer.model"),
        "corpora": [{"prefix": str(corpus / "text_text_document")}],
    }
    settings["parallel"] |= {"tensor_parallel_size": setup.tensor, "pipeline_parallel_size": setup.pipeline}
    settings["precision"] = {"dtype": setup.dtype}
    settings["logging"] |= {"run_directory": str(run)}
    run.mkdir(parents=True, exist_ok=True)
    Path(f"{run}.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", f"{run}.yaml", "--deepspeed_config", f"{REPOSITORY}/ds_configs/{setup.deepspeed}.json"]
    run_ranks(train_rank, setup.pipeline * setup.data * setup.tensor, words, Path(f"{run}.log"))


def train_rank(words: list[str], log: Path) -> None:
    """Be one process of the run; what it says goes to a file."""
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    pretrain_omega.main(words)


def metrics(run: Path) -> dict[int, tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: tuple(row[key] for key in COMPARED) for row in rows}


def passes_boundaries(run: Path) -> bool:
    """Return whether the batch size grew and an epoch ended, before the break and after it."""
    consumed = [0, *(row[COMPARED.index("consumed_samples")] for _, row in sorted(metrics(run).items()))]
    sizes = [after - before for before, after in itertools.pairwise(consumed)]
    epoch = len(open_sources(load_config(run / "config.yaml")).train)
    parts = (range(BREAK), range(BREAK, STEPS))
    grows = all(sizes[part[0]] < sizes[part[-1]] for part in parts)
    return grows and all(consumed[part[0]] // epoch < consumed[part[-1] + 1] // epoch for part in parts)


def check(setup: Setup, corpus: Path, folder: Path) -> str | None:
    """Return what differs, or None."""
    unbroken, resumed = folder / "unbroken", folder / "resumed"
    train(setup, corpus, unbroken)
    shutil.copytree(unbroken / "checkpoints" / f"step-{BREAK:08d}", resumed / "checkpoints" / f"step-{BREAK:08d}")
    train(setup, corpus, resumed)
    if not passes_boundaries(unbroken):
        return "no epoch ends, or the batch does not grow, before and after the break"
    first, second = metrics(unbroken), metrics(resumed)
    if sorted(first) != list(range(1, STEPS + 1)) or sorted(second) != list(range(BREAK + 1, STEPS + 1)):
        return f"steps {sorted(first)} and {sorted(second)}"
    wrong = [step for step in second if first[step] != second[step]]
    if wrong:
        return f"step {wrong[0]}: {first[wrong[0]]} and {second[wrong[0]]}"
    last = f"checkpoints/step-{STEPS:08d}"
    with open_checkpoint(unbroken / last) as mine, open_checkpoint(resumed / last) as theirs:
        different = [row.name for row in compare(mine, theirs).differences if row.num_different]
        if mine.manifest.state != theirs.manifest.state:
            different.append("state")
    return f"{len(different)} tensors differ: {different[:3]}" if different else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose label holds this text")
    options = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error"}
    good = True
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder))
        for index, setup in enumerate(setup for setup in SETUPS if options.only in setup.label):
            problem = check(setup, Path(folder), Path(folder) / str(index))
            print(
                f"{setup.label:32} {'20 steps = 7 + resume + 13, bit for bit' if problem is None else 'DIFFERS: ' + problem}",
                flush=True,
            )
            good &= problem is None
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
