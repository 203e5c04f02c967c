"""The whole of preprocessing: inputs -> parts -> shard, resumable by the same command.

Beside the output stands `{output_prefix}.parts/` while work is under way: a plan, the finished parts and a lock. The
plan names the options the output depends on; a folder of another plan is cleared. A part names the input it was made
of, so where a damaged file is mended or left out, the parts of the others are used.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_omega.corpus.encoding import open_encoder
from megatron_omega.corpus.finish import check_reports, check_tally, join_parts, write_bad
from megatron_omega.corpus.options import Options, Progress, Result, Stream, Tally
from megatron_omega.corpus.parts import PartMaker, PartReport, Task, read_report, remove_files
from megatron_omega.corpus.pool import make_parts
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.corpus.tasks import (
    automatic_unit,
    plan_tasks,
    sample_texts,
    spool_path,
    spooled_tasks,
    task_bytes,
)
from megatron_omega.data.sidecar import read_sidecar
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.log import get_logger

_PATIENCE_RECORDS = 10_000


def preprocess(inputs: list[InputFile] | Stream, options: Options, progress: Progress = lambda _: None) -> Result:
    """Make the shards of `inputs`. Raises DataError; finished parts then remain and are used by the next call."""
    tokenizer = Tokenizer.open(options.tokenizer_model)
    finished = _finished(inputs, options, tokenizer)
    if finished is not None:
        shutil.rmtree(options.folder, ignore_errors=True)
        return finished
    try:
        with _locked(options.folder):
            result = _make(inputs, options, tokenizer, progress)
        shutil.rmtree(options.folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or options.output_prefix} cannot be written ({error.strerror}); finished parts are kept, "
            "the same command goes on from there"
        ) from None
    return result


def _identity(inputs: list[InputFile] | Stream, options: Options, tokenizer: Tokenizer) -> str:
    read = inputs.identity() if isinstance(inputs, Stream) else [asdict(file) for file in inputs]
    return options.identity(tokenizer, read)


def _make(inputs: list[InputFile] | Stream, options: Options, tokenizer: Tokenizer, progress: Progress) -> Result:
    folder, plan = options.folder, options.identity(tokenizer, None)
    if isinstance(inputs, Stream):
        _open_plan(folder, plan, 0)
        tasks = spooled_tasks(inputs, folder)
    else:
        automatic = automatic_unit(inputs, options.shard[1])
        tasks = iter(plan_tasks(inputs, _open_plan(folder, plan, options.unit_bytes or automatic), options.shard))
    first = list(itertools.islice(tasks, 1))
    samples = [text for task in first for text in sample_texts(task, options)]
    encoder = open_encoder(tokenizer, samples=samples, is_native_allowed=options.is_native_allowed)
    maker = PartMaker(
        folder, options.keys, tokenizer, encoder, options.append_eod, options.is_deduplicated, options.max_record_bytes
    )
    reports: dict[int, PartReport] = {}
    try:
        _make_missing(maker, itertools.chain(first, tasks), options, progress, reports)
    finally:
        ordered = _unbroken(reports)
        write_bad(ordered, inputs, options)
    check_reports(ordered, inputs, options)
    return join_parts(ordered, inputs, options, tokenizer, _identity(inputs, options, tokenizer), encoder.name)


def _unbroken(reports: dict[int, PartReport]) -> list[PartReport]:
    """Return, in order, the reports before the first gap; records behind a gap have no line numbers yet."""
    first = min(reports, default=0)
    return [reports[number] for number in itertools.takewhile(reports.__contains__, itertools.count(first))]


def _make_missing(
    maker: PartMaker, tasks: Iterable[Task], options: Options, progress: Progress, reports: dict[int, PartReport]
) -> None:
    """Put the report of every task into `reports`, from the parts that are there and those made now."""
    sizes: dict[int, int] = {}
    tally = Tally()

    def note(report: PartReport) -> None:
        reports[report.number] = report
        tally.add(report, sizes.pop(report.number))
        spool_path(maker.folder, report.number).unlink(missing_ok=True)
        progress(tally)
        if tally.records >= _PATIENCE_RECORDS:
            check_tally(tally, options)

    def missing() -> Iterator[Task]:
        for task in tasks:
            sizes[task.number] = task_bytes(task)
            report = read_report(maker.folder, task)
            if report is None:
                yield task
            else:
                note(report)

    for made in make_parts(maker, missing(), options.workers):
        note(made)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is writing {folder}; wait for it, or choose another --output-prefix"
            ) from None
        yield


def _open_plan(folder: Path, identity: str, unit_bytes: int) -> int:
    """Return the unit size of the plan under way, or begin a new one."""
    path = folder / "plan.json"
    try:
        plan = json.loads(path.read_bytes())
        if plan["identity"] == identity:
            remove_files(folder.glob("*.partial"))
            return plan["unit_bytes"]
        get_logger(__name__).warning("%s holds parts made with other options: cleared", folder)
    except (FileNotFoundError, ValueError, KeyError):
        pass
    for old in folder.iterdir():
        if old.name != "lock":
            old.unlink()
    partial = folder / "plan.partial"
    partial.write_text(json.dumps({"identity": identity, "unit_bytes": unit_bytes}))
    partial.replace(path)
    return unit_bytes


def _finished(inputs: list[InputFile] | Stream, options: Options, tokenizer: Tokenizer) -> Result | None:
    """Return the result where exactly this output exists; make way where it may be overwritten."""
    present = [prefix for prefix in options.prefixes() if Path(f"{prefix}.idx").exists()]
    if not present:
        return None
    if options.is_overwriting:
        for prefix in present:
            Path(f"{prefix}.idx").unlink()
        return None
    is_partial = len(present) < len(options.prefixes())
    if is_partial and isinstance(inputs, Stream) and (options.folder / "plan.json").exists():
        return None  # ended between the shards of two keys; what it was made of is known when all is read again
    if isinstance(inputs, Stream) and not inputs.is_known_by_name:
        for _ in inputs:
            pass
    identity = _identity(inputs, options, tokenizer)
    sidecars = [read_sidecar(prefix) for prefix in present]
    if any(sidecar is None or sidecar.options.get("identity") != identity for sidecar in sidecars):
        raise DataError(
            f"{present[0]}.idx exists and was made from other inputs or options; choose another --output-prefix, "
            "or pass --overwrite"
        )
    if is_partial:
        return None
    whole = [sidecar for sidecar in sidecars if sidecar is not None]
    counts = whole[0].counts
    tokens = tuple(sidecar.tokens for sidecar in whole)
    return Result(
        tuple(present),
        whole[0].documents,
        tokens,
        counts["bad"],
        counts["duplicates"],
        counts["encoder"],
        was_finished=True,
    )
