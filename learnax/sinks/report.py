"""A page of a run, kept up to date while it goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learnax.sinks import page
from learnax.sinks.appended import beside, opened_folder
from learnax.sinks.curves import Curves, pack, unpack
from learnax.sinks.sink import InPath, Row, Source, Start, kind_of, number

_logger = logging.getLogger("learnax")
NAME = "report.html"
_LEAST_S = 10.0
"""Seconds between two pages at least."""
_SHARE = 100
"""And so many times as long as a page takes to be written: what it costs stays below a hundredth."""
_ROWS, _COLUMNS = 48, 240
"""Rows and columns of the picture of the gradients' norms at most."""
_EVENTS = 200
"""Events that a page keeps."""
_OWN = 8000
"""Values of the user's own metrics that a page shows, and half as many of each that it keeps."""


class Report(InPath):
    """A page `report.html` in a folder, one file that needs no network: what became of a run, and how.

    It has the curves of all metrics, training beside validation; a time line of starts, stops, saves and dropped
    updates; where the time went; the gradients' norms by parameter; programs, checkpoints, arguments, versions and
    devices. It is written anew while the run goes on, so that a reload shows how it stands: each ten seconds or so, and
    seldom enough to take less than a hundredth of the time. A reader never finds half of it. A run that goes on after a
    kill goes on with its page: all metrics are there, but of what only the page keeps (norms, a user's own values) the
    last seconds before the kill may be missing. A fresh run moves the page of another one aside.

    `python -m learnax report FOLDER FOLDER --out compare.html` lays several over each other.

    Args:
        folder: where; made where there is none.

    Raises:
        OSError: when the trainer is built: the folder cannot be written, is a file, or another run writes there.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(folder)
        self._folder: int | None = None
        self._story: Story | None = None
        self._next = 0.0
        self._busy = threading.Lock()

    @property
    def page(self) -> Path:
        """Where the page is."""
        return self.path / NAME

    def check(self) -> None:
        """Raises OSError where the folder cannot be written, or another run writes there."""
        os.close(opened_folder(self.path, repr(self)))

    def begin(self, start: Start) -> None:
        """Takes the folder, and goes on with the page that is there."""
        if self._folder is not None:  # left by a second signal, which acts at once
            os.close(self._folder)
        self._folder = None
        folder = opened_folder(self.path, repr(self))
        try:
            story = self._gone_on(start)
        except BaseException:
            os.close(folder)
            raise
        with self._busy:
            self._folder, self._story, self._next = folder, story, 0.0

    def log(self, row: Row) -> None:
        """Takes what a user logs beside the trainer; its own metrics are looked at where they are kept."""
        if self._story is not None and kind_of(row) is None and "step" in row:
            with self._busy:
                self._story.take(row)

    def flush(self) -> None:
        """Writes the page, where it is time."""
        with self._busy:
            if self._story is not None and self._folder is not None and time.monotonic() >= self._next:
                self._write(self._story, "running")

    def close(self, how: str) -> None:
        """Writes the page as it is at the end of a session."""
        folder, self._folder = self._folder, None
        if folder is None:
            return
        try:
            with self._busy:
                if self._story is not None:
                    self._end(self._story, how)
        finally:
            os.close(folder)

    def write_to(self, path: Path, source: Source, step: int) -> None:
        """Writes the page to another file as well; with what is known of earlier processes, if it follows this run."""
        with self._busy:
            story = self._story if self._story is not None and self._story.source is source else Story(source)
            _write_story(story, path, step)

    def _gone_on(self, start: Start) -> Story:
        """What the page tells from here: what it told before, if that was of this run."""
        if self._story is not None and self._story.source is start.source:  # another session of one trainer
            if self._story.events[-1]["what"] == "stopped":
                self._story.tell("resumed", start.step)
            return self._story
        story = Story(start.source)
        if self.page.exists():
            try:
                earlier = page.read(self.page)
            except ValueError:
                earlier = None
            if start.fresh or earlier is None or "runs" in earlier:
                aside = beside(self.page)
                self.page.rename(aside)
                _logger.warning("%r: the page of another run is moved to %s", self, aside)
            else:
                story.go_on(earlier, start.step)
        if not story.events:
            story.tell("started" if start.fresh else "resumed", start.step)
        story.anchor(start.step)
        return story

    def _end(self, story: Story, how: str) -> None:
        facts = story.source.facts()
        done = facts["epoch"] >= facts["num_epochs"]
        if how:
            story.tell("stopped", facts["step"], how)
        elif done and story.events[-1]["what"] != "ended":
            story.tell("ended", facts["step"])
        story.anchor(facts["step"])
        # A loop over `trainer.epoch` ends a session after each: its pages wait until it is time, too.
        if how or done or time.monotonic() >= self._next:
            self._write(story, "stopped" if how else "complete" if done else "paused")

    def _write(self, story: Story, state: str) -> None:
        began = time.monotonic()
        page.write(self.page, page.page(story.data(state)))
        now = time.monotonic()
        self._next = now + max(_LEAST_S, _SHARE * (now - began))


class Story:
    """What a page tells of a run.

    Args:
        source: what the run knows of itself.

    Attributes:
        events: what happened, oldest first: what, at which step, when (seconds since 1970), and a text.
    """

    def __init__(self, source: Source):
        self.source = source
        self.events: list[dict[str, Any]] = []
        self._curves = Curves()
        self._saves: dict[int, dict[str, Any]] = {}
        self._own: dict[str, list[tuple[float, float]]] = {}
        self._norms: dict[str, Any] | None = None  # of before this process
        self._seconds = 0.0  # of before this process
        self._curves.follow(source)

    def anchor(self, step: int) -> None:
        """Follows the metrics up to here, the place of this step."""
        self._curves.follow(self.source)
        self._curves.anchor(step)

    def tell(self, what: str, step: int, text: str = "", when: float | None = None) -> None:
        """Adds an event."""
        self.events.append({"what": what, "step": step, "time": time.time() if when is None else when, "text": text})
        del self.events[1:-_EVENTS]

    def take(self, row: Row) -> None:
        """Takes a row of the user's own."""
        for name, value in row.items():
            plain = number(value)
            if plain is None or name in ("step", "epoch") or name in self.source.metrics:
                continue
            kept = self._own.setdefault(name, [])
            kept.append((float(row["step"]), float(plain)))
            if len(kept) > _OWN // 2:
                del kept[1::2]

    def go_on(self, earlier: Mapping[str, Any], step: int) -> None:
        """Takes over what the page has of the time before this process, up to the step that the run goes on from."""
        self.events = list(earlier["events"])
        self._saves = {save["number"]: save for save in earlier["saves"] if save["step"] <= step}
        self._own = {
            own["name"]: [(x, y) for x, y in zip(own["x"], own["y"], strict=True) if x <= step and y is not None]
            for own in earlier["own"]
        }
        self._seconds = earlier["seconds_before"] + earlier["ledger"]["wall"]
        self._norms = earlier["norms"] and _up_to(earlier["norms"], step)
        if earlier["state"] == "running":
            text = "without a word: killed, or out of memory; it came to this step at least"
            self.tell("ended", max(earlier["step"], step), text, earlier["written"])
        self.tell("resumed", step)

    def data(self, state: str) -> dict[str, Any]:
        """All of it, plain."""
        facts = self.source.facts()
        self._curves.follow(self.source)
        self._saves = {number: save | {"there": False, "best": False} for number, save in self._saves.items()}
        for save in facts["saves"]:
            self._saves[save["number"]] = save | {"there": True}
        most = max(_OWN // max(len(self._own), 1), 8)
        own = [
            {"name": name, "x": [x for x, _ in some], "y": [_told(y) for _, y in some]}
            for name, kept in self._own.items()
            for some in [kept[:: -(-len(kept) // most)]]
        ]
        return {
            "version": 1,
            **facts,
            "state": state,
            "written": time.time(),
            "events": self.events,
            "saves": sorted(self._saves.values(), key=lambda save: save["time"])[-_EVENTS:],
            "dropped": self._curves.dropped(),
            "own": own,
            "seconds_before": self._seconds,
            "norms": _joined(self._norms, _packed_norms(*self.source.norms)),
            **self._curves.packed(self.source, facts),
        }


def report(source: Source, path: Path, step: int, follows: Report | None) -> None:
    """Writes the page of a run as it stands, to any file.

    Args:
        source: what the run knows of itself; its metrics hold still.
        path: of the page.
        step: updates made.
        follows: the sink that follows the run, if there is one: it knows more of the past.
    """
    if follows is not None:
        follows.write_to(path, source, step)
    else:
        _write_story(Story(source), path, step)


def _write_story(story: Story, path: Path, step: int) -> None:
    story.anchor(step)
    facts = story.source.facts()
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write(path, page.page(story.data("complete" if facts["epoch"] >= facts["num_epochs"] else "paused")))


def _told(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _packed_norms(names: tuple[str, ...], rows: list[tuple[int, np.ndarray]]) -> dict[str, Any] | None:
    """Norms in as few rows and columns as a picture has: where parameters are many, those of a module together."""
    if not rows:
        return None
    names = tuple(name.removeprefix("grads/") for name in names)
    values = np.stack([values for _, values in rows])
    picked = np.unique(np.linspace(0, len(rows) - 1, _COLUMNS).astype(int))
    steps, values = np.asarray([step for step, _ in rows])[picked], values[picked]
    groups = _groups(names)
    # The norm of several together is the root of the sum of squares.
    places = [np.asarray(places) for places in groups.values()]
    table = np.stack([np.sqrt(np.sum(np.square(values[:, place]), axis=1)) for place in places])
    return {"names": list(groups), "parameters": len(names), "x": pack(steps), "values": [pack(row) for row in table]}


def _groups(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Names by as much of their paths as leaves few enough groups."""
    paths = [name.split("/") for name in names]
    for depth in range(max(map(len, paths)), -1, -1):
        groups: dict[str, list[int]] = {}
        for place, path in enumerate(paths):
            title = "/".join(path[:depth]) if depth else "all"
            groups.setdefault(title if depth >= len(path) or not depth else f"{title}/…", []).append(place)
        if len(groups) <= _ROWS:
            return groups
    raise AssertionError("one group is few enough")


def _up_to(norms: dict[str, Any], step: int) -> dict[str, Any]:
    """Norms of the steps up to one."""
    x = unpack(norms["x"])
    return norms | {"x": pack(x[x <= step]), "values": [pack(unpack(row)[x <= step]) for row in norms["values"]]}


def _joined(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """Norms of before this process and of now; thinned to as many columns as a picture has."""
    if before is None or now is None:
        return now or before
    if before["names"] != now["names"]:
        return now
    x = np.append(unpack(before["x"]), unpack(now["x"]))
    rows = [np.append(unpack(a), unpack(b)) for a, b in zip(before["values"], now["values"], strict=True)]
    if len(x) > _COLUMNS:
        # Evenly over the steps, however often the run was cut.
        wanted = np.linspace(x[0], x[-1], _COLUMNS)
        picked = np.unique(np.searchsorted(x, wanted).clip(max=len(x) - 1))
        x, rows = x[picked], [row[picked] for row in rows]
    return now | {"x": pack(x), "values": [pack(row) for row in rows]}
