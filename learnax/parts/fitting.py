"""Whether a run fits GPUs that are not here; where it does not, what would make it fit."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from learnax import checks
from learnax.checks import Settings
from learnax.data import FirstDatum
from learnax.engine.fit import Fit, compiled_for
from learnax.engine.plan import RESIDENT_BYTES
from learnax.engine.targets import Remote, Target
from learnax.models.model import Adapter
from learnax.parts.draft import Draft
from learnax.utils import any_key, tree_bytes

_logger = logging.getLogger("learnax")
REMAT = "dots_with_no_batch_dims_saveable"
"""The policy that is tried: the backward pass computes all again but the products with parameters."""


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A run that may be compiled for GPUs that are not here.

    Args:
        settings: the trainer's arguments, checked.
        traced: what was found out of model and losses.
        first: each split's first datum.
        sizes: split -> its data.
        kept: splits whose data stay on the devices where they are few enough.
    """

    settings: Settings
    traced: checks.Traced
    first: Mapping[str, FirstDatum]
    sizes: Mapping[str, int]
    kept: frozenset[str]

    def on(self, target: Target) -> Fit:
        """Compiles the run's programs for a target; where they do not fit, looks for what makes them.

        Raises:
            ValueError: the target's GPUs do not divide the batch.
            RuntimeError: what compiles for it is not there; what to do is in the text.
        """
        checks.check_split(self.settings.batch_size, target.count, f"or another count than in target {target.name!r}")
        fit = self._compiled(target)
        if fit.fits:
            return fit
        for remedy, changed in self._changes(target):
            _logger.info("target %s: trying %s", target.name, remedy)
            tried = changed._compiled(target)
            if tried.fits:
                return dataclasses.replace(fit, remedy=f"{remedy} makes it fit")
        return fit

    def _compiled(self, target: Target) -> Fit:
        engine = Remote(target)
        draft = Draft(self.settings, self.traced, self.first, engine)
        seq: Any = any_key()
        wanted = draft.wanted(draft.origin.shapes(), seq, self.sizes)
        return Fit(target, compiled_for(engine, wanted, target.card), self._data(draft, target), draft.plan)

    def _data(self, draft: Draft, target: Target) -> int:
        """Bytes of data on each device beside the block that a program is given."""
        if self.settings.single:
            return 0
        size, total = self.settings.batch_size, 0
        for name, count in self.sizes.items():
            if name == "train" and draft.gathers:
                continue  # a program is given all of them
            block = tree_bytes(draft.block(name))
            whole = block * -(-count // (size * draft.room(name)))
            kept = name in self.kept and whole <= RESIDENT_BYTES
            total += whole - block if kept else block  # else one more is on its way
        return total // target.count

    def _changes(self, target: Target) -> Iterator[tuple[str, Fitting]]:
        """What may make it fit, in words, with the run that has it: the least first."""
        settings, model = self.settings, self.traced.model
        if isinstance(model, Adapter) and model.remat is None:
            traced = dataclasses.replace(self.traced, model=model.with_remat(REMAT))
            yield f"remat={REMAT!r} in the model's adapter", dataclasses.replace(self, traced=traced)
        parts = 2
        while settings.batch_size % (parts * target.count) == 0:
            changed = copy.copy(settings)
            changed.batch_size //= parts
            changed.accumulate_steps *= parts
            words = f"batch_size={changed.batch_size}, accumulate_steps={changed.accumulate_steps}"
            yield words, dataclasses.replace(self, settings=changed)
            parts *= 2
        if target.count > 1 and not settings.shard_state and not self.traced.mapped:
            changed = copy.copy(settings)
            changed.shard_state = True
            yield "shard_state=True", dataclasses.replace(self, settings=changed)
