"""Nothing that reads a checkpoint can be made to run what it reads."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from parts import Saved

from megatron_omega.checkpoint.catalogue import check_structure
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.errors import CheckpointError

REPOSITORY = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "dist.all_gather_object",
         "dist.broadcast_object_list", "dist.gather_object", "torch.serialization.load", "load_checkpoint", "load_state_dict_from_file"}  # fmt: skip


def dangers(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("SafeLoader") for base in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from dangerous_call(node, safe_loaders)


def dangerous_call(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    name = ast.unparse(call.func)
    if name in CALLS and words.get("Loader") not in safe_loaders:
        yield name
    if words.get("allow_pickle", "False") != "False":
        yield f"{name} with pickles"


def test_no_source_unpickles_or_evaluates() -> None:
    sources = [*REPOSITORY.glob("megatron_omega/**/*.py"), *REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("*.py")]
    found = {str(path.relative_to(REPOSITORY)): list(dangers(path.read_text())) for path in sources}
    assert len(sources) > 20
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(x)",
        "eval('1')",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert list(dangers(text))


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_in_place_of_every_file_run_nothing(tmp_path: Path) -> None:
    path = Saved(tmp_path).write(1)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for file in sorted(path.iterdir(), reverse=True):  # the manifest comes last
        file.write_bytes(bomb)
        with pytest.raises(CheckpointError):
            check_structure(path)
        if file.name != "manifest.json":
            with open_checkpoint(path) as reader:
                assert reader.verify()
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it would have
