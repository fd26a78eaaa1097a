"""Several runs on one page: their curves over each other, what differs between them, their speed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learnax.sinks import page
from learnax.sinks.report import NAME


def compare(given: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes a page of several runs.

    Args:
        given: of each run its page, or the folder that has it, as `learnax.sinks.Report` or `Trainer.report` wrote it.
        out: where the page goes.

    Returns:
        Where it is.

    Raises:
        FileNotFoundError: there is no page.
        ValueError: fewer than two runs, one of them twice, or a file that is no page of a run.
    """
    paths = [_page_of(Path(path)) for path in given]
    if len(paths) < 2:
        raise ValueError(f"a comparison takes two runs or more, but got {len(paths)}")
    for place, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise ValueError(f"{path} is there twice")
    runs = []
    for path, label in zip(paths, _labels(paths), strict=True):
        data = page.read(path)
        if "runs" in data:
            raise ValueError(f"{path} is a comparison itself, and no page of a run")
        runs.append(data | {"label": label})
    title = ", ".join(run["label"] for run in runs)
    made: dict[str, Any] = {"version": 1, "title": title, "runs": runs}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    page.write(Path(out), page.page(made))
    return Path(out)


def _page_of(path: Path) -> Path:
    """The page that a path leads to."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no {path}")
    there = [path / NAME] if (path / NAME).is_file() else sorted(path.rglob(NAME))
    if not there:
        raise FileNotFoundError(
            f"no {NAME} in {path}: a run writes one with run=learnax.sinks.Report(folder), or trainer.report(path)"
        )
    if len(there) > 1:
        raise ValueError(f"{path} has {len(there)} pages, {', '.join(map(str, there[:5]))}; name one of them")
    return there[0]


def _labels(paths: Sequence[Path]) -> list[str]:
    """What tells the pages apart, in few words: the parts of their paths that differ."""
    parts = [list(path.resolve().with_suffix("").parts) for path in paths]
    while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
