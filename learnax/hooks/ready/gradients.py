"""What gradients and updates look like, parameter by parameter."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.hooks.moment import Moment
from learnax.hooks.probe import Probe
from learnax.step import View
from learnax.utils import leaves_by_path


class UpdateRatio(Probe):
    """Measures how far a step moves each parameter: the norm of its update by the norm of the parameter.

    About 1e-3 is what Adam's rates are often tuned to; much more is a sign of a rate that is too large. It becomes the
    metric `train/UpdateRatio/<path>`; a frozen parameter has none, and one of norm 0 has 0.

    Args:
        every: steps from one look to the next, 1 or more; what a look costs, `Probe` says.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: `every` is no whole number above 0.
    """

    def __init__(self, every: int, *, name: str = "UpdateRatio"):
        super().__init__(every, _ratios, name)


class GradientHistogram(Probe):
    """Hands histograms of each parameter's gradient to the run, over the powers of ten of its elements' sizes.

    The row that the run gets, see `Moment.log`, has `GradientHistogram/<path>`: `(counts, edges)` of numpy arrays as
    `np.histogram` gives them, the edges as exponents of 10; a wandb run gets a `wandb.Histogram` of them. An
    element beyond the first or the last edge counts in the first or the last bin, 0 in the first, NaN in none.

    Args:
        every: steps from one look to the next, 1 or more; what a look costs, `Probe` says.
        bins: from 1 to 1000.
        exponents: the first and the last edge.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    def __init__(
        self,
        every: int,
        bins: int = 48,
        exponents: tuple[float, float] = (-12.0, 4.0),
        *,
        name: str = "GradientHistogram",
    ):
        if not 1 <= bins <= 1000 or not exponents[0] < exponents[1]:
            raise ValueError(
                f"GradientHistogram: bins must be from 1 to 1000, and exponents rise, but are {bins} and {exponents}"
            )
        self._edges = np.linspace(*exponents, bins + 1)
        super().__init__(every, self._counts, name, then=self._logged)

    def _counts(self, view: View) -> dict[str, jax.Array]:
        edges = jnp.asarray(self._edges, jnp.float32)
        return {path: _histogram(leaf, edges) for path, leaf in leaves_by_path(view.grads).items()}

    def _logged(self, moment: Moment, values: dict[str, np.ndarray]) -> None:
        histograms: dict[str, Any] = {path: (counts, self._edges) for path, counts in values.items()}
        if callable(getattr(moment.run, "define_metric", None)) and "wandb" in sys.modules:
            make = sys.modules["wandb"].Histogram
            histograms = {path: make(np_histogram=histogram) for path, histogram in histograms.items()}
        moment.log({f"{self.name}/{path}": histogram for path, histogram in histograms.items()})


def _histogram(leaf: jax.Array, edges: jax.Array) -> jax.Array:
    """How many elements are of each size, `(bins,)`."""
    size = jnp.abs(leaf).astype(jnp.float32).reshape(-1)
    exponents = jnp.clip(jnp.log10(size), edges[0], edges[-1])
    return jnp.histogram(jnp.where(jnp.isnan(size), jnp.nan, exponents), edges)[0].astype(jnp.int32)


def _ratios(view: View) -> dict[str, jax.Array]:
    before = leaves_by_path(view.params)
    found = {}
    for path, update in leaves_by_path(view.updates).items():
        moved, norm = _norm(update), _norm(before[path])
        found[path] = jnp.where(norm > 0, moved / jnp.where(norm > 0, norm, jnp.ones_like(norm)), jnp.zeros_like(norm))
    return found


def _norm(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))))
