"""The frame around a run: signals, the progress bar and the watchdog, and an end with everything written."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from learnax.checkpoint import SaveError
from learnax.cluster.stops import EndError
from learnax.hooks import HookError
from learnax.parts import Parts

_logger = logging.getLogger("learnax")


class Session:
    """Frames a run, or a part of one; a session in a session is part of it.

    Args:
        parts: of the run.

    Attributes:
        running: whether one is under way.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self.running = False
        self._one = threading.Lock()
        self._under_way = ""

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Shows progress inside, and leaves with everything written."""
        if self.running:
            yield
            return
        with self.alone("train()"), self._frame():
            yield

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Frames what uses the run's state: one such at a time, in whichever thread.

        Args:
            what: the call, for the text of an error.

        Raises:
            RuntimeError: another one is under way.
        """
        if not self._one.acquire(blocking=False):
            raise RuntimeError(
                f"{what} was called while {self._under_way} of this trainer is under way. What is to be looked at "
                "during training goes into val_datasets; `for epoch in range(n): trainer.epoch(epoch)` is a training "
                "between whose epochs evaluate() and predict() may be called, as they may before and after train()"
            )
        self._under_way = what
        try:
            yield
        finally:
            self._one.release()

    @contextlib.contextmanager
    def _frame(self) -> Iterator[None]:
        parts, self.running = self._parts, True
        position, alone = self._parts.progress.position, False
        before = position.steps, position.validated
        with parts.phases.other, parts.watchdog.watching(), parts.processes.watching():
            try:
                if parts.checkpointer is not None:
                    with parts.phases.save:
                        parts.checkpointer.prepare(parts.progress.state)
                with parts.stops.watched(), parts.log.session(position.steps, position.epoch):
                    try:
                        with contextlib.closing(parts.profiler):
                            yield
                        if self._moved(before):
                            self.save()
                    except SaveError:
                        raise
                    except BaseException as error:
                        agreed = parts.stops.agreed or (isinstance(error, HookError) and error.agreed)
                        if parts.processes.count > 1 and not agreed:
                            alone = True
                            parts.log.forget()
                            raise parts.processes.failed(error) from error
                        if self._moved(before) and not parts.stops.at_once:
                            self.save_stopped(error)
                        raise
                    finally:
                        if parts.stops.at_once:
                            parts.log.abandon()
            except EndError:
                pass  # what was asked for is no error: what called goes on
            finally:
                self.running = False
                for loader in parts.loaders.values():
                    loader.close()
                if parts.checkpointer is not None and not (parts.stops.at_once or alone):
                    with parts.phases.save:
                        parts.checkpointer.close()

    def _moved(self, before: tuple[int, int | None]) -> bool:
        """Whether there is anything to save since the run stood after so many steps, and a validation."""
        position = self._parts.progress.position
        return (position.steps, position.validated) != before

    def save(self) -> None:
        """Saves the end of a session, so that nothing of it is lost between two saves."""
        checkpointer, progress = self._parts.checkpointer, self._parts.progress
        if checkpointer is not None:
            self._parts.log.settle()
            with self._parts.phases.save:
                checkpointer.save_latest(progress.state, self._parts.log.step, resume=progress.resume_point())
                checkpointer.wait()

    def save_stopped(self, why: BaseException) -> None:
        """Saves a run that is about to end before its time."""
        log = self._parts.log
        try:
            log.drain()
            self.save()
        except Exception as error:
            _logger.warning("stopped at step %d; the state could not be saved: %s", log.step, error)
        else:
            saved = "" if self._parts.checkpointer is None else ", and saved: load_checkpoint=True goes on from here"
            reason = self._parts.stops.reason or f"{type(why).__name__}: {why}".removesuffix(": ")
            _logger.warning("stopped at step %d by %s%s", log.step, reason, saved)
