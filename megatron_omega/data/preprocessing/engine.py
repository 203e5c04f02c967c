"""The whole of preprocessing: inputs -> parts -> shard, resumable by the same command.

Beside the output stands `{output_prefix}.parts/` while work is under way: a plan, the finished parts and a lock. The
plan names what the output depends on; a folder of another plan is cleared, parts of this one are kept.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_omega.data.corpus import InputFile
from megatron_omega.data.encoding import open_encoder
from megatron_omega.data.preprocessing.finish import check_reports, check_tally, join_parts, write_bad
from megatron_omega.data.preprocessing.options import Options, Progress, Result, Stream, Tally
from megatron_omega.data.preprocessing.parts import PartMaker, PartReport, Task, read_report
from megatron_omega.data.preprocessing.pool import make_parts
from megatron_omega.data.preprocessing.tasks import automatic_unit, plan_tasks, sample_texts, spooled_tasks, task_bytes
from megatron_omega.data.sidecar import read_sidecar
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.log import get_logger

_PATIENCE_RECORDS = 10_000


def preprocess(inputs: list[InputFile] | Stream, options: Options, progress: Progress = lambda _: None) -> Result:
    """Make the shards of `inputs`. Raises DataError; finished parts then remain and are used by the next call."""
    tokenizer = Tokenizer.open(options.tokenizer_model)
    names = inputs.name if isinstance(inputs, Stream) else [asdict(file) for file in inputs]
    identity = options.identity(tokenizer, names)
    finished = _finished(options, identity)
    if finished is not None:
        shutil.rmtree(options.folder, ignore_errors=True)
        return finished
    try:
        with _locked(options.folder):
            result = _make(inputs, options, tokenizer, identity, progress)
        shutil.rmtree(options.folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or options.output_prefix} cannot be written ({error.strerror}); finished parts are kept, "
            "the same command goes on from there"
        ) from None
    return result


def _make(
    inputs: list[InputFile] | Stream, options: Options, tokenizer: Tokenizer, identity: str, progress: Progress
) -> Result:
    folder = options.folder
    if isinstance(inputs, Stream):
        _open_plan(folder, identity, 0)
        tasks: Iterable[Task] = spooled_tasks(inputs, folder)
        samples: list[str] = []
    else:
        unit_bytes = _open_plan(folder, identity, options.unit_bytes or automatic_unit(inputs))
        tasks = plan_tasks(inputs, unit_bytes, options.shard)
        samples = sample_texts(tasks, options)
    encoder = open_encoder(tokenizer, samples=samples, is_native_allowed=options.is_native_allowed)
    maker = PartMaker(
        folder, options.keys, tokenizer, encoder, options.append_eod, options.is_deduplicated, options.max_record_bytes
    )
    reports = _make_missing(maker, tasks, options, progress)
    write_bad(reports, inputs, options)
    check_reports(reports, inputs, options)
    return join_parts(reports, inputs, options, tokenizer, identity, encoder.name)


def _make_missing(maker: PartMaker, tasks: Iterable[Task], options: Options, progress: Progress) -> list[PartReport]:
    reports: dict[int, PartReport] = {}
    sizes: dict[int, int] = {}
    tally = Tally()

    def note(report: PartReport) -> None:
        reports[report.number] = report
        tally.add(report, sizes.pop(report.number))
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
        if maker.folder.joinpath(f"spool-{made.number:08d}").exists():
            maker.folder.joinpath(f"spool-{made.number:08d}").unlink()
    return [reports[number] for number in sorted(reports)]


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
            return plan["unit_bytes"]
        get_logger(__name__).warning("%s holds parts of other inputs or options: cleared", folder)
    except (FileNotFoundError, ValueError, KeyError):
        pass
    for old in folder.iterdir():
        if old.name != "lock":
            old.unlink()
    partial = folder / "plan.partial"
    partial.write_text(json.dumps({"identity": identity, "unit_bytes": unit_bytes}))
    partial.replace(path)
    return unit_bytes


def _finished(options: Options, identity: str) -> Result | None:
    """Return the result where exactly this output exists; make way where it may be overwritten."""
    present = [prefix for prefix in options.prefixes() if Path(f"{prefix}.idx").exists()]
    if not present:
        return None
    if options.is_overwriting:
        for prefix in present:
            Path(f"{prefix}.idx").unlink()
        return None
    sidecars = [read_sidecar(prefix) for prefix in present]
    if any(sidecar is None or sidecar.options.get("identity") != identity for sidecar in sidecars):
        raise DataError(
            f"{present[0]}.idx exists and was made from other inputs or options; choose another --output-prefix, "
            "or pass --overwrite"
        )
    if len(present) < len(options.prefixes()):
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
