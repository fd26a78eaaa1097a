"""What a sink is, and what a row may hold beside numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from learnax.utils.names import expanded

Row = Mapping[str, Any]


class Source(Protocol):
    """What a run knows of itself, for a sink that shows more than rows.

    Attributes:
        metrics: `trainer.metrics`.
        made_at: for metrics that are not there for each step: the training steps that were made, dropped ones included,
            when each value was kept; of this process alone, so it may have fewer entries than there are values.
        norms: gradients' norms by parameter, a sample of the steps: `(names, [(step, values), ...])`.
        facts: gives plain data of the run as it stands.
    """

    @property
    def metrics(self) -> Mapping[str, list[float]]: ...  # noqa: D102
    @property
    def made_at(self) -> Mapping[str, list[int]]: ...  # noqa: D102
    @property
    def facts(self) -> Callable[[], dict[str, Any]]: ...  # noqa: D102
    @property
    def norms(self) -> tuple[tuple[str, ...], list[tuple[int, np.ndarray]]]: ...  # noqa: D102


class Start(NamedTuple):
    """Where a run stands when it begins to log: fresh, or after what was logged up to here.

    Attributes:
        step: updates made.
        rows: training rows of that step that were logged: one, and one for each update that was dropped after it.
        epoch: epochs that were ended.
        fresh: whether nothing was logged before.
        source: what the run knows of itself.
    """

    step: int
    rows: int
    epoch: int
    fresh: bool
    source: Source


class Sink:
    """A place that rows go to; a subclass is another one.

    A run calls `check` when the trainer is built, then `begin`, any number of `log` and `flush`, and `close`, as often
    as it is trained. `log` and `flush` are called in a thread of the sink's own. What they raise is told of, and ends
    nothing; what `check` and `begin` raise is an error of the trainer's construction or of `train()`.

    Attributes:
        path: where it is; two sinks of one run have different ones. None where it is in no file.
    """

    path: Path | None = None

    def check(self) -> None:
        """Raises what would keep it from being written."""

    def begin(self, start: Start) -> None:
        """Gets ready for the rows behind a place: what was logged behind that before will be logged again."""

    def log(self, row: Row) -> None:
        """Takes a row: numbers by name, most with `step`."""

    def flush(self) -> None:
        """Writes what was taken: nothing more has come so far, or a checkpoint of it is about to be made."""

    def close(self, how: str) -> None:
        """Ends a session, with everything written; `how` says what ended it, and is empty at a plain end."""


class InPath(Sink):
    """A sink in a file or a folder.

    Args:
        path: where; `~` and variables are put in, and folders on the way are made.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{type(self).__name__} takes a path, but got {path!r}")
        self._given = os.fspath(path)
        self.path = expanded(path, f"the path of {type(self).__name__}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._given!r})"


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image in a row, `run.log({"digit": Image(pixels)}, step=step)`: for TensorBoard and wandb.

    Attributes:
        pixels: `(height, width)`, `(height, width, 1)`, 3 or 4 channels; numbers from 0 to 1, or bytes.
    """

    pixels: Any

    def array(self) -> np.ndarray:
        """Bytes `(height, width, channels)`.

        Raises:
            ValueError: another shape.
        """
        pixels = np.asarray(self.pixels)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"an image is (height, width) or (height, width, channels) with 1, 3 or 4 channels, but this has the "
                f"shape {np.shape(self.pixels)}"
            )
        if pixels.dtype != np.uint8:
            # What is no number is black, as it is nowhere else.
            pixels = np.rint(255 * np.clip(np.nan_to_num(pixels.astype(np.float64)), 0, 1)).astype(np.uint8)
        return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """How some numbers are spread, in a row: for TensorBoard and wandb.

    Attributes:
        values: an array of any shape, of which what is finite is counted.
        bins: how many bins.
    """

    values: Any
    bins: int = 64

    def array(self) -> np.ndarray:
        """The finite numbers, flat."""
        values = np.asarray(self.values, np.float64).ravel()
        return values[np.isfinite(values)]


def number(value: Any) -> float | int | None:
    """A value of a row as a plain number; None where it is none."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "biuf":
            plain: float | int = array.item()
            return plain
        if array.ndim == 0 and array.dtype.kind == "V":  # bfloat16 and its like
            return float(array)
    return None


def kind_of(row: Row) -> str | None:
    """Whether a row is a training "step", the means of an "epoch", or a user's own (None)."""
    if "step" not in row or "epoch" not in row:
        return None
    if "train/has_nan" in row:
        return "step"
    return "epoch" if any(name.partition("/")[0].endswith("_epoch") for name in row) else None


def kept(backwards: Iterable[tuple[int, Row]], start: Start) -> int:
    """How much of a file stays for a run that goes on from a place: up to the last of its rows that were logged there.

    Args:
        backwards: where each row ends, and the row, the last one first; read as far as is needed.
        start: the place.

    Returns:
        Where what stays ends; 0 where nothing does.
    """
    end, at_step = 0, []
    for place, row in backwards:
        kind = kind_of(row)
        if kind == "epoch" and row["epoch"] < start.epoch:
            end = max(end, place)
        elif kind == "step" and row["step"] == start.step:
            at_step.append(place)
        elif kind == "step" and row["step"] < start.step:
            end = max(end, place)
            break
    return max([end, *sorted(at_step)[: start.rows]])
