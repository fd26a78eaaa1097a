"""The scalars of steps and evaluations, packed for one transfer to the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

NAN_DATA = "nan_data"
"""The metric that says of how many data the loss is NaN."""


class Names(tuple[str, ...]):
    """The names of a vector's numbers, under which it stands among scalars."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scalars:
    """Scalars in one array, with a name for each column: one transfer instead of many.

    Attributes:
        names: of the columns; those of an evaluation are pairs, see `evaluate`.
        values: `(n, len(names))`, a row for each step.
    """

    names: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    values: Any

    @classmethod
    def row(cls, scalars: Mapping[Any, jax.Array]) -> Scalars:
        """One row, `values` of shape `(len(names),)`; a vector among the scalars, under its `Names`, is behind them."""
        dtype = jnp.promote_types(jnp.float32, jax.dtypes.canonicalize_dtype(float))
        vectors = {names: value for names, value in scalars.items() if isinstance(names, Names)}
        alone = {name: value for name, value in scalars.items() if name not in vectors}
        values = jnp.stack([jnp.asarray(value).astype(dtype) for value in alone.values()])
        names = (*alone, *(name for each in vectors for name in each))
        return cls(names, jnp.concatenate([values, *(value.astype(dtype) for value in vectors.values())]))
