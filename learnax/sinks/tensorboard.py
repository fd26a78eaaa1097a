"""Event files, as TensorBoard reads them."""

from __future__ import annotations

import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from learnax.sinks.appended import Appended, beside, opened_folder
from learnax.sinks.sink import Histogram, Image, InPath, Row, Start, kept, number

_OURS = "learnax"
"""What the names of our files end with; other files of a folder are left alone."""
_HEADER, _FOOTER = 12, 4
"""Bytes before and after a record: its length and a checksum of that, and a checksum of the record."""
_ASIDE = "before"


class TensorBoard(InPath):
    """Rows as event files in a folder, `tensorboard --logdir FOLDER`: numbers, `Image`s and `Histogram`s.

    After a resume each step is there once, as in `JsonLines`: records behind the checkpoint are cut off. A fresh run
    moves event files of learnax that it finds in the folder into a folder inside, which TensorBoard shows as a run of
    its own.

    Args:
        folder: where; made where there is none.

    Raises:
        ImportError: the package `tensorboardX` is not installed (`pip install 'learnax[tensorboard]'`).
        OSError: when the trainer is built: the folder cannot be written, is a file, or another run writes it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(folder)
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"sinks.TensorBoard needs the package tensorboardX: pip install 'learnax[tensorboard]' ({error})"
            ) from None
        self._folder: int | None = None
        self._file: Appended | None = None
        self._resumed = False

    def check(self) -> None:
        """Raises OSError where the folder cannot be written, or another run writes it."""
        os.close(opened_folder(self.path, repr(self)))

    def begin(self, start: Start) -> None:
        """Takes the folder, and cuts its files back to the place."""
        self.close("")
        self._folder = opened_folder(self.path, repr(self))
        files = sorted(self.path.glob(f"events.out.tfevents.*.{_OURS}"))
        if start.fresh:
            self._move_aside(files)
        else:
            self._cut(files, start)
        self._resumed = not start.fresh

    def log(self, row: Row) -> None:
        """Takes a row."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._folder is None or (self._resumed and "step" not in row):
            return
        values = [value for name, held in row.items() if name != "step" and (value := _value(name, held)) is not None]
        if values and row.keys() - {"step", "epoch"}:
            step = int(row.get("step", 0))
            self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Hands all rows to the system."""
        if self._file is not None:
            self._file.flush()

    def close(self, how: str) -> None:
        """Writes all, and gives the folder back."""
        file, self._file = self._file, None
        folder, self._folder = self._folder, None
        try:
            if file is not None:
                file.close()
        finally:
            if folder is not None:
                os.close(folder)

    def _add(self, event: Any) -> None:
        if self._file is None:
            from tensorboardX.proto.event_pb2 import Event

            # A file of its own for each session: a TensorBoard that looks on has read the last one up to where it was.
            now = time.time_ns()
            name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{_OURS}"
            self._file = Appended(self.path / name, repr(self))
            self._file.add(framed(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()))
        self._file.add(framed(event.SerializeToString()))

    def _move_aside(self, files: list[Path]) -> None:
        files = [path for path in files if path.stat().st_size]
        if files:
            aside = beside(self.path / _ASIDE)
            aside.mkdir()
            for path in files:
                path.rename(aside / path.name)

    def _cut(self, files: list[Path], start: Start) -> None:
        records = [(path, *span) for path in files for span in _records(path)]

        def backwards() -> Iterator[tuple[int, Row]]:
            for place in range(len(records), 0, -1):
                yield place, _row(*records[place - 1])

        end = kept(backwards(), start)
        ends = {path: last for path, _, last in records[:end]}  # where what stays of each file ends
        for path in files:
            if path in ends:
                if path.stat().st_size > ends[path]:
                    os.truncate(path, ends[path])
            elif end:
                path.unlink()
        if not end:  # all of them are of another run
            self._move_aside(files)


def framed(data: bytes) -> bytes:
    """A record as event files have it."""
    from tensorboardX.record_writer import masked_crc32c

    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def png(pixels: np.ndarray) -> bytes:
    """Bytes `(height, width, channels)` as a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # no filter
    data = zlib.compress(lines.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _value(name: str, held: Any) -> Any:
    """A value of a row as TensorBoard has it; None for what it has no place for."""
    from tensorboardX import summary
    from tensorboardX.proto.summary_pb2 import Summary

    plain = number(held)
    if plain is not None:
        return Summary.Value(tag=name, simple_value=plain)
    if isinstance(held, Image):
        pixels = held.array()
        height, width, channels = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png(pixels))
        return Summary.Value(tag=name, image=image)
    if isinstance(held, Histogram) and held.array().size:
        return Summary.Value(tag=name, histo=summary.make_histogram(held.array(), held.bins))
    return None


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Where each whole record of a file begins and ends."""
    place, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER)) == _HEADER:
            end = place + _HEADER + struct.unpack("<Q", header[:8])[0] + _FOOTER
            if end > size:
                return
            yield place, end
            file.seek(end)
            place = end


def _row(path: Path, start: int, end: int) -> Row:
    """The numbers of a record."""
    from tensorboardX.proto.event_pb2 import Event

    with path.open("rb") as file:
        file.seek(start + _HEADER)
        event = Event.FromString(file.read(end - start - _HEADER - _FOOTER))
    return {"step": event.step, **{value.tag: value.simple_value for value in event.summary.value}}
