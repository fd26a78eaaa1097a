"""One page of HTML that needs nothing beside it: its style, its script, and a run's data; and the way back from it."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

_BEGIN, _END = '<script id="data" type="application/json">', "</script>"
_HERE = Path(__file__).parent


def page(data: dict[str, Any]) -> str:
    """The page of a run, or of several beside each other.

    Args:
        data: plain; `title`, and what `page.js` draws.
    """
    # What ends a script must not stand in it, whatever a run is called.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    html = (_HERE / "page.html").read_text()
    parts = {
        "TITLE": escape(str(data["title"])),
        "STYLE": (_HERE / "page.css").read_text(),
        "DATA": _BEGIN + text + _END,
        "SCRIPT": (_HERE / "page.js").read_text(),
    }
    first, *rest = html.split("@@")
    # Piece by piece: what is put in is not looked through again.
    return first + "".join(parts.get(piece, piece) for piece in rest)


def write(path: Path, text: str) -> None:
    """Writes a file where a reader never finds half of it.

    Raises:
        OSError: it cannot be written; the one before it stays.
    """
    draft = path.with_name(f".{path.name}.draft")  # one name: what a kill leaves, the next one takes over
    try:
        draft.write_text(text)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """The data of a page.

    Raises:
        ValueError: the file is no page of this kind.
        OSError: it cannot be read.
    """
    text = path.read_text(errors="replace")
    begin = text.find(_BEGIN)
    end = text.find(_END, begin)
    try:
        if begin < 0 or end < 0:
            raise ValueError("it has no data of a run")
        data = json.loads(text[begin + len(_BEGIN) : end])
        if not isinstance(data, dict) or data.get("version") != 1:
            raise ValueError("its data are of another version of learnax")
    except ValueError as error:
        raise ValueError(f"{path} is no report of learnax: {error}") from None
    return data
