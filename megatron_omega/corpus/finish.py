"""Parts -> result: bad records listed and judged, origins of documents, the joined shard with its sidecar."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omega.corpus.join import Parts, first_occurrences, publish, write_joined
from megatron_omega.corpus.options import Options, Result, Stream, Tally
from megatron_omega.corpus.parts import PartReport, UnitReport, part_path
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.corpus.reading.tables import import_arrow
from megatron_omega.data.indexed import token_dtype
from megatron_omega.data.origins import Origins, Runs, join_runs, reordered, unit_runs
from megatron_omega.data.permutation import Permutation, derive_key
from megatron_omega.data.sidecar import Sidecar
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError


def check_tally(tally: Tally, options: Options, first: str = "") -> None:
    """Raise DataError if more records are bad than the options allow."""
    if tally.bad > options.max_bad_fraction * tally.records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.reasons.most_common(4))
        raise DataError(
            f"{tally.bad} of {tally.records} records are bad ({reasons}){first}, more than --max-bad-fraction "
            f"{options.max_bad_fraction:g}; see {options.bad_path}, then mend the input, set --json-keys, or raise the "
            "limit"
        )


def check_reports(reports: list[PartReport], inputs: list[InputFile] | Stream, options: Options) -> None:
    """Raise DataError if the input gave too many bad records or no document."""
    tally = Tally()
    for report in reports:
        tally.add(report, 0)
    if options.shard[1] > 1 and not tally.records:
        return  # more shards than there is input for: this one is empty
    if not tally.records:
        raise DataError("the input holds no record at all; give files that have text")
    first = next(bad_records(reports, inputs), None)
    check_tally(tally, options, f", the first in {first['file']} line {first['line']}" if first else "")
    if options.shard[1] == 1 and not tally.documents:
        raise DataError("the input holds no document with text; give files that have some")


def bad_records(reports: list[PartReport], inputs: list[InputFile] | Stream) -> Iterator[dict[str, Any]]:
    """Yield file, line (from 1) and reason of every bad record."""
    names = file_names(inputs)
    for unit, first in first_records(reports, inputs):
        for position, reason in unit.bad:
            yield {"file": names[unit.file], "line": first + position + 1, "reason": reason}


def write_bad(reports: list[PartReport], inputs: list[InputFile] | Stream, options: Options) -> None:
    """List every bad record in `{output_prefix}.bad.jsonl`; no file if there is none."""
    partial = options.bad_path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in bad_records(reports, inputs))
        size = file.tell()
    if size:
        partial.replace(options.bad_path)
    else:
        partial.unlink()
        options.bad_path.unlink(missing_ok=True)


def file_names(inputs: list[InputFile] | Stream) -> list[str]:
    return [inputs.name] if isinstance(inputs, Stream) else [file.path for file in inputs]


def first_records(reports: list[PartReport], inputs: list[InputFile] | Stream) -> Iterator[tuple[UnitReport, int]]:
    """Yield every unit with the number of records that stand before it in its file."""
    before: Counter[int] = Counter()
    is_first = True
    for unit in (unit for report in reports for unit in report.units):
        if is_first and unit.start and not isinstance(inputs, Stream):
            before[unit.file] = count_records(inputs[unit.file], unit.start)
        is_first = False
        yield unit, before[unit.file]
        before[unit.file] += unit.lines


def count_records(file: InputFile, stop: int) -> int:
    """Return how many records of `file` begin before `stop` (bytes or row groups), for a shard that starts there."""
    if file.format == "parquet":
        metadata = import_arrow()[1].read_metadata(file.path)
        return sum(metadata.row_group(group).num_rows for group in range(stop))
    lines, left = 0, stop - 1
    with Path(file.path).open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 22))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines + 1


def join_parts(
    reports: list[PartReport],
    inputs: list[InputFile] | Stream,
    options: Options,
    tokenizer: Tokenizer,
    identity: str,
    encoder: str,
) -> Result:
    names = tuple(report.name for report in reports)
    made = sum(report.documents for report in reports)
    order = _order(names, made, options)
    origins = Origins(tuple(file_names(inputs)), _runs(reports, inputs))
    if order is not None:
        origins = Origins(origins.files, reordered(origins, order))
    documents = made if order is None else len(order)
    bad = Counter(reason for report in reports for unit in report.units for _, reason in unit.bad)
    counts = {"bad": dict(bad), "duplicates": made - documents, "encoder": encoder}
    dtype = token_dtype(tokenizer.vocab_size)
    totals: list[int] = []
    for key, (name, prefix) in enumerate(zip(options.keys, options.prefixes(), strict=True)):
        tokens = write_joined(Parts(options.folder, names, key, dtype), prefix, order)
        totals.append(tokens)
        kept = {"identity": identity, "append_eod": options.append_eod, "tokenizer_model": options.tokenizer_model}
        sidecar = Sidecar(
            tokenizer.fingerprint, tokenizer.vocab_size, documents, tokens, dtype.name, name, kept, counts
        )
        publish(prefix, sidecar, origins)
    return Result(tuple(options.prefixes()), documents, tuple(totals), dict(bad), made - documents, encoder)


def _order(names: tuple[str, ...], made: int, options: Options) -> NDArray[np.int64] | None:
    """Return which document stands at each place, or None where all stand as they came."""
    if not made or (not options.is_deduplicated and options.shuffle_seed is None):
        return None
    kept = np.arange(made)
    if options.is_deduplicated:
        kept = first_occurrences([part_path(options.folder, name, "hash") for name in names])
    if options.shuffle_seed is None:
        return kept
    return kept[Permutation(len(kept), derive_key("documents", options.shuffle_seed)).many(np.arange(len(kept)))]


def _runs(reports: list[PartReport], inputs: list[InputFile] | Stream) -> Runs:
    pieces: list[Runs] = []
    document = 0
    for unit, first in first_records(reports, inputs):
        pieces.append(unit_runs(document, unit.file, first, unit.lines, unit.without_document))
        document += unit.documents
    return join_runs(pieces)
