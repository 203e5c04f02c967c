"""Tasks that every Python installation carries: functions and their docstrings. Nothing is downloaded.

    summary     a function's source without its docstring,  ->  the docstring's first line
                and its name spelled out
    default     a function's signature, and an argument     ->  the argument's default, if it is a constant
    package     the same source, or its beginning           ->  the package it belongs to, of the most frequent ones
    name        a function's name, spelled out              ->  the same words, which teaches to copy

Held out are whole files, by a hash of their path, so that no function is near one that was trained on. Of answers that
would be more than a fifth of the records, the rest is left out. Every record says where it comes from and under which
licence.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.metadata
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

Record = dict[str, str]
TEMPLATES: dict[str, tuple[str, str]] = {
    "summary": ("{text}\n# In words, {spelled}:", " {answer}"),
    "default": ("{text}\n# The default of {argument} is", " {answer}"),
    "package": ("{text}\n# From the package", " {answer}"),
    "name": ("# In words, {spelled}:", " {answer}"),
}
"""Prompt and answer of each kind. Those of summary and name end alike: copying that is learned there is used here."""
_TIMES = {"name": 3}
"""Records of a kind for each of the others': short ones, of which it takes thousands to learn to copy."""
_LONGEST, _SHORTEST = 280, 40
"""Characters of a text: a tiny model's encoder holds it, and some examples before it."""
_BEGINNING = 180
"""Characters of a function that tell its package."""
_LONGEST_ANSWER = 72
_MOST_OF_PACKAGE = 0.2
_MOST_OF_ANSWER = 0.2
"""Share of a task's training and of its held-out records with the same answer, at most: to say always the same is no
way to pass. Of fewer than five answers each may have its equal share."""
_GATHERED = 4
"""Records that are gathered for each that is wanted: some fall to balance."""
_MOST_WORDS = 6
"""Words of a name: with the prompt around them the decoder reads all of them again."""
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
        # Salted: files are read in the order of another hash of their path, which would else hold out the first ones.
        return hashlib.blake2b(place.encode(), digest_size=8, salt=b"held out").digest()[0] < 256 * _HELD_OUT


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
    """Yield the body of a function and the first line of its docstring, if that is a sentence."""
    line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    if len(node.body) > 1 and len(line.split()) > 2 and line.endswith("."):
        yield {"text": _bare(node), "spelled": spelled(node.name), "answer": line}


def default(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield the signature of a function and the default of each argument, if several have one."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(named[len(named) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [pair for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if pair[1] is not None]
    if len(pairs) > 1:
        text = f"def {node.name}({ast.unparse(arguments)})"
        for argument, value in pairs:
            if isinstance(value, ast.Constant):
                yield {"text": text, "argument": argument.arg, "answer": ast.unparse(value)}


def package(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield the beginning of a function, if it does not name its package, and the package."""
    text = _bare(node)[:_BEGINNING] if len(node.body) > 1 else ""
    if origin.package.lower() not in text.lower():
        yield {"text": text, "answer": origin.package}


def name(node: ast.FunctionDef, origin: Origin) -> Iterator[Record]:
    """Yield the words of a function's name, if it has several."""
    words = spelled(node.name)
    if 1 < len(words.split()) <= _MOST_WORDS:
        yield {"spelled": words, "answer": words}


def spelled(name: str) -> str:
    """Return the words of a name: `_readLine2` is `read line2`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").strip().lower()


def _bare(node: ast.FunctionDef) -> str:
    """Return the source of a function without its docstring."""
    bare = copy.copy(node)
    bare.body, bare.decorator_list = node.body[1:], []
    return ast.unparse(bare)


KINDS: dict[str, Callable[[ast.FunctionDef, Origin], Iterator[Record]]] = {
    "summary": summary,
    "default": default,
    "package": package,
    "name": name,
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
    """Return at most `most` records of each kind (`_TIMES` as many of some), in the order of the files; none is like
    another (`_once`).
    """
    found: dict[str, list[Record]] = {kind: [] for kind in KINDS}
    taken: Counter[tuple[str, str]] = Counter()
    seen: set[tuple[str, str]] = set()
    room = {kind: most * _TIMES.get(kind, 1) for kind in KINDS}
    enough = {kind: count if kind in _TIMES else _GATHERED * count for kind, count in room.items()}
    for number, origin in enumerate(origins[:_MOST_FILES], start=1):
        if all(len(records) >= enough[kind] for kind, records in found.items()):
            break
        part = {"source": "/".join(origin.path.parts[-3:]), "package": origin.package,
                "part": "held out" if origin.is_held_out else "train"}  # fmt: skip
        for node in functions(origin.path):
            for kind, make in KINDS.items():
                if len(found[kind]) >= enough[kind] or taken[kind, origin.package] > _MOST_OF_PACKAGE * enough[kind]:
                    continue
                for record in make(node, origin):
                    key = (kind, _once(kind, record))
                    if _is_fit(record) and key not in seen:
                        seen.add(key)
                        taken[kind, origin.package] += 1
                        found[kind].append({**record, **part})
        progress(number)
    common = {name for name, _ in Counter(one["answer"] for one in found["package"]).most_common(_PACKAGES)}
    found["package"] = [one for one in found["package"] if one["answer"] in common]
    return {kind: balanced(records, room[kind]) for kind, records in found.items()}


def _once(kind: str, record: Record) -> str:
    """Return what no two records share: of a family of functions, each would tell the answers of the others."""
    if kind in ("summary", "name"):
        return record["answer"].lower()
    return record["text"][:60] if kind == "package" else record["text"].partition("(")[0] + " " + record["argument"]


def balanced(records: list[Record], most: int) -> list[Record]:
    """Return at most `most` records, in their order, of which no answer has more than its share in either part."""
    kept: dict[str, list[Record]] = {}
    for part, share in (("train", 1 - _HELD_OUT), ("held out", _HELD_OUT)):
        mine = [one for one in records if one["part"] == part]
        counts = Counter(one["answer"] for one in mine)
        fair = max(_MOST_OF_ANSWER, 1 / max(1, len(counts)))
        room = round(share * most)
        cap = min(len(mine), room)
        while cap and cap > fair * min(room, sum(min(count, cap) for count in counts.values())):
            cap -= 1
        given: Counter[str] = Counter()
        kept[part] = []
        for one in mine:
            if given[one["answer"]] < cap and len(kept[part]) < room:
                given[one["answer"]] += 1
                kept[part].append(one)
    return [*kept["train"], *kept["held out"]]


def _is_fit(record: Record) -> bool:
    text = record.get("text")
    return (text is None or _SHORTEST <= len(text) <= _LONGEST) and 0 < len(record["answer"]) <= _LONGEST_ANSWER


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
        task = {**paths, "prompt": prompt, "target": target, "long_targets": "cut", "name": kind}
        tasks.append(task | ({"metrics": ["rouge"]} if kind == "summary" else {}))
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(tasks, sort_keys=False), encoding="utf-8")
    return path
