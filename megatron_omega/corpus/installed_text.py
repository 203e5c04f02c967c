"""Real text that every Python installation carries: documentation, docstrings, READMEs, licences.

The order is a fixed shuffle (so that any cut by documents is a fair sample), exact duplicates are left out, and each
kind of text has a share, so that licences and generated reference pages do not crowd out prose. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import email
import hashlib
import json
import re
import site
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHARES = {"docstring": 0.78, "documentation": 0.10, "readme": 0.10, "licence": 0.02}
SUFFIXES = {".rst", ".md", ".txt"}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "data", "vendor", "_vendor", "locale", "include"}
SMALLEST, LARGEST = 200, 20_000  # characters of a document
LARGEST_SOURCE, LEAST_PROSE = 150_000, 0.35  # a module is parsed where that share of it stands in triple quotes
LARGEST_SHARE = 0.06  # of all text, for one package and kind
QUOTED = re.compile(r'"""(.+?)"""', re.DOTALL)


@dataclass(frozen=True)
class Written:
    """What a file of text holds."""

    documents: int
    size_bytes: int
    """Of the text itself."""


def roots() -> list[Path]:
    """Return the standard library and the folders of installed packages."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    paths += site.getsitepackages()
    return sorted({Path(path).resolve() for path in paths if path and Path(path).is_dir()})


def standard_library() -> tuple[set[Path], set[Path]]:
    """Return the standard library's folder, and the folders of packages inside of it."""
    folder = Path(sysconfig.get_path("stdlib")).resolve()
    return {folder}, {folder / "site-packages", folder / "dist-packages"}


def files_below(root: Path, others: set[Path]) -> Iterator[Path]:
    """Walk `root` in a fixed order, leaving out the other roots inside it."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if path.name not in SKIPPED_FOLDERS and path not in others and not path.is_symlink():
                yield from files_below(path, others)
        elif path.suffix in SUFFIXES | {".py"} or path.parent.name.endswith((".dist-info", "licenses")):
            yield path


def kind_of(path: Path) -> str | None:
    """Say what kind of text a file is; None for files without any."""
    name = path.name.lower()
    if name.startswith(("license", "licence", "copying", "notice", "authors")):
        return "licence"
    if name == "metadata" or name.startswith("readme"):
        return "readme"
    if path.suffix == ".py":
        return "docstring"
    if path.suffix in SUFFIXES and not name.startswith(
        ("top_level", "entry_points", "requirements", "sources", "cmakelists")
    ):
        return "documentation"
    return None


def docstrings(source: str) -> str:
    """Return the docstrings of a module, its classes and functions, each under its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""
    found: list[str] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) > 60:
            found.append(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
        waiting += reversed(node.body)
    return "\n\n".join(found)


def text_of(path: Path, kind: str) -> str:
    """Return the text of a file; empty if it has none that is readable."""
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if kind == "docstring":
        prose = sum(map(len, QUOTED.findall(raw))) if len(raw) <= LARGEST_SOURCE else 0
        return docstrings(raw) if prose > max(SMALLEST, LEAST_PROSE * len(raw)) else ""
    if path.name == "METADATA":
        body = email.message_from_string(raw).get_payload()
        return body if isinstance(body, str) else ""
    return raw


def is_prose(text: str) -> bool:
    """Tell text from tables of numbers and lists of names: mostly letters and spaces, words of usual length."""
    sample = text[:4000]
    letters = sum(character.isalpha() or character == " " for character in sample)
    words = sample.split()
    return letters > 0.72 * len(sample) and 3 < len(sample) / max(1, len(words)) < 11


def documents(text: str) -> Iterator[str]:
    """Cut a text at blank lines into documents of bearable length."""
    text = text.replace("\0", "").replace("\r\n", "\n").strip()
    while len(text) > LARGEST:
        cut = text.rfind("\n\n", LARGEST // 2, LARGEST)
        cut = cut if cut > 0 else LARGEST
        yield text[:cut].strip()
        text = text[cut:].strip()
    yield text


def candidates(places: set[Path], others: set[Path]) -> Iterator[tuple[str, str, str, Path]]:
    """Yield (shuffle key, kind, package, path) of every file below `places` that may carry text, in a fixed shuffle.

    Folders in `others` are left out.
    """
    found: dict[str, tuple[str, str, str, Path]] = {}
    for root in sorted(places):
        for path in files_below(root, (places | others) - {root}):
            kind = kind_of(path)
            if kind:
                place = path.relative_to(root)
                key = hashlib.blake2b(str(place).encode(), digest_size=8).hexdigest()
                found.setdefault(str(place), (key, kind, place.parts[0], path))
    yield from sorted(found.values())


def gather(
    files: Iterable[tuple[str, str, str, Path]], budget: int, progress: Callable[[float], None]
) -> list[dict[str, str]]:
    """Read files until each kind has its share of `budget` bytes; leave out what is no prose or was seen before."""
    room = {kind: share * budget for kind, share in SHARES.items()}
    taken: Counter[tuple[str, str]] = Counter()
    seen: set[bytes] = set()
    found: list[tuple[str, dict[str, str]]] = []
    for key, kind, package, path in files:
        if room[kind] <= 0 or taken[kind, package] > LARGEST_SHARE * budget:
            continue
        for number, text in enumerate(documents(text_of(path, kind))):
            digest = hashlib.blake2b(" ".join(text.split()).lower().encode(), digest_size=12).digest()
            if len(text) < SMALLEST or digest in seen or not is_prose(text):
                continue
            seen.add(digest)
            room[kind] -= len(text.encode())
            taken[kind, package] += len(text.encode())
            order = hashlib.blake2b(f"{key}{number}".encode(), digest_size=8).hexdigest()
            found.append((order, {"text": text, "kind": kind, "source": "/".join(path.parts[-3:])}))
        progress((budget - sum(max(0, left) for left in room.values())) / 1e6)
        if all(left <= 0 for left in room.values()):
            break
    return [document for _, document in sorted(found, key=lambda item: item[0])]


def write_installed_text(
    output: Path,
    megabytes: float,
    progress: Callable[[float], None] = lambda _: None,
    only_standard_library: bool = False,
) -> Written:
    """Write `megabytes` of text to the jsonl `output`: objects with text, kind and source.

    `progress` is called with the megabytes found so far. The standard library's text does not depend on what else is
    installed.
    """
    places, others = standard_library() if only_standard_library else (set(roots()), set[Path]())
    found = gather(candidates(places, others), int(megabytes * 1e6), progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in found)
    partial.replace(output)
    return Written(len(found), sum(len(document["text"].encode()) for document in found))
