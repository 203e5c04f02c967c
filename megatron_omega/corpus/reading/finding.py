"""Which files an input names: files, globs and folders -> `InputFile`s, each real file once; what was left aside."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_omega.corpus.reading.compression import SUFFIXES
from megatron_omega.corpus.reading.input_file import Format, InputFile
from megatron_omega.corpus.reading.recognition import FORMATS, describe
from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import read_regular
from megatron_omega.log import get_logger

_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|datasheet|authors)([._-].*)?"
    r"|(md5|sha\d*|b2)?sums?([._-].*)?|checksums?([._-].*)?|.*\.(md5|sha\d+|sums|sig|asc|crc)"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|croissant\.json|manifest\.json",
    re.IGNORECASE,
)
"""Names of files that stand beside data and speak of it."""
_MOST_NAMED = 8


@dataclass
class _Found:
    """Paths in their order, and what stands beside them."""

    paths: list[Path] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def expand_inputs(patterns: Sequence[str], forced: Format | None = None) -> list[InputFile]:
    """Return the files that `patterns` (files, globs, folders) name, sorted within each pattern, each real file once.

    Raises DataError with every pattern that names nothing and every file that cannot be read.
    """
    found: dict[tuple[int, int], InputFile] = {}
    findings: list[str] = []
    for pattern in patterns:
        named = _named_by(pattern)
        findings += named.findings
        if not named.paths and not named.findings:
            findings.append(f"input {pattern} names no file; give files, quoted globs or folders")
        if named.aside:
            _say_aside(pattern, named.aside)
        for path in named.paths:
            try:
                found.setdefault(_real(path), describe(path, forced))
            except DataError as error:
                findings += error.findings
    if findings:
        raise DataError(*findings)
    return list(found.values())


def _real(path: Path) -> tuple[int, int]:
    """Return what two names of one file have in common."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror}); mend it or leave it out") from None
    return status.st_dev, status.st_ino


def _say_aside(pattern: str, aside: Sequence[str]) -> None:
    more = f" and {len(aside) - _MOST_NAMED} more" if len(aside) > _MOST_NAMED else ""
    names = ", ".join(aside[:_MOST_NAMED])
    get_logger(__name__).warning("%s: left aside %s%s; name a file itself to read it", pattern, names, more)


def _named_by(pattern: str) -> _Found:
    path = Path(pattern)
    if path.is_dir():
        return _inside(path)
    if path.exists() or path.is_symlink():
        return _one(path)
    every = _Found()
    for name in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 (a pattern may be absolute)
        part = _inside(Path(name)) if Path(name).is_dir() else _one(Path(name))
        every.paths += part.paths
        every.findings += part.findings
        every.aside += [item for item in part.aside if item not in every.aside]
    return every


def _one(path: Path) -> _Found:
    if path.exists():
        return _Found([path])
    return _Found(findings=[f"input {path} is a link to nothing; get the file it stands for, or remove it"])


def _inside(folder: Path) -> _Found:
    """Return the files of a folder and of all folders in it, through links, each folder once."""
    if (folder / "state.json").exists():
        return _Found(saved_files(folder))
    if (folder / "dataset_dict.json").exists():
        raise DataError(
            f"input {folder} is a data set of several splits; name one of its folders, or give it to --dataset"
        )
    found = _Found()
    _walk(folder, folder, set(), found)
    found.paths.sort()
    if any(_has_records(path) for path in found.paths):
        beside = [path for path in found.paths if _ABOUT_DATA.fullmatch(path.name) and not _is_named_records(path)]
        found.aside = [str(path.relative_to(folder)) for path in beside] + found.aside
        found.paths = [path for path in found.paths if path not in set(beside)]
    return found


def _walk(root: Path, folder: Path, seen: set[tuple[int, int]], found: _Found) -> None:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.findings.append(f"input folder {folder} cannot be read ({error.strerror}); mend it or name its files")
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith((".", "_")):
            found.aside.append(str(path.relative_to(root)) + ("/" if entry.is_dir() else ""))
        elif entry.is_dir():
            _walk(root, path, seen, found)
        else:
            part = _one(path)
            found.paths += part.paths
            found.findings += part.findings


def _inner_suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return inner.suffix.lower()


def _has_records(path: Path) -> bool:
    """Tell whether a file holds records by its name, so that others may speak of it."""
    return _inner_suffix(path) in FORMATS and not _ABOUT_DATA.fullmatch(path.name)


def _is_named_records(path: Path) -> bool:
    return _inner_suffix(path) in FORMATS and not path.name.lower().endswith(".json")


def saved_files(folder: Path) -> list[Path]:
    """Return the files, in order, of a Hugging Face data set that `save_to_disk` wrote."""
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in _json_file(state)["_data_files"]]
        paths = [folder / name for name in names]
    except (TypeError, KeyError) as error:
        raise DataError(f"{state} is not that of a saved data set ({error!r}); save it again") from None
    strange = [name for name, path in zip(names, paths, strict=True) if path.parent != folder or name in ("", "..")]
    if strange:
        raise DataError(f"{state} names {strange[0]!r}, which does not lie in its folder; save the data set again")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{state} names {missing[0].name}, which is not there; copy the whole folder")
    return paths


def saved_splits(folder: Path) -> list[str]:
    """Return the names of the splits of a Hugging Face data set that `save_to_disk` wrote."""
    path = folder / "dataset_dict.json"
    splits = content["splits"] if isinstance(content := _json_file(path), dict) and "splits" in content else None
    if not isinstance(splits, list) or not all(isinstance(name, str) and Path(name).name == name for name in splits):
        raise DataError(f"{path} does not name the splits of a saved data set; save it again")
    return splits


def _json_file(path: Path) -> Any:
    try:
        return orjson.loads(read_regular(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not that of a saved data set ({error}); save it again") from None
