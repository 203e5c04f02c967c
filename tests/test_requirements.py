"""What is pinned, what is hashed and what the package asks for are one list. Needs no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HASHED = ("hashed.txt", "hashed-deepspeed.txt")
BY_HAND = {"torch"}
"""Pinned without a hash: which file of it is right depends on the accelerator."""
ADVICE = (
    "a package is added in three places: pyproject.toml, then constraints.txt (with what it brings), then `make lock`"
)


def pinned(text: str) -> list[Requirement]:
    """Return the requirements of a file without their hashes; a name may stand twice, for two versions of Python."""
    lines = [line.split(" --hash=")[0].rstrip(" \\") for line in text.splitlines()]
    return [Requirement(line) for line in lines if re.match(r"[A-Za-z0-9]", line)]


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def constraints() -> list[Requirement]:
    return pinned((ROOT / "constraints.txt").read_text())


def asked_for() -> Iterator[Requirement]:
    """Yield what pyproject.toml names, all extras with it."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("\ndependencies = ")[2].partition("\n[project.scripts]")[0]
    found = map(Requirement, re.findall(r'"([^"]+)"', section))
    yield from (requirement for requirement in found if requirement.name != "megatron-omega")


def test_every_pinned_package_is_hashed_in_the_same_version() -> None:
    hashed: list[Requirement] = []
    for name in HASHED:
        text = (ROOT / "requirements" / name).read_text()
        blocks = re.split(r"\n(?=[A-Za-z0-9])", text)
        assert all("--hash=sha256:" in block for block in blocks if re.match(r"[A-Za-z0-9]", block)), name
        hashed += pinned(text)
    wanted = {(canonicalize_name(one.name), str(one.specifier)) for one in constraints() if one.name not in BY_HAND}
    assert {(canonicalize_name(one.name), str(one.specifier)) for one in hashed} == wanted, ADVICE


def test_everything_that_is_asked_for_is_pinned() -> None:
    asked = names(asked_for())
    assert len(asked) > 25 and {"torch", "deepspeed", "pytest"} <= asked
    assert sorted(asked - names(constraints())) == [], ADVICE


def test_what_pinned_packages_bring_is_pinned_too() -> None:
    """`--no-deps` installs nothing else: a package that is missing here would be missing there."""
    known, missing = names(constraints()), set[str]()
    for one in constraints():
        if one.name in BY_HAND or (one.marker and not one.marker.evaluate()) or not _is_installed(one):
            continue
        for brought in map(Requirement, requires(one.name) or ()):
            extras = _extras(one.name) or {""}
            is_needed = brought.marker is None or any(brought.marker.evaluate({"extra": extra}) for extra in extras)
            if is_needed and canonicalize_name(brought.name) not in known:
                missing.add(f"{brought.name} (of {one.name})")
    assert sorted(missing) == [], ADVICE


def _extras(name: str) -> set[str]:
    """Return the extras that pyproject.toml asks a package for."""
    return {
        extra for one in asked_for() if canonicalize_name(one.name) == canonicalize_name(name) for extra in one.extras
    }


def _is_installed(requirement: Requirement) -> bool:
    """Tell whether this environment has the pinned version."""
    try:
        return version(requirement.name) in requirement.specifier
    except PackageNotFoundError:
        return False
