"""The frame around a run: signals, the progress bar and the watchdog, and an end with everything written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from learnax.checkpoint import SaveError
from learnax.cluster.stops import EndError
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

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Shows progress inside, and leaves with everything written."""
        if self.running:
            yield
            return
        parts, self.running = self._parts, True
        done, alone = self.done(), False
        with parts.phases.other, parts.watchdog.watching(), parts.processes.watching():
            try:
                if parts.checkpointer is not None:
                    with parts.phases.save:
                        parts.checkpointer.prepare(parts.progress.state)
                with parts.stops.watched(), parts.log.session(done):
                    try:
                        with contextlib.closing(parts.profiler):
                            yield
                        if self.done() > done:
                            self.save()
                    except SaveError:
                        raise
                    except BaseException as error:
                        if parts.processes.count > 1 and not parts.stops.agreed:
                            alone = True
                            parts.log.forget()
                            raise parts.processes.failed(error) from error
                        if self.done() > done and not parts.stops.at_once:
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

    def done(self) -> int:
        """Steps that the position in the data is at."""
        settings, position = self._parts.settings, self._parts.progress.position
        return position.epoch * settings.epoch_steps + position.batch // settings.accumulate_steps

    def save(self) -> None:
        """Saves the end of a session, so that nothing of it is lost between two saves."""
        checkpointer, progress = self._parts.checkpointer, self._parts.progress
        if checkpointer is not None:
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
