"""The house keeps its rules. Reads the sources as syntax trees; imports nothing of the package."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "megatron_omega"

ALLOWED: dict[str, str] = {
    "errors": "", "log": "host", "host": "errors",
    "config": "",
    "parallel": "config", "accounting": "config", "data": "config", "launching": "config",
    "corpus": "data",
    "planner": "accounting config launching",
    "model": "config parallel", "engine": "config parallel",
    "training": "config engine",
    "checkpoint": "config engine parallel",
    "monitoring": "config parallel planner training",
    "watchdog": "config training",
    "health": "accounting config engine parallel training",
    "export": "checkpoint config data model parallel",
    "run": "accounting checkpoint config data engine health model monitoring parallel planner training watchdog",
    "generation": "export model data parallel config",
    "studies": "run planner model parallel launching accounting config data export engine training checkpoint health",
    "tasks": "accounting config data export generation checkpoint model parallel run",
    "commands": "*",
}  # fmt: skip
"""Which rooms a room may import; `*` is all. Everybody may import those of `EVERYBODYS`."""

EVERYBODYS = {"errors", "log", "host"}
LIGHT = {"errors", "log", "host", "config", "accounting", "planner", "launching", "watchdog"}
LIGHT_BUT = {"launching/local_ranks.py", "planner/plot.py"}
"""Files of such a room that may: for tools and tests, never for what must start at once."""

DEEPSPEED_FILES = {"model/pipeline.py"}
DEEPSPEED_ROOMS = {"engine"}
HEAVY = {"torch", "numpy", "deepspeed", "transformers", "datasets", "matplotlib", "tensorboard", "wandb"}
PRINTING_ROOMS = {"commands"}
FACES = {"__init__.py", "__main__.py", "interface.py"}
"""What the package shows to others; no rooms."""
TRAVELLING = "export/hugging_face/model/"
"""Code that goes with the weights: its files import each other, by relative imports, and these."""
TRAVELLERS_MAY = {"__future__", "json", "typing", "tokenizers", "torch", "transformers"}
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400
MOST_FILES = 20
MOST_LOOSE_MODULES = 2
MOST_ENTRY_LINES = 60


@dataclass(frozen=True)
class Source:
    """One module of the package."""

    path: str
    """Inside the package, as in `config/load.py`."""
    tree: ast.Module
    num_lines: int = 0

    @property
    def room(self) -> str:
        return self.path.partition("/")[0].removesuffix(".py")

    @property
    def travels(self) -> bool:
        """Whether it is copied into exports, where it has to do without this package."""
        return self.path.startswith(TRAVELLING) and not self.path.endswith("__init__.py")

    @property
    def module(self) -> str:
        return ".".join([PACKAGE, *self.path.removesuffix(".py").removesuffix("/__init__").split("/")])

    def imports(self) -> Iterator[str]:
        """Yield every imported module or name in full, wherever in the file the import stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == (1 if node.level and self.travels else 0), f"{self.path}: relative import"
                module = f"{self.module.rpartition('.')[0]}.{node.module}" if node.level else node.module
                yield from (f"{module}.{alias.name}" for alias in node.names)


def source(path: str, text: str) -> Source:
    return Source(path, ast.parse(text), text.count("\n"))


def package_sources() -> list[Source]:
    root = REPOSITORY / PACKAGE
    paths = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).as_posix() not in FACES]
    return [source(path.relative_to(root).as_posix(), path.read_text()) for path in paths]


SOURCES = package_sources()


def rooms_imported(file: Source) -> set[str]:
    return {name.split(".")[1] for name in file.imports() if name.startswith(f"{PACKAGE}.")}


def allowed(room: str) -> set[str]:
    """Return the rooms that `room` may import."""
    named = ALLOWED[room]
    return set(ALLOWED) if named == "*" else {room, *named.split(), *(EVERYBODYS if room not in EVERYBODYS else ())}


def table_findings(files: list[Source]) -> list[str]:
    """Return each import that the table does not allow."""
    found = []
    for file in files:
        if file.room not in ALLOWED:
            found.append(f"{file.path}: the room {file.room} is not in the table; say in ALLOWED what it may import")
            continue
        strangers = rooms_imported(file) - {"__version__"} - allowed(file.room)
        found += [f"{file.path} imports {room}, which {file.room} must not know" for room in sorted(strangers)]
    return found


def unused_entries(files: list[Source]) -> list[str]:
    """Return each entry of the table that no import needs."""
    used: dict[str, set[str]] = {}
    for file in files:
        used.setdefault(file.room, set()).update(rooms_imported(file))
    return [
        f"{room}: {name}"
        for room, names in ALLOWED.items()
        if names != "*" and room in used
        for name in names.split()
        if name not in used[room]
    ]


def heavy_findings(files: list[Source]) -> list[str]:
    """Return each import of a heavy library in a room that must start at once."""
    return [
        f"{file.path} imports {name}"
        for file in files
        if file.room in LIGHT and file.path not in LIGHT_BUT
        for name in file.imports()
        if name.partition(".")[0] in HEAVY
    ]


def deepspeed_findings(files: list[Source]) -> list[str]:
    """Return each file that imports DeepSpeed and is none of those that may."""
    return [
        file.path
        for file in files
        if file.path not in DEEPSPEED_FILES
        and file.room not in DEEPSPEED_ROOMS
        and any(name.partition(".")[0] == "deepspeed" for name in file.imports())
    ]


def ties_of_travellers(files: list[Source]) -> list[str]:
    """Return each import by which code that travels with the weights would miss something there."""
    package = f"{PACKAGE}.{TRAVELLING.replace('/', '.')}"
    return [
        f"{file.path} imports {name}"
        for file in files
        if file.travels
        for name in file.imports()
        if name.partition(".")[0] not in TRAVELLERS_MAY and not name.startswith(package)
    ]


def cycle_finding(files: list[Source]) -> list[str]:
    """Return the modules of an import cycle; an empty list where there is none."""
    modules = {file.module for file in files}
    graph: dict[str, set[str]] = {}
    for file in files:
        owners = {name if name in modules else name.rpartition(".")[0] for name in file.imports()}
        graph[file.module] = (owners & modules) - {file.module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def long_functions(files: list[Source]) -> list[str]:
    """Return each function that is too long to read at once."""
    return [
        f"{file.path}:{node.lineno} {node.name}"
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES
    ]


def prints(files: list[Source]) -> list[str]:
    """Return each call of print outside the commands, which speak to the user."""
    return [
        f"{file.path}:{node.lineno}"
        for file in files
        if file.room not in PRINTING_ROOMS
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def swallowed_errors(files: list[Source]) -> list[str]:
    """Return each handler that catches everything and does nothing."""
    return [
        f"{file.path}:{node.lineno}"
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]


def unannotated(files: list[Source]) -> list[str]:
    """Return each function with an argument or a result that has no type."""
    found = []
    for file in files:
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            plain = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            arguments = [a for a in plain if a is not None and a.arg not in {"self", "cls"}]
            if node.returns is None or any(argument.annotation is None for argument in arguments):
                found.append(f"{file.path}:{node.lineno} {node.name}")
    return found


def global_statements(files: list[Source]) -> list[str]:
    """Return each `global`."""
    return [f"{f.path}:{n.lineno}" for f in files for n in ast.walk(f.tree) if isinstance(n, ast.Global)]


def crowded_rooms(files: list[Source]) -> list[str]:
    """Return each folder with too many files; commands/ has a file for each verb."""
    folders = Counter(file.path.rpartition("/")[0] for file in files if not file.path.endswith("__init__.py"))
    loose = folders.pop("", 0)
    found = [f"{folder}/ has {count} files" for folder, count in folders.items() if count > MOST_FILES]
    found = [line for line in found if not line.startswith("commands/ ")]
    return found + ([f"{loose} loose modules"] if loose > MOST_LOOSE_MODULES else [])


RULES = [
    table_findings, unused_entries, heavy_findings, deepspeed_findings, ties_of_travellers, cycle_finding, long_functions, prints, swallowed_errors,
    unannotated, global_statements, crowded_rooms,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule) -> None:  # noqa: ANN001
    assert SOURCES
    assert rule(SOURCES) == []


LONG = "def f() -> None:\n" + "    x = 1\n" * MOST_FUNCTION_LINES


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (table_findings, "config/load.py", "import megatron_omega.parallel.topology"),
        (table_findings, "data/loader.py", "from megatron_omega import parallel"),
        (table_findings, "training/loop.py", "def f():\n    from megatron_omega.model.omega import Omega"),
        (table_findings, "cellar.py", ""),
        (unused_entries, "planner/memory.py", "from megatron_omega import accounting, config"),
        (heavy_findings, "config/load.py", "def f():\n    import torch.nn"),
        (deepspeed_findings, "training/loop.py", "from deepspeed.runtime import zero"),
        (ties_of_travellers, "export/hugging_face/model/a.py", "from megatron_omega.export.native import DTYPES"),
        (ties_of_travellers, "export/hugging_face/model/a.py", "import numpy"),
        (cycle_finding, "log.py", "from megatron_omega.errors import OmegaError"),
        (long_functions, "log.py", LONG),
        (prints, "log.py", "print(1)"),
        (swallowed_errors, "log.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (unannotated, "log.py", "def f(x) -> None: ..."),
        (unannotated, "log.py", "def f(x: int): ..."),
        (crowded_rooms, "one_more.py", ""),
        (global_statements, "log.py", "def f() -> None:\n    global x\n    x = 1"),
    ],
)
def test_a_broken_rule_is_noticed(rule, path: str, text: str) -> None:  # noqa: ANN001
    neighbours = [
        source("errors.py", "from megatron_omega.log import get_logger"),
        source("data/__init__.py", ""),
        source("two_more.py", ""),
    ]
    assert rule([source(path, text), *neighbours])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.path)
def test_every_module_says_what_it_is_and_fits_in_one_reading(file: Source) -> None:
    assert ast.get_docstring(file.tree) or file.num_lines == 0, "no docstring"
    assert file.num_lines <= MOST_FILE_LINES


def test_the_entry_point_has_nothing_in_it() -> None:
    assert len((REPOSITORY / "pretrain_omega.py").read_text().splitlines()) <= MOST_ENTRY_LINES


def test_no_two_test_files_share_a_module_name() -> None:
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    names = Counter(path.stem for path in files)
    assert [name for name, count in names.items() if count > 1] == []
