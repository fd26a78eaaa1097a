"""The processes of a run: which this is, and what they agree on.

JAX's own runtime (`jax.distributed`) connects them and carries what they tell each other: a store of keys that all
see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from learnax.cluster.farewell import PeerError, farewell, is_of_peers, name_of, reports, store
from learnax.profiling.watchdog import looking_on

F = TypeVar("F", bound=Callable[..., Any] | None)

_logger = logging.getLogger("learnax")
PATIENCE_S = 300.0
"""How long a process waits for what another one is to tell: as long as their starts may lie apart."""
GRACE_S = 5.0
"""How long survivors of a failure wait for one another, to know who is left."""
_PACKAGE = Path(__file__).parents[1]
_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Processes(Protocol):
    """This process among those of a run.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        first: whether it is the one that logs, draws and calls the user's functions.
    """

    index: int
    count: int
    first: bool

    def voice(self, function: F) -> F:
        """A function that is to be called by one process alone: itself there, one that does nothing elsewhere."""

    def compare(self, what: str, facts: Callable[[], dict[str, str]]) -> None:
        """Compares facts with those of the others; ValueError where they differ, by name."""

    def from_first(self, text: str) -> str:
        """The first process's text."""

    def exchange(self, what: str, text: str) -> list[str]:
        """Each process's text, in their order."""

    def settle(self, matter: str, text: str, judge: Callable[[list[str]], str]) -> str:
        """What the first process makes of all processes' texts; also from another thread, each matter once."""

    def stop_wanted(self, mine: int) -> int:
        """What all agree to stop for after this dispatch, as the largest of the reasons given; 0 to go on."""

    def failed(self, error: BaseException) -> BaseException:
        """What to raise in the place of an error that this process cannot go on after."""

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Ends this process where another one has failed, in the midst of the block if need be."""


class OneProcess:
    """A run of one process: there is nobody to ask."""

    index, count, first = 0, 1, True

    def voice(self, function: F) -> F:
        """The function."""
        return function

    def compare(self, what: str, facts: Callable[[], dict[str, str]]) -> None:
        """Nobody differs; facts are not even looked for."""

    def from_first(self, text: str) -> str:
        """The text."""
        return text

    def exchange(self, what: str, text: str) -> list[str]:
        """The text."""
        return [text]

    def settle(self, matter: str, text: str, judge: Callable[[list[str]], str]) -> str:
        """What is made of the text."""
        return judge([text])

    def stop_wanted(self, mine: int) -> int:
        """The reason."""
        return mine

    def failed(self, error: BaseException) -> BaseException:
        """The error."""
        return error

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """There is nobody to watch."""
        return contextlib.nullcontext()


class ManyProcesses:
    """A run over the processes that `jax.distributed.initialize` has connected."""

    # Of this process, whatever trains in it: all processes make the same calls in the same order.
    _rounds = itertools.count()
    _steps = itertools.count()
    _noticed = False

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0
        _quieten()

    def voice(self, function: F) -> F:
        """The function on the first process, nothing on the others; None stays None."""
        return function if self.first or function is None else _silence  # type: ignore[return-value]

    def compare(self, what: str, facts: Callable[[], dict[str, str]]) -> None:
        """Compares facts with those of the others.

        Raises:
            ValueError: they differ: names, and what each process has.
            PeerError: another process did not come here.
        """
        all_facts = [json.loads(text) for text in self.exchange(what, json.dumps(facts()))]
        names = dict.fromkeys(name for facts in all_facts for name in facts)
        lines = []
        for name in names:
            values = [facts.get(name, "nothing") for facts in all_facts]
            if len(set(values)) > 1:
                given = ", ".join(f"{value} on process {number}" for number, value in enumerate(values))
                lines.append(f"  {name}: {given}")
        if lines:
            raise ValueError(
                f"the processes of this run differ in {what}:\n" + "\n".join(lines) + "\nGive all of them the same"
            )

    def from_first(self, text: str) -> str:
        """The first process's text."""
        return self.exchange("what the first one has", text)[0]

    def exchange(self, what: str, text: str) -> list[str]:
        """Each process's text, in their order; on the thread that trains, for all make the same calls there.

        Raises:
            PeerError: one failed, or did not come here in time.
        """
        return json.loads(self.settle(f"{next(self._rounds)}: {what}", text, json.dumps))

    def settle(self, matter: str, text: str, judge: Callable[[list[str]], str]) -> str:
        """What the first process makes of all processes' texts.

        Args:
            matter: what it is about; each comes once, and all processes come to it.
            text: this process's.
            judge: makes one text of all, in their order; called by the first process.

        Raises:
            PeerError: one failed, or did not come here in time.
        """
        place = f"learnax/matter/{matter}"
        if not self.first:
            store().key_value_set(f"{place}/{self.index}", text)
            return self._await(f"{place}/verdict", 0, matter)
        texts = [text, *(self._await(f"{place}/{number}", number, matter) for number in range(1, self.count))]
        verdict = judge(texts)
        store().key_value_set(f"{place}/verdict", verdict)
        return verdict

    def stop_wanted(self, mine: int) -> int:
        """What all agree to stop for, after this dispatch; 0 to go on. All call it after the same dispatches.

        A reason of this process is told to the others as a preemption notice, through JAX's own service: it finds the
        first dispatch that none of them is past.

        Args:
            mine: this process's reason, above 0; 0 for none.
        """
        if mine and not ManyProcesses._noticed:
            ManyProcesses._noticed = True
            os.kill(os.getpid(), signal.SIGTERM)  # what JAX's service takes for the notice
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(next(ManyProcesses._steps)):
            return 0
        farewell.together = True
        reasons = [int(text) for text in self.exchange("why they stop", str(mine))]
        return max(*reasons, signal.SIGTERM if not any(reasons) else 0)

    def failed(self, error: BaseException) -> BaseException:
        """Tells the others, gives up the orderly end, and names the peer where one is the cause.

        The others wait in a collective, and would do so for as long as this process is there: once the script is over,
        it ends without the farewell that JAX makes all processes wait for.
        """
        farewell.tell(error)
        if isinstance(error, PeerError) or not is_of_peers(error):
            return error
        failure = self._failure(self._who(), f" The collective said: {_first_line(error)}")
        # At once: the loss of the first process, which holds the connections, ends all others in the midst of anything.
        _logger.error("%s", failure)
        return failure

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Ends this process some seconds after another one has told that it failed.

        The thread that trains may wait in a collective that nothing ends: one device of several has lost its peer,
        and the others wait for that one. Of a process that is gone without a word JAX's service learns by its missing
        heartbeats, and ends the others itself: `heartbeat_timeout_seconds` of `jax.distributed.initialize`.
        """
        return looking_on(self._watch, "learnax-peers")

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(1.0) and farewell.status is None:
            try:
                failed = self._failures()
            except jax.errors.JaxRuntimeError:
                return  # the first process is gone; JAX's service ends this one
            if failed:
                _logger.error("%s", self._failure("; ".join(failed), ""))
                if not over.wait(GRACE_S):
                    farewell.leave_with(1)
                    farewell.leave_at_once()

    def _failures(self) -> list[str]:
        """What others have told of their ends."""
        return [f"{name_of(index)} failed: {text}" for index, text in reports("failed") if index != self.index]

    def _failure(self, why: str, more: str) -> PeerError:
        return PeerError(
            f"{name_of(self.index)} cannot go on: {why}. Start all processes again: with a registry and "
            f"load_checkpoint=True they go on from the last checkpoint.{more}"
        )

    def _await(self, key: str, number: int, what: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                return store().blocking_key_value_get(key, 500)
            failures = self._failures()
            if failures:
                raise PeerError(failures[0])
            if farewell.status is not None:
                deadline = min(deadline, farewell.since + GRACE_S)
            if time.monotonic() > deadline:
                raise PeerError(
                    f"{name_of(number)} did not come to {what!r} within {PATIENCE_S:g} s: is it running, and "
                    "does its script build the same trainers in the same order?"
                )

    def _who(self) -> str:
        """Which peers are gone, as far as can be known."""
        try:
            store().key_value_set(f"learnax/left/{self.index}", "1", allow_overwrite=True)
            deadline = time.monotonic() + GRACE_S
            gone = set(range(self.count)) - {self.index}
            while gone and time.monotonic() < deadline:
                # Who has told of a failure need not say more: it is on its way out.
                gone -= {index for kind in ("left", "failed") for index, _ in reports(kind)}
                time.sleep(0.05)
            failed = self._failures()
        except jax.errors.JaxRuntimeError:
            return f"{name_of(0)}, which all are connected through, is gone"
        silent = [name_of(index) for index in sorted(gone)]
        if failed:
            return "; ".join(failed)
        return f"{', '.join(silent)} {'is' if len(silent) == 1 else 'are'} gone" if silent else "the connection broke"


def processes_of(devices: Sequence[jax.Device]) -> Processes:
    """The processes that these devices belong to.

    Raises:
        ValueError: devices of some processes only.
    """
    owners = {device.process_index for device in devices}
    if owners == {jax.process_index()}:
        _check_alone()
        return OneProcess()
    if owners != set(range(jax.process_count())):
        raise ValueError(
            f"devices belong to the processes {sorted(owners)}, expected all {jax.process_count()} of them, or this "
            f"one ({jax.process_index()}) alone; leave `devices` out to take all"
        )
    counts = {sum(device.process_index == owner for device in devices) for owner in owners}
    if len(counts) > 1:
        raise ValueError(f"each process must have as many of the devices, but they have {sorted(counts)} of them")
    return ManyProcesses()


def connected() -> Processes:
    """All processes that JAX has connected so far; this one alone where it has not. The devices are not looked at."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return OneProcess()
    return ManyProcesses()


# ---- details


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _silence(*args: Any, **options: Any) -> None:
    """Does nothing: another process does it."""


def _quieten() -> None:
    """What all processes would say alike, the first one says; of the others only what is theirs, with their number."""
    if jax.process_index() == 0 or any(isinstance(known, _Own) for known in _logger.filters):
        return
    _logger.addFilter(_Own())


class _Own(logging.Filter):
    """Lets pass what a process has to say of itself."""

    _OWN = ("checkpoint", "data", "profiling", "cluster")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it comes from a room whose work differs between processes; names the process."""
        path = Path(record.pathname)
        if not path.is_relative_to(_PACKAGE):
            return False
        if path.relative_to(_PACKAGE).parts[0].removesuffix(".py") not in self._OWN:
            return False
        record.msg = f"process {jax.process_index()}: {record.msg}"
        return True


def _check_alone() -> None:
    """Says so where a launcher started several tasks, and JAX knows of one."""
    if jax.process_count() > 1:
        return  # its own devices were asked for
    for variable in _TASKS:
        tasks = os.environ.get(variable, "")
        if tasks.isdecimal() and int(tasks) > 1 and not _warned:
            _warned.append(True)
            _logger.warning(
                "%s is %s, but JAX knows of one process: each task trains on its own. To train together, call "
                "jax.distributed.initialize() before anything else",
                variable,
                tasks,
            )


_warned: list[bool] = []
