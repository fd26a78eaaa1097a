"""Losses that jump, and the batch that did it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from learnax.hooks.given import Hook, whole_number
from learnax.hooks.moment import Moment, Trained
from learnax.hooks.ready.skipping import FEW, without_spikes
from learnax.utils import leaves_by_path

_logger = logging.getLogger("learnax")


class LossSpike(Hook):
    """Keeps the batch of each step whose loss is `factor` times the median of those before; ends the run, or skips it.

    The losses of all steps are looked at, together, every `every` steps: the run ends up to as many steps after the
    spike, and in between nothing waits for the device. Until then the batches of these steps stay in the host's memory.
    A step's batch is in `<folder>/step-<n>.npz`: `step`, `loss`, and `batch/<path>` for each part of the data, leaves
    `(n, ...)`; of several processes the first one's part. A run that goes on from a checkpoint looks at the steps after
    it.

    With `skipping`, the update of such a step is left out, in the compiled step itself:

        spikes = LossSpike(4, "spikes", stop=False)
        Trainer(..., optimizer=spikes.skipping(optax.adam(1e-3)), hooks=[spikes])

    Args:
        factor: above 1.
        folder: where batches go; made where it is not there.
        every: steps from one look to the next, 1 or more.
        window: losses that the median is of, the last ones.
        stop: whether the run ends; else a line tells of each.
        most: files that are written; a run that has diverged has no end of spikes.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: an argument out of its range.
        OSError: the folder cannot be made.
    """

    recent = True

    def __init__(
        self,
        factor: float,
        folder: str | os.PathLike[str],
        *,
        every: int = 50,
        window: int = 100,
        stop: bool = True,
        most: int = 10,
        name: str | None = None,
    ):
        if not factor > 1:
            raise ValueError(f"LossSpike: factor must be above 1, but is {factor!r}")
        self.name = name
        self._factor, self._stop = factor, stop
        self._every = whole_number("LossSpike: every", every)
        self._window = max(FEW, whole_number("LossSpike: window", window))
        self._left = whole_number("LossSpike: most", most)
        self._folder = Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._losses: list[float] = []
        self._skips = False

    def skipping(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """An optimiser for the trainer that makes no update where this hook finds a spike, whatever `every` is.

        Parameters and the optimiser's own state stay as they are there; the step counts. What it goes by is part of the
        optimiser's state, so that a run that goes on skips the same; `trainer.train_state.opt_state.skipped` counts.

        Args:
            optimizer: any of optax's.
        """
        self._skips = True
        return without_spikes(optimizer, self._factor, self._window)

    def next_due(self, step: int) -> float:
        """The next multiple of `every`."""
        return step - step % self._every + self._every

    def __call__(self, moment: Moment) -> None:
        """Looks at the losses since the last call."""
        for trained in moment.recent:
            loss = trained.metrics["train/loss"]
            # In float32, as the step decides.
            usual = np.median(np.asarray(self._losses, np.float32)) if len(self._losses) >= FEW else None
            if usual is not None and not np.float32(loss) <= np.float32(self._factor) * usual:
                where = self._keep(trained, loss)
                text = f"the loss of step {trained.step} is {loss:.6g}, and {usual:.6g} the median before it; {where}"
                text += ", its update was left out" if self._skips else ""
                if self._stop:
                    moment.stop(text)
                else:
                    _logger.warning("%s", text)
            else:  # a spike is no measure of others
                self._losses = [*self._losses, loss][-self._window :]

    def state(self) -> Any:
        """The last losses, and how many files may be written."""
        return {"losses": self._losses, "left": self._left}

    def restore(self, state: Any) -> None:
        """Goes on with them."""
        self._losses, self._left = state["losses"], state["left"]

    def _keep(self, trained: Trained, loss: float) -> str:
        """Writes a batch; says where it is."""
        if not self._left:
            return "its batch is not kept, there are enough"
        self._left -= 1
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trained.read())
        arrays = {f"batch/{path}".rstrip("/"): leaf for path, leaf in leaves_by_path(stacked).items()}
        path = self._folder / f"step-{trained.step}.npz"
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            np.savez(file, step=trained.step, loss=loss, **arrays)
        draft.replace(path)  # a kill leaves no half of one
        return f"its batch is in {path}"
