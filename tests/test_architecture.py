"""The house keeps its floors. Reads the sources as syntax trees; imports nothing of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "megatron_omega"

FLOORS: dict[str, int] = {
    "errors": 0, "log": 0, "config": 0, "accounting": 0, "environment": 0, "launching": 0, "redaction": 0, "command_line": 0,
    "parallel": 1, "data": 1, "planner": 1,
    "model": 2,
    "training": 3, "checkpoint": 3, "monitoring": 3, "resilience": 3, "generation": 3,
    "build": 4, "calibration": 4, "dry_run": 4, "evaluation": 4, "local_launch": 4, "preview": 4, "verification": 4,
}  # fmt: skip
"""Floor of every room. A room imports its own floor and those below."""

STRANGERS: dict[str, set[str]] = {
    "parallel": {"data", "planner"},
    "data": {"parallel", "planner"},
    "planner": {"parallel", "data"},
    "training": {"model", "data"},
    "checkpoint": {"model", "data"},
    "monitoring": {"model", "data"},
    "resilience": {"model", "data"},
}
"""Rooms that do not know each other although the floors would allow it."""

DEEPSPEED_FILES = {"model/pipeline.py", "training/engine.py", "checkpoint/store.py"}
HEAVY = {"torch", "numpy", "deepspeed", "transformers", "datasets", "matplotlib", "tensorboard", "wandb"}
PRINTING_FILES = {"errors.py"}
MOST_FUNCTION_LINES = 69
MOST_FILE_LINES = 400
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
    def module(self) -> str:
        return ".".join([PACKAGE, *self.path.removesuffix(".py").removesuffix("/__init__").split("/")])

    def imports(self) -> Iterator[str]:
        """Yield every imported module or name in full, wherever in the file the import stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}: relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def source(path: str, text: str) -> Source:
    return Source(path, ast.parse(text), text.count("\n"))


def package_sources() -> list[Source]:
    root = REPOSITORY / PACKAGE
    paths = [path for path in sorted(root.rglob("*.py")) if path != root / "__init__.py"]
    return [source(path.relative_to(root).as_posix(), path.read_text()) for path in paths]


SOURCES = package_sources()


def rooms_imported(file: Source) -> set[str]:
    return {name.split(".")[1] for name in file.imports() if name.startswith(f"{PACKAGE}.")}


def floor_findings(files: list[Source]) -> list[str]:
    """Return each import that goes up, or to a stranger."""
    found = []
    for file in files:
        if file.room not in FLOORS:
            found.append(f"{file.path}: the room {file.room} has no floor; give it one in FLOORS")
            continue
        for room in sorted(rooms_imported(file) - {"__version__"}):
            if FLOORS.get(room, 99) > FLOORS[file.room]:
                found.append(f"{file.path} imports {room}, a floor above")
            if room in STRANGERS.get(file.room, ()):
                found.append(f"{file.path} imports {room}, which it must not know")
    return found


def heavy_findings(files: list[Source]) -> list[str]:
    """Return each import of a heavy library on the ground floor."""
    return [
        f"{file.path} imports {name}"
        for file in files
        if FLOORS.get(file.room) == 0
        for name in file.imports()
        if name.partition(".")[0] in HEAVY
    ]


def deepspeed_findings(files: list[Source]) -> list[str]:
    """Return each file that imports DeepSpeed and is none of the three."""
    return [
        file.path
        for file in files
        if file.path not in DEEPSPEED_FILES and any(name.partition(".")[0] == "deepspeed" for name in file.imports())
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
    """Return each call of print outside the one place that speaks to the user."""
    return [
        f"{file.path}:{node.lineno}"
        for file in files
        if file.path not in PRINTING_FILES
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


RULES = [
    floor_findings, heavy_findings, deepspeed_findings, cycle_finding, long_functions, prints, swallowed_errors,
    unannotated, global_statements,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule) -> None:  # noqa: ANN001
    assert SOURCES
    assert rule(SOURCES) == []


LONG = "def f() -> None:\n" + "    x = 1\n" * MOST_FUNCTION_LINES


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (floor_findings, "config/load.py", "import megatron_omega.parallel.topology"),
        (floor_findings, "data/loader.py", "from megatron_omega import parallel"),
        (floor_findings, "training/loop.py", "def f():\n    from megatron_omega.model.omega import Omega"),
        (floor_findings, "cellar.py", ""),
        (heavy_findings, "config/load.py", "def f():\n    import torch.nn"),
        (deepspeed_findings, "training/loop.py", "from deepspeed.runtime import zero"),
        (cycle_finding, "log.py", "from megatron_omega.errors import OmegaError"),
        (long_functions, "log.py", LONG),
        (prints, "log.py", "print(1)"),
        (swallowed_errors, "log.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (unannotated, "log.py", "def f(x) -> None: ..."),
        (unannotated, "log.py", "def f(x: int): ..."),
        (global_statements, "log.py", "def f() -> None:\n    global x\n    x = 1"),
    ],
)
def test_a_broken_rule_is_noticed(rule, path: str, text: str) -> None:  # noqa: ANN001
    neighbours = [source("errors.py", "from megatron_omega.log import get_logger"), source("data/__init__.py", "")]
    assert rule([source(path, text), *neighbours])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.path)
def test_every_module_says_what_it_is_and_fits_in_one_reading(file: Source) -> None:
    assert ast.get_docstring(file.tree) or file.num_lines == 0, "no docstring"
    assert file.num_lines <= MOST_FILE_LINES


def test_the_entry_point_has_nothing_in_it() -> None:
    assert len((REPOSITORY / "pretrain_omega.py").read_text().splitlines()) <= MOST_ENTRY_LINES
