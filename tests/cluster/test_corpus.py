"""The corpus on a cluster: an array of parts, one of which fails, and the join that must not happen then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import TinyCorpus, run_python

from cluster.lab import LIVING, Lab

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]


def submit(lab: Lab, corpus: TinyCorpus, folder: Path) -> tuple[str, str]:
    """Give the command of the example for three parts; return the array and the join."""
    options = f"--cpus-per-task=1 --output={folder}/log-%j.txt"
    path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    words = ["examples/corpus-slurm/submit.sh", corpus.text, folder / "parts", corpus.tokenizer, "3"]
    environ = {"SBATCH_OPTIONS": options, "OPTIONS": "--chunk-megabytes 0.2", "PATH": path}
    said = lab.run("bash", *words, environ=environ)
    array, merge = said.removeprefix("array ").partition(":")[0].split(", then ")
    return array, merge


def test_a_part_that_fails_cancels_the_join_and_the_same_command_goes_on(
    lab: Lab, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    obstacle = tmp_path / "parts-00001-of-00003_text_document.idx"
    obstacle.mkdir()  # where the second part wants to write
    array, merge = submit(lab, tiny_corpus, tmp_path)
    assert lab.wait(merge) == "CANCELLED"
    assert not (tmp_path / "parts_text_document.idx").exists()
    lab.until(lambda: not {*lab.states(array)} & LIVING)
    assert sorted(lab.states(array)) == ["COMPLETED", "COMPLETED", "FAILED"]
    said = "".join(path.read_text() for path in tmp_path.glob("log-*"))
    assert "Traceback" not in said, said
    finished = tmp_path / "parts-00000-of-00003_text_document.bin"
    before = finished.stat().st_mtime_ns

    obstacle.rmdir()
    _, merge = submit(lab, tiny_corpus, tmp_path)
    assert lab.wait(merge) == "COMPLETED", [path.read_text() for path in tmp_path.glob("log-*")]
    assert finished.stat().st_mtime_ns == before  # what was done is not done again
    arguments = ["--input", tiny_corpus.text, "--output-prefix", tmp_path / "whole", "--json-keys", "text"]
    alone = run_python(
        "tools/preprocess_data.py",
        *arguments,
        "--tokenizer-model",
        tiny_corpus.tokenizer,
        "--append-eod",
        "--workers",
        1,
    )
    assert alone.returncode == 0, alone.stderr
    parts, whole = (tmp_path / f"{name}_text_document.bin" for name in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()
