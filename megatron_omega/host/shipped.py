"""Files that come with the package: the presets of examples/ and DeepSpeed's settings of ds_configs/, by name.

They are top-level folders of the sources. A wheel holds them inside the package; a checkout has them beside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PRESETS = "examples"
DEEPSPEED = "ds_configs"


def shipped_folder(name: str) -> Path:
    """Return where a folder of the sources, such as `examples`, lies in this installation."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def presets() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    return {path.parent.name: path for path in sorted(shipped_folder(PRESETS).glob("*/run.yaml"))}


def deepspeed_settings() -> dict[str, Path]:
    """Return the DeepSpeed configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(shipped_folder(DEEPSPEED).glob("*.json"))}


def located(path: Path | str, known: dict[str, Path]) -> Path:
    """Return the file that `path` means: itself, or a file that comes with the package.

    That may be a name of `known` (`omega-1b`), or a path into the sources (`examples/omega-1b/run.yaml`).
    """
    path = Path(path)
    if path.is_file() or path.is_absolute() or not path.parts:
        return path
    if str(path) in known:
        return known[str(path)]
    first, *rest = path.parts
    inside = shipped_folder(first).joinpath(*rest)
    return inside if first in (PRESETS, DEEPSPEED) and inside.is_file() else path
