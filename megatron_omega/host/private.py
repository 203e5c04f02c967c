"""Folders and files of this process: what it made, and what is this user's alone, where others could write too."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_CHANGED_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where this user keeps what can be made again."""
    home = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/tmp")) / ".cache")
    return home / "megatron-omega"


def private_folder(path: Path) -> Path:
    """Return `path` as a folder that only this user can enter, made where it does not exist.

    Raises PermissionError if it is somebody else's, open to others, or a link; OSError if it cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_others(path, is_folder=True)
    return path


def refuse_others(path: Path, *, is_folder: bool = False) -> None:
    """Raise PermissionError unless `path` is a file or folder, no link, of this user and closed to others."""
    if not _is_own(path, _OTHERS, is_folder):
        raise PermissionError(f"{path} is not private to this user")


def code_folder(path: Path) -> Path:
    """Return `path` as a folder for code that will be run: nobody but this user can put any there. Made if it is not.

    Raises PermissionError if it is somebody else's, one that others can write to, or a link; OSError otherwise.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_foreign(path, is_folder=True)
    return path


def refuse_foreign(path: Path, *, is_folder: bool = False) -> None:
    """Raise PermissionError unless `path` is a file or folder, no link, of this user, which no other can change."""
    if not _is_own(path, _CHANGED_BY_OTHERS, is_folder):
        raise PermissionError(errno.EPERM, "is a link, another user's, or open to changes by others", str(path))


def _is_own(path: Path, refused_mode: int, is_folder: bool) -> bool:
    """Return whether `path` itself, not what a link names, is of this kind and user, and without `refused_mode`."""
    found = path.lstat()
    is_kind = stat.S_ISDIR(found.st_mode) if is_folder else stat.S_ISREG(found.st_mode)
    return is_kind and found.st_uid == os.geteuid() and not found.st_mode & refused_mode


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read; it appears whole. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    unfinished.replace(path)


def make_folders(folder: Path) -> list[Path]:
    """Make a folder; return the folders that had to be made, the outermost first. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
