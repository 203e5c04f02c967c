#!/usr/bin/env python3
"""Build a corpus of real documents from Debian's documentation packages, without installing any of them.

    benchmarks/fetch_corpus.py /tmp/corpus            -> /tmp/corpus/corpus.jsonl, 61,152 documents, 475 MB

Needs a Debian system with apt-get and dpkg-deb; downloads some 280 MB, takes five CPU-minutes. One JSON object a line:
{"source", "text"}; exact duplicates are left out and the order is a fixed shuffle. --packages NAME ... takes
others, say only `debian-faq`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = (
    "linux-doc-6.1 anarchism debian-handbook libreoffice-help-en-us libreoffice-help-de libreoffice-help-fr "
    "libreoffice-help-es gnome-user-docs dict-gcide dict-foldoc dict-jargon wordnet-base python3.11-doc "
    "postgresql-doc-15 harden-doc bible-kjv-text perl-doc git-doc vim-doc manpages manpages-dev manpages-de "
    "manpages-fr manpages-ru manpages-pl freebsd-manpages fortunes fortunes-de fortunes-ru fortunes-it fortunes-zh "
    "debian-policy developers-reference debian-reference-en debian-faq erlang-doc python-django-doc openjdk-17-doc "
    "gimp-help-en r-doc-html llvm-14-doc cppreference-doc-en-html "
)
MARKUP = {".html", ".htm", ".xhtml", ".page", ".xml"}
TEXT = {".txt", ".rst", ".pod", ".md", ".dict"}
BLOCKS = {"p", "br", "li", "tr", "div", "pre", "h1", "h2", "h3", "h4", "title", "dt", "dd"}
SMALLEST, LARGEST = 200, 200_000


class Words(HTMLParser):
    """Collects what a reader of a page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in ("script", "style")))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8")


def text_of(path: Path) -> str:
    """Return the words of a file; empty where it is no text."""
    name = Path(path.name.removesuffix(".gz").removesuffix(".dz"))
    is_manual = "/man/" in str(path)
    if not (is_manual or name.suffix in MARKUP | TEXT or "/fortunes/" in str(path)):
        return ""
    try:
        text = read(path)
    except (OSError, UnicodeDecodeError, EOFError):
        return ""
    if name.suffix in MARKUP:
        parser = Words()
        parser.feed(text)
        text = "".join(parser.parts)
    elif is_manual:
        text = re.sub(r"\\f.|\\&|\\-", "", re.sub(r"(?m)^[.'].{0,3}(?:\\\".*)?", "", text))
    text = re.sub(r"[ \t\r\f\v\xa0]+", " ", text.replace("\0", ""))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def documents(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            text = text_of(path)
            for start in range(0, len(text), LARGEST):
                part = text[start : start + LARGEST]
                letters = sum(character.isalpha() or character == " " for character in part[:4000])
                if len(part) >= SMALLEST and letters > 0.6 * min(len(part), 4000):
                    yield str(path.relative_to(root)), part


def call(command: list[str], folder: Path) -> None:
    """Run a command in a folder; what is there already, apt-get does not download again."""
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed; this needs a Debian system")
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise SystemExit(f"{command[0]} failed (above); where lists of packages are old or missing, run apt-get update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for corpus.jsonl and, for the time being, the packages")
    parser.add_argument("--packages", nargs="+", default=PACKAGES.split())
    arguments = parser.parse_args()
    packages, tree = arguments.output / "packages", arguments.output / "tree"
    packages.mkdir(parents=True, exist_ok=True)
    call(["apt-get", "-qq", "download", *arguments.packages], packages)
    for package in sorted(packages.glob("*.deb")):
        call(["dpkg-deb", "-x", str(package.absolute()), str(tree.absolute())], packages)
    found: dict[bytes, tuple[str, str]] = {}
    for source, text in documents(tree):
        found.setdefault(hashlib.blake2b(text.encode(), digest_size=12).digest(), (source, text))
    with (arguments.output / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for key in sorted(found):  # the order of hashes is a shuffle that never changes
            source, text = found[key]
            file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
        size = file.tell()
    shutil.rmtree(packages)
    shutil.rmtree(tree)
    print(f"{len(found):,} documents, {size / 1e6:.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
