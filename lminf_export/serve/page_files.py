"""The page at `/`: files of this package, served with a policy that lets nothing else in."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".json": "application/json",
    ".woff2": "font/woff2",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_INDEX = "index.html"


def page_files() -> dict[str, Response]:
    """Return the responses of all files of the page by their path; "/" is index.html."""
    folder = files("lminf_export.serve").joinpath("page")
    found = dict(_found(folder, "/")) if folder.is_dir() else {}
    if f"/{_INDEX}" in found:
        found["/"] = found[f"/{_INDEX}"]
    return found


def _found(folder: Traversable, place: str) -> list[tuple[str, Response]]:
    listed = []
    for entry in folder.iterdir():
        kind = _TYPES.get("." + entry.name.rpartition(".")[2])
        if entry.is_dir():
            listed += _found(entry, f"{place}{entry.name}/")
        elif kind is not None and not entry.name.startswith("."):
            listed.append((place + entry.name, _response(entry.read_bytes(), kind)))
    return listed


def _response(content: bytes, kind: str) -> Response:
    headers = {
        "content-type": kind,
        "content-security-policy": _POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }
    return Response(content, headers=headers)
