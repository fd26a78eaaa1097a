"""What a trainer is given as a model, as one."""

from __future__ import annotations

import sys
from typing import Any

import flax.linen as nn

from learnax.models.equinox import Equinox
from learnax.models.functions import Functions
from learnax.models.linen import Linen
from learnax.models.model import Model
from learnax.models.nnx import NNX

_FOREIGN = {
    "torch": "a torch module; write its layers as a flax or equinox module",
    "keras": "a keras model; write its layers as a flax or equinox module",
}
_WANTED = (
    "model must be a flax linen module, a flax nnx module, an equinox module, an object with init and apply, or one of "
    "these in an adapter of learnax.models,"
)


def as_model(given: Any) -> Model:
    """The model that an object is: an adapter as it is, a bare one in the adapter of its kind.

    Raises:
        TypeError: it is none; what to write is in the text.
    """
    if isinstance(given, Model):
        return given
    if isinstance(given, type):
        made = (
            f"{given.__name__}(rngs=nnx.Rngs(0))" if _is_of("flax.nnx", given, of_class=True) else f"{given.__name__}()"
        )
        raise TypeError(
            f"{_WANTED} but is the class {given.__name__}; write {made}, with its fields in the parentheses"
        )
    if isinstance(given, nn.Module):
        return Linen(given, inputs="all")
    if _is_of("flax.nnx", given):
        return NNX(given)
    if _is_of("equinox", given):
        return Equinox(given)
    modules = [cls.__module__ for cls in type(given).__mro__]
    for package, what in _FOREIGN.items():
        if any(f"{module}.".startswith(f"{package}.") for module in modules):
            raise TypeError(f"{_WANTED} but is {what}")
    if isinstance(given, tuple) and len(given) == 2 and all(map(callable, given)):
        return Functions(*given, stateful=type(given).__name__ == "TransformedWithState")
    for name in ("init", "apply"):
        if not callable(getattr(given, name, None)):
            raise TypeError(f"{_WANTED} but is {given!r:.80}; it has no {name}")
    return Functions(given)


def _is_of(package: str, given: Any, *, of_class: bool = False) -> bool:
    """Whether it is a module of a package; one that nobody has imported has none."""
    library = sys.modules.get(package)
    if library is None:
        return False
    return issubclass(given, library.Module) if of_class else isinstance(given, library.Module)
