"""Tasks that every Python installation carries: functions and their docstrings. Nothing is downloaded.

    summary     a function's source without its docstring   ->  the docstring's first line
    default     a function's signature, and an argument     ->  the argument's default
    package     a docstring                                 ->  the package it belongs to, of the most frequent ones

Held out are whole files, by a hash of their path, so that no function is near one that was trained on. Every record
says where it comes from and under which licence.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.metadata
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

Record = dict[str, str]
TEMPLATES: dict[str, tuple[str, str]] = {
    "summary": ("{text}\n# In short:", " {answer}"),
    "default": ("{text}\n# The default of {argument} is", " {answer}"),
    "package": ("{text}\n# From the package", " {answer}"),
}
_LONGEST, _SHORTEST = 420, 40
"""Characters of a text: a tiny model's encoder holds it."""
_LONGEST_ANSWER = 72
_MOST_OF_PACKAGE = 0.2
_MOST_OF_ANSWER = 0.2
"""Share of a task's records with the same answer, at most: to say always the same is no way to pass."""
_PACKAGES = 8
_HELD_OUT = 0.1
_MOST_FILES = 2500


@dataclass(frozen=True)
class Origin:
    """A file of source."""

    path: Path
    package: str

    @property
    def is_held_out(self) -> bool:
        place = "/".join(self.path.parts[-3:])
        return hashlib.blake2b(place.encode(), digest_size=8).digest()[0] < 256 * _HELD_OUT


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield the documented functions of a file; nothing if it cannot be parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            yield node


def summary(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield the body of a function and the first line of its docstring."""
    line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    bare = copy.copy(node)
    bare.body, bare.decorator_list = node.body[1:], []
    if len(node.body) > 1 and len(line.split()) > 2:
        yield {"text": ast.unparse(bare), "answer": line}


def default(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield the signature of a function and the default of its last argument that has a short one."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(named[len(named) - len(arguments.defaults) :], arguments.defaults, strict=True))
    if len(pairs) > 1:
        argument, value = pairs[len(node.name) % len(pairs)]
        if isinstance(value, ast.Constant):
            text = f"def {node.name}({ast.unparse(arguments)})"
            yield {"text": text, "argument": argument.arg, "answer": ast.unparse(value)}


def package(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield a docstring and its package."""
    text = " ".join((ast.get_docstring(node) or "").split())[:_LONGEST]
    if origin.package.lower() not in text.lower():
        yield {"text": text, "answer": origin.package}


KINDS: dict[str, Callable[[ast.FunctionDef, Origin], Iterator[Record]]] = {
    "summary": summary,
    "default": default,
    "package": package,
}


def licence_of(package: str) -> str:
    """Return what a distribution says of its licence; Python's own for the standard library."""
    try:
        about = importlib.metadata.metadata(package).json
    except importlib.metadata.PackageNotFoundError:
        return "PSF-2.0 or as its package says"
    told = about.get("license_expression") or about.get("license") or "see its package"
    return str(told).partition("\n")[0][:60]


def gather(
    origins: list[Origin], most: int, progress: Callable[[int], object] = lambda _: None
) -> dict[str, list[Record]]:
    """Return at most `most` records of each kind, no text twice, in the order of the files."""
    found: dict[str, list[Record]] = {kind: [] for kind in KINDS}
    taken: Counter[tuple[str, str]] = Counter()
    given: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    for number, origin in enumerate(origins[:_MOST_FILES], start=1):
        if all(len(records) >= 2 * most for records in found.values()):
            break
        for node in functions(origin.path):
            for kind, make in KINDS.items():
                if len(found[kind]) >= 2 * most or taken[kind, origin.package] > _MOST_OF_PACKAGE * most:
                    continue
                for record in make(node, origin):
                    is_frequent = given[kind, record["answer"]] > _MOST_OF_ANSWER * most
                    if _is_fit(record) and not is_frequent and f"{kind} {record['text']}" not in seen:
                        given[kind, record["answer"]] += 1
                        seen.add(f"{kind} {record['text']}")
                        taken[kind, origin.package] += 1
                        part = "held out" if origin.is_held_out else "train"
                        source = "/".join(origin.path.parts[-3:])
                        found[kind].append({**record, "source": source, "package": origin.package, "part": part})
        progress(number)
    common = {name for name, _ in Counter(one["answer"] for one in found["package"]).most_common(_PACKAGES)}
    found["package"] = [one for one in found["package"] if one["answer"] in common]
    return {kind: records[:most] for kind, records in found.items()}


def _is_fit(record: Record) -> bool:
    return _SHORTEST <= len(record["text"]) <= _LONGEST and 0 < len(record["answer"]) <= _LONGEST_ANSWER


def write_tasks(folder: Path, found: dict[str, list[Record]]) -> Path:
    """Write records, held-out records and the list of tasks; return the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    licences = {name: licence_of(name) for name in {one["package"] for records in found.values() for one in records}}
    tasks = []
    for kind, records in found.items():
        for part, name in (("train", kind), ("held out", f"{kind}-held-out")):
            lines = [
                json.dumps({k: v for k, v in one.items() if k != "part"} | {"licence": licences[one["package"]]})
                for one in records
                if one["part"] == part
            ]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        prompt, target = TEMPLATES[kind]
        paths = {"path": str(folder / f"{kind}.jsonl"), "validation": str(folder / f"{kind}-held-out.jsonl")}
        tasks.append({**paths, "prompt": prompt, "target": target, "long_targets": "cut", "name": kind})
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(tasks, sort_keys=False), encoding="utf-8")
    return path
