#!/usr/bin/env python3
"""Text -> shards, against SentencePiece in the same engine and `datasets.map`: interleaved runs, CPU-seconds.

    benchmarks/preprocessing.py --corpus /tmp/corpus/corpus.jsonl --megabytes 140 --rounds 2 --json results.json
    benchmarks/preprocessing.py --corpus /tmp/corpus/corpus.jsonl --exact     every document against SentencePiece

CPU-seconds count every process and all of the start-up. Peak memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omega.corpus.encoding import SentencePieceEncoder, open_encoder
from megatron_omega.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RIVAL = """
import json, sys
import datasets, numpy
from tokenizers import Tokenizer, decoders, models, normalizers
source, model, output, workers = sys.argv[1:]
import sentencepiece
sp = sentencepiece.SentencePieceProcessor(model_file=model)
pieces = [sp.id_to_piece(n) for n in range(sp.get_piece_size())]
vocab = {piece: n for n, piece in enumerate(pieces)}
text = {p for n, p in enumerate(pieces) if not (sp.is_control(n) or sp.is_unknown(n) or sp.is_byte(n))}
merges = sorted(((vocab[p], p[:k], p[k:]) for p in text for k in range(1, len(p)) if p[:k] in text and p[k:] in text))
bpe = models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token="<unk>", byte_fallback=True)
tokenizer = Tokenizer(bpe)
tokenizer.normalizer = normalizers.Replace(" ", "\\u2581")
def encode(batch):
    return {"ids": [numpy.asarray(e.ids, dtype=numpy.uint16) for e in tokenizer.encode_batch_fast(batch["text"])]}
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output)
rows.map(encode, batched=True, num_proc=int(workers), remove_columns=rows.column_names, features=datasets.Features(
    {"ids": datasets.Sequence(datasets.Value("uint16"))}))
"""


def measure(command: list[str]) -> dict[str, float]:
    """Run a command and return its CPU-seconds, wall seconds and peak memory, children included."""
    started = time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = time.monotonic() - started
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": seconds, "megabytes": usage.ru_maxrss / 1024}


def cut(corpus: Path, megabytes: float, target: Path) -> Path:
    """Take whole lines from the start of the corpus."""
    left = int(megabytes * 1e6)
    with corpus.open("rb") as source, target.open("wb") as file:
        for line in source:
            left -= file.write(line)
            if left <= 0:
                break
    return target


def ours(source: Path, model: Path, folder: Path, workers: int, *more: str) -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(source),
        "--output-prefix",
        str(folder / "o"),
    ]
    return [
        *command,
        "--tokenizer-model",
        str(model),
        "--append-eod",
        "--workers",
        str(workers),
        "--overwrite",
        "--quiet",
        *more,
    ]


def compare(corpus: Path, model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    source = cut(corpus, arguments.megabytes, folder / "part.jsonl")
    rival = [sys.executable, "-c", RIVAL, str(source), str(model), str(folder / "rival"), str(arguments.workers)]
    contenders = {
        "ours": ours(source, model, folder, arguments.workers),
        "sentencepiece, same engine": ours(source, model, folder, arguments.workers, "--sentencepiece"),
        "datasets.map": rival,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, command in contenders.items():
            shutil.rmtree(folder / "rival", ignore_errors=True)
            run = measure(command)
            print(f"  {name}: {run['cpu']:.1f} CPU-s, {run['wall']:.1f} s, {run['megabytes']:.0f} MB", file=sys.stderr)
            found[name].append(run)
    table = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    for name, row in table.items():
        ratio = row["cpu"] / table["ours"]["cpu"]
        print(f"{name:28} {row['cpu']:7.1f} CPU-s {row['wall']:7.1f} s {row['megabytes']:6.0f} MB  {ratio:5.1f}x")
    return table


def memory(corpus: Path, model: Path, folder: Path) -> dict[str, float]:
    sizes = {}
    for megabytes in (30, 400):
        source = cut(corpus, megabytes, folder / "part.jsonl")
        sizes[f"{megabytes} MB"] = measure(ours(source, model, folder, 2))["megabytes"]
    print("peak memory of the largest process:", {name: f"{value:.0f} MB" for name, value in sizes.items()})
    return sizes


def exactness(corpus: Path, model: Path) -> dict[str, float]:
    tokenizer = Tokenizer.open(model)
    fast, reference = open_encoder(tokenizer), SentencePieceEncoder(tokenizer)
    documents = differing = 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            documents += 1
            differing += fast.encode(text) != reference.encode(text)
            if documents % 5000 == 0:
                print(f"  {differing} of {documents:,} so far", file=sys.stderr)
    print(f"{fast.name}: {differing} of {documents:,} documents differ from SentencePiece")
    return {"documents": documents, "differing": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer-model", type=Path, help="default: a BPE model of 32,768 pieces, trained first")
    parser.add_argument("--megabytes", type=float, default=140)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="compare peak memory at 30 and 400 MB instead")
    parser.add_argument("--exact", action="store_true", help="check every document instead")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.tokenizer_model or folder / "tokenizer.model"
        if not model.exists():
            train = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(arguments.corpus)]
            measure([*train, "--output", str(model), "--megabytes", "30"])
        if arguments.exact:
            found = exactness(arguments.corpus, model)
        elif arguments.memory:
            found = memory(arguments.corpus, model, folder)
        else:
            found = compare(arguments.corpus, model, arguments, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
