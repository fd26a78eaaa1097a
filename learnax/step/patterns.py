"""Optimisers for parts of a model, by the paths of their parameters; parts without one are frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from learnax.utils import PyTree, leaves_by_path

REST = ".*"
"""The pattern of all that no other one matches."""


class ByPattern:
    """Several optax transformations, each for the parameters whose path matches its pattern; an optimiser itself.

    Args:
        patterns: a regular expression of whole paths, `"head/.*"` for instance, to the transformation for those; None
            freezes them. `".*"` stands for all that no other pattern matches.
    """

    def __init__(self, patterns: Mapping[str, Any]):
        self.patterns = dict(patterns)
        used = {pattern: part for pattern, part in self.patterns.items() if part is not None}
        whole = optax.multi_transform(used, self._labels)
        self.init: Callable[..., Any] = whole.init
        self.update: Callable[..., Any] = whole.update

    def pattern_of(self, params: PyTree) -> dict[str, str]:
        """The pattern that each parameter goes by, by its path.

        Raises:
            ValueError: none matches, or several do, or a pattern matches nothing.
        """
        found: dict[str, str] = {}
        for path in leaves_by_path(params):
            fitting = [pattern for pattern in self.patterns if pattern != REST and re.fullmatch(pattern, path)]
            if len(fitting) > 1:
                raise ValueError(
                    f"optimizer: the parameter {path} matches {' and '.join(map(repr, fitting))}; make the patterns "
                    f"apart, {REST!r} alone may stand for what no other one matches"
                )
            if not fitting and REST not in self.patterns:
                raise ValueError(
                    f"optimizer: the parameter {path} matches none of {', '.join(map(repr, self.patterns))}; patterns "
                    f"are of whole paths, and {REST!r} stands for the rest: {REST!r}: None freezes it"
                )
            found[path] = fitting[0] if fitting else REST
        return found

    def check(self, params: PyTree) -> None:
        """Raises ValueError for patterns that do not fit a model's parameters, by name."""
        found = self.pattern_of(params)
        idle = [pattern for pattern in self.patterns if pattern != REST and pattern not in found.values()]
        if idle:
            raise ValueError(
                f"optimizer: the pattern {idle[0]!r} matches no parameter; there are {', '.join(list(found)[:8])}"
                f"{', ...' * (len(found) > 8)}"
            )
        if all(self.patterns[pattern] is None for pattern in found.values()):
            raise ValueError("optimizer: all parameters are frozen: None for each pattern leaves nothing to train")

    def frozen(self, params: PyTree) -> set[str]:
        """The paths of parameters that are not trained."""
        return {path for path, pattern in self.pattern_of(params).items() if self.patterns[pattern] is None}

    def _labels(self, params: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(params), list(self.pattern_of(params).values()))


def split(optimizer: Any, params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The parameters that an optimiser trains, with None in place of the others; and what puts these in again."""
    frozen = optimizer.frozen(params) if isinstance(optimizer, ByPattern) else set()
    if not frozen:
        return params, lambda trained: trained
    leaves, structure = leaves_by_path(params), jax.tree.structure(params)
    trained = jax.tree.unflatten(structure, [None if path in frozen else leaf for path, leaf in leaves.items()])

    def whole(trained: PyTree) -> PyTree:
        own = iter(jax.tree.leaves(trained))
        return jax.tree.unflatten(structure, [leaf if path in frozen else next(own) for path, leaf in leaves.items()])

    return trained, whole
