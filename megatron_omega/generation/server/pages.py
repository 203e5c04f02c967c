"""The page's files: plain HTML, CSS and JavaScript that fetch nothing from elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).with_name("page")
PAGE_FILES = {
    "/" if name == "index.html" else f"/{name}": name
    for name in ("index.html", "page.css", "page.js", "service.js", "tokens.js", "masks.js", "icon.svg")
}
"""Path -> file."""


def page_routes() -> list[Route]:
    """Return a route for each file."""
    return [Route(path, partial(_send, _FOLDER / name)) for path, name in PAGE_FILES.items()]


async def _send(file: Path, _: Request) -> Response:
    return FileResponse(file)
