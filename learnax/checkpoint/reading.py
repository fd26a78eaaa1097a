"""Reading saves: the first of several that is whole, in the same way on all processes of a run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learnax.checkpoint import files, history, legacy, seals
from learnax.checkpoint.files import DamagedError
from learnax.checkpoint.history import HistoryLostError
from learnax.checkpoint.pieces import divided_axes
from learnax.checkpoint.trees import as_state, nested, old_names, with_keys
from learnax.cluster.processes import Processes
from learnax.step.state import TrainState
from learnax.utils import leaves_by_path

_logger = logging.getLogger("learnax")
_ids = itertools.count()


class Loaded(NamedTuple):
    """What a load returns, of which save, and what its histories' files are, where they are whole."""

    save: Path
    values: dict[str, Any]
    histories: Mapping[str, Any] | None


class Reader:
    """Reads saves.

    Args:
        processes: that read together.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        # All processes of a run build those that read together in the same order; others do not count.
        self._id, self._reads = next(_ids) if processes.count > 1 else 0, 0

    def first_whole(self, saves: Sequence[Path], target: TrainState | None, *, resume: bool) -> Loaded | None:
        """The first of these saves that is whole; None where there are none.

        Of a save whose state is whole but whose histories are not, another one is looked for; but metrics that are lost
        are no reason to lose a state as well: where all are so, the first one is taken, with NaN in their place.

        Args:
            saves: folders of saves, or files of 0.1.0.
            target: what the containers of the state are.
            resume: whether histories are wanted.

        Raises:
            DamagedError: none is whole.
        """
        damage: DamagedError | None = None
        told, without = False, []
        for save in saves:
            loaded, error, lost = self._settled(save, target, resume=resume, blank=False)
            if lost:
                without.append(save)
                told = _tell(f"the histories of checkpoint {save} are lost: {lost}")
            elif loaded is None:
                damage = damage or error
                told = _tell(str(error))
            else:
                if told:
                    step = loaded.values["step"]
                    _tell(f"the checkpoint before it is taken in its place: that of step {step}")
                return loaded
        for save in without:
            loaded, error, _ = self._settled(save, target, resume=resume, blank=True)
            if loaded is not None:
                _tell(
                    f"checkpoint {save} is taken all the same, for its state is whole: in `metrics`, NaN stands for "
                    f"what was logged up to step {loaded.values['step']}"
                )
                return loaded
            damage = damage or error
            _tell(str(error))
        if damage is not None:
            raise DamagedError(f"{damage}; there is no other one that would do") from damage
        return None

    def _settled(
        self, save: Path, target: TrainState | None, *, resume: bool, blank: bool
    ) -> tuple[Loaded | None, DamagedError | None, str]:
        """One save, and why it is not to be taken: what one process cannot read, none goes on from."""
        loaded, damage, lost = None, None, ""
        try:
            loaded = _read(save, target, resume=resume, blank=blank)
        except DamagedError as error:
            damage = error
        except HistoryLostError as error:
            lost = str(error)
        self._reads += 1
        told = json.dumps(["" if damage is None else str(damage), lost])
        damaged, lost = json.loads(self._processes.settle(f"reader {self._id}, read {self._reads}", told, _worst))
        if damaged:
            return None, damage or DamagedError(damaged), ""
        return (None if lost else loaded), None, lost


def _worst(told: list[str]) -> str:
    damaged, lost = zip(*map(json.loads, told), strict=True)
    return json.dumps([next(filter(None, damaged), ""), next(filter(None, lost), "")])


def _read(save: Path, target: TrainState | None, *, resume: bool, blank: bool) -> Loaded:
    if save.suffix == ".pyd":
        return Loaded(save, _read_old(save, target), None)
    whole = True
    found: dict[str, np.ndarray] | None = None
    meta = files.read_meta(save)
    if resume:  # first: a state is large
        kept = meta.get("history")
        if isinstance(kept, Mapping):
            try:
                found = _histories(save, kept)
            except HistoryLostError:
                if not blank:
                    raise
                with files.reading(save):
                    found, whole = history.blank(kept), False
    old = seals.kinds(meta) is None
    wanted = {} if target is None else target.trees()
    arrays = files.read(save, meta, divided_axes(old_names(wanted) if old else leaves_by_path(wanted)))
    with files.reading(save):
        arrays = with_keys(arrays, meta.get("keys", {}))
        values: dict[str, Any] = {
            "step": meta["step"],
            "time": meta["time"],
            "number": int(save.name) if save.name.isdecimal() else -1,
            "resume": None,
        }
        if resume and "rng" in arrays:
            # Each of these has come later than the saves that lack it.
            more = {name: meta[name] for name in ("script", "hooks", "rate_factor") if meta.get(name)}
            given = _inside(arrays, meta["history"]) if found is None else found
            values["resume"] = {"rng": arrays["rng"], "position": meta["position"], **more, "history": given}
        if meta["metrics"]:
            values["metrics"] = dict(meta["metrics"])
        np.int32(arrays["step"])
        nested(arrays)  # raises where a leaf is said to be in another one
    values["state"] = as_state(arrays, target, save, old=old)
    return Loaded(save, values, meta["history"] if found is not None and whole else None)


def _histories(save: Path, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        return history.read(save.parent, kept)
    except (PermissionError, HistoryLostError):  # of the first, they may be whole
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise HistoryLostError(files.reason(error)) from error


def _inside(arrays: Mapping[str, Any], lengths: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
    """The histories of a save that has them in itself, as they were before they had files of their own."""
    if not lengths:
        return {}
    values = np.split(arrays["history"], np.cumsum([length for _, length in lengths])[:-1])
    return {name: array for (name, _), array in zip(lengths, values, strict=True)}


def _read_old(path: Path, target: TrainState | None) -> dict[str, Any]:
    loaded = legacy.read(path)
    if target is not None:
        loaded["state"] = as_state(legacy.leaves(loaded["state"], target), target, path)
    return {**loaded, "number": -1, "resume": None}


def _tell(text: str) -> bool:
    _logger.warning("%s", text)
    return True
