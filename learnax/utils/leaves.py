"""What a leaf of a datum is: an array, a number, or nothing; and the dtype in which devices hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
NUMBERS = frozenset({*_NUMBERS[:4], *(kind for kind in np.sctypeDict.values() if issubclass(kind, _NUMBERS[4:]))})
"""Types of numbers, of Python and of numpy: they cannot change."""


class UnfitError(ValueError):
    """A number that the dtype of its place cannot hold.

    Attributes:
        row: which of the stacked leaves has it.
    """

    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row = row


def array_of(leaf: Any) -> Any:
    """A leaf as what is stacked: a numpy array (it may share the leaf's memory), a JAX array, or a number.

    Returns:
        None for a leaf that has no place on a device and stays behind: None, text, bytes.

    Raises:
        TypeError: the leaf is neither; its type and what to do are in the text.
        ValueError: an array with masked elements, which no device can hold.
    """
    if type(leaf) in NUMBERS:
        return leaf
    if leaf is None or isinstance(leaf, (str, bytes, bytearray)):
        return None
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError("is a masked array with masked elements; fill them, or give the mask as an array of its own")
    if not _is_array_like(leaf):
        raise TypeError(f"is of type {_name(leaf)}, neither array, number, text nor None; {_ADVICE}")
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise TypeError(f"is of type {_name(leaf)}, and gives no array: {type(error).__name__}: {error}") from error
    if array.dtype.kind in "SUT":
        return None
    if not _is_numeric(array.dtype):
        raise TypeError(f"is of type {_name(leaf)} and dtype {array.dtype}, which no device can hold; {_ADVICE}")
    return array


def is_array(leaf: Any) -> bool:
    """Whether a leaf can be stacked: an array or a number, but no text, object or date."""
    try:
        return array_of(leaf) is not None
    except (TypeError, ValueError):
        return False


def held_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which devices hold arrays of this one."""
    if dtype.type in (np.longdouble, np.clongdouble):
        dtype = np.dtype(np.float64 if dtype.type is np.longdouble else np.complex128)
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("=")))


def as_held(stacked: np.ndarray) -> np.ndarray:
    """Stacked leaves in the dtype that devices hold; the very array where it has that already.

    Raises:
        UnfitError: a number that is finite, or whole, would not stay so.
    """
    dtype = held_dtype(stacked.dtype)
    if dtype == stacked.dtype:
        return stacked.astype(dtype, copy=False)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if stacked.size and (stacked.min() < limits.min or stacked.max() > limits.max):
            _refuse(stacked, (stacked < limits.min) | (stacked > limits.max), dtype)
        return stacked.astype(dtype)
    with np.errstate(over="ignore"):
        held = stacked.astype(dtype)
    lost = np.isinf(held)
    if lost.any():
        # Part by part: an infinite imaginary part must not hide what became of the real one.
        real, imaginary = (np.isinf(part(held)) & ~np.isinf(part(stacked)) for part in (np.real, np.imag))
        if real.any() or imaginary.any():
            _refuse(stacked, real | imaginary, dtype)
    return held


def stack_numbers(numbers: Sequence[Any]) -> np.ndarray:
    """Numbers and numpy arrays of one shape, stacked, in the dtype that numpy finds for them.

    Raises:
        UnfitError: whole numbers that no dtype of whole numbers holds.
    """
    if any(type(number) is int for number in numbers):
        for row, number in enumerate(numbers):
            if type(number) is int and not -(1 << 63) <= number < 1 << 64:
                raise UnfitError(row, f"is {number}, which no dtype of whole numbers holds; give it in two parts")
        if all(type(number) is int for number in numbers):
            least, most = min(numbers), max(numbers)
            if least < 0 and most >= 1 << 63:  # numpy would make floats of them
                raise UnfitError(numbers.index(most), f"is {most}, which does not fit into int64 beside {least}")
            return np.array(numbers, np.uint64 if most >= 1 << 63 else np.int64)
    if len({type(number) for number in numbers}) == 1 and type(numbers[0]) in NUMBERS:
        return np.array(numbers)
    return np.stack([np.asarray(number) for number in numbers])


_ADVICE = "give it as an array, a number or text, or leave it out"


def _refuse(stacked: np.ndarray, unfit: np.ndarray, dtype: np.dtype[Any]) -> None:
    place = np.unravel_index(int(np.argmax(unfit)), stacked.shape)
    where = f" at {[int(number) for number in place[1:]]}" if len(place) > 1 else ""
    other = "scale the data" if dtype.kind in "fc" else "give smaller numbers, or two parts of it"
    raise UnfitError(
        int(place[0]),
        f"has {stacked[place]}{where}, which does not fit into {dtype}; enable jax_enable_x64, or {other}",
    )


def _is_array_like(leaf: Any) -> bool:
    if isinstance(leaf, _NUMBERS) or any(
        hasattr(leaf, name) for name in ("__array__", "__array_interface__", "__array_struct__")
    ):
        return True
    try:
        return memoryview(leaf) is not None
    except TypeError:
        return False


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    # numpy's own kinds do not tell bfloat16 from a record.
    return dtype.kind in "biufc" or (dtype.names is None and bool(jnp.issubdtype(dtype, np.number)))


def _name(leaf: Any) -> str:
    kind = type(leaf)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
