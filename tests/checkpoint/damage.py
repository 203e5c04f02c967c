# ruff: noqa: E402, T201
"""Damage the newest checkpoint in every way: each time it is refused, naming file and tensor, and the one before is
loaded, bit for bit. Prints one line for each kind of damage; exit code 1 if one of them got through.

    python tests/checkpoint/damage.py [--times 100] [--seed 0]

Four ranks (TP 2 x DP 2, ZeRO-1) save steps 1 and 2. One rank then resumes, as a restarted run does, from a folder whose
step 2 was damaged: a flipped bit at a random offset of all its bytes, a file cut off at a random length, a file gone,
files of two ranks swapped, a file of step 1 in the place of step 2's, a pickle in place of a file, a manifest whose
names lead out of the folder. Before each attempt the engine's state is wiped, so that nothing passes by standing still.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from launch import run_ranks
from scenarios import Case, Run, start, state_on_disk, whole_state

from megatron_omega.checkpoint.manifest import FILE_NAME, read_manifest
from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.engine.internals import base_optimizer, engine_holdings

OLDER, NEWER = "step-00000001", "step-00000002"
CASE = Case(1, 2, 2, zero=1)
HOSTILE_NAMES = ("../step-00000001/weights-00000.safetensors", "/etc/passwd", "..", "weights-00000.safetensors/../x")

Damage = tuple[list[str], Callable[[Path], object]]
"""Names of the files one of which must be named, and what damages a checkpoint."""


class Bomb:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def save_two(directory: Path) -> None:
    """Train, save step 1; train, save step 2."""
    run = start(CASE)
    for step in (1, 2):
        run.train(1)
        store = run.store(directory)
        store.save(run.engine, run.state, step=step)
        assert store.wait() is None


def flips(pristine: Path, times: int, chance: random.Random) -> Iterator[Damage]:
    """Yield single flipped bits at random offsets of all bytes of the checkpoint."""
    files = sorted(pristine.iterdir())
    sizes = [file.stat().st_size for file in files]
    for _ in range(times):
        file = chance.choices(files, sizes)[0]
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)

        def flip(path: Path, name: str = file.name, position: int = position, bit: int = bit) -> None:
            data = bytearray((path / name).read_bytes())
            data[position] ^= 1 << bit
            (path / name).write_bytes(data)

        yield [file.name], flip


def truncations(pristine: Path, times: int, chance: random.Random) -> Iterator[Damage]:
    """Yield files cut off at random lengths."""
    for _ in range(times):
        file = chance.choice(sorted(pristine.iterdir()))
        length = chance.randrange(file.stat().st_size)
        yield [file.name], lambda path, name=file.name, length=length: os.truncate(path / name, length)


def missing(pristine: Path) -> Iterator[Damage]:
    """Yield every file gone."""
    for file in sorted(pristine.iterdir()):
        yield [file.name], lambda path, name=file.name: (path / name).unlink()


def swaps(pristine: Path) -> Iterator[Damage]:
    """Yield every two ranks' files of a kind swapped."""
    for kind in ("weights", "optimizer"):
        for first, second in itertools.combinations(sorted(pristine.glob(f"{kind}-*")), 2):

            def swap(path: Path, first: str = first.name, second: str = second.name) -> None:
                (path / first).rename(path / "aside")
                (path / second).rename(path / first)
                (path / "aside").rename(path / second)

            yield [first.name, second.name], swap


def mixtures(pristine: Path) -> Iterator[Damage]:
    """Yield every file replaced by the one of the step before."""
    for file in sorted(pristine.iterdir()):
        yield (
            [file.name],
            lambda path, name=file.name: (path / name).write_bytes((pristine.with_name(OLDER) / name).read_bytes()),
        )


def pickles(pristine: Path, target: Path) -> Iterator[Damage]:
    """Yield pickles that would create `target` in place of every file, then of all files."""
    bomb = pickle.dumps(Bomb(target))
    for file in sorted(pristine.iterdir()):
        yield [file.name], lambda path, name=file.name: (path / name).write_bytes(bomb)
    yield [FILE_NAME], lambda path: [file.write_bytes(bomb) for file in sorted(path.iterdir())]


def hostile_manifests(pristine: Path) -> Iterator[Damage]:
    """Yield manifests, checksum and all, whose files lie outside the folder."""
    manifest = json.loads((pristine / FILE_NAME).read_text())
    del manifest["checksum"]
    for name, role in itertools.product(HOSTILE_NAMES, ("weights", "optimizer")):

        def forge(path: Path, name: str = name, role: str = role) -> None:
            copy = json.loads(json.dumps(manifest))
            copy["shards"][1][role]["name"] = name
            rest = json.dumps(copy).encode()[1:]
            (path / FILE_NAME).write_bytes(b'{"checksum": "%s",\n' % checksum(rest).encode() + rest)

        yield [FILE_NAME], forge


class Heard(logging.Handler):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def wipe(run: Run) -> None:
    """Overwrite masters, moments and working weights."""
    for mine in engine_holdings(run.engine.deepspeed):
        state = base_optimizer(run.engine.deepspeed).state[mine.flat]
        for tensor in (mine.flat.detach(), state["exp_avg"], state["exp_avg_sq"], mine.parameter.detach()):
            tensor.fill_(7)


def what_got_through(run: Run, directory: Path, files: list[str], older: dict[str, torch.Tensor]) -> str | None:
    """Resume from a folder whose newest checkpoint is damaged; return what was wrong with that."""
    wipe(run)
    heard = Heard()
    logger = logging.getLogger("megatron_omega.checkpoint.store")
    logger.addHandler(heard)
    try:
        state = run.store(directory).load_latest(run.engine)
    finally:
        logger.removeHandler(heard)
    said = "\n".join(heard.lines)
    if state is None or state["consumed_samples"] != CASE.global_batch:
        return f"resumed from {state}"
    found = whole_state(run)
    if any(not torch.equal(found[key], value) for key, value in older.items()):
        return "the state is not that of the step before"
    if not any(f"{NEWER}/{name}" in said for name in files):
        return f"no file named: {said}"
    if FILE_NAME not in files and "tensor " not in said:
        return f"no tensor named: {said}"
    return None


def damage_all(source: Path, directory: Path, times: int, seed: int) -> bool:
    """Damage and resume; runs on one rank."""
    run = start(Case(zero=1, learning_rate=CASE.learning_rate))
    run.train(1)  # so that there is a state to wipe
    logging.getLogger("megatron_omega.checkpoint.store").propagate = False
    chance, pristine, target = random.Random(seed), source / NEWER, directory / "exploded"
    kinds: dict[str, Iterator[Damage]] = {
        "single flipped bits at random offsets": flips(pristine, times, chance),
        "truncations at random lengths": truncations(pristine, times, chance),
        "missing files": missing(pristine),
        "files swapped between ranks": swaps(pristine),
        "files of the step before": mixtures(pristine),
        "pickles in place of files": pickles(pristine, target),
        "manifests that lead out of the folder": hostile_manifests(pristine),
    }
    older, victims = state_on_disk(source / OLDER), directory / "victims"
    shutil.copytree(source / OLDER, victims / OLDER)
    good = True
    for title, damages in kinds.items():
        findings = []
        for files, apply in damages:
            shutil.rmtree(victims / NEWER, ignore_errors=True)
            shutil.copytree(pristine, victims / NEWER)
            apply(victims / NEWER)
            findings.append(what_got_through(run, victims, files, older))
        bad = [finding for finding in findings if finding is not None]
        print(f"{len(findings) - len(bad)} of {len(findings)} {title}: refused by name, the step before loaded bitwise"
              + "".join(f"\n    BAD {finding}" for finding in bad), flush=True)  # fmt: skip
        good &= not bad
    if target.exists():
        print("BAD a pickle ran code")
    return good and not target.exists() and read_manifest(pristine).step == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="flipped bits, and truncations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, work = Path(folder) / "source", Path(folder) / "work"
        run_ranks(CASE.size, save_two, source)
        good = run_ranks(1, damage_all, source, work, options.times, options.seed, timeout=1800)[0]
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
