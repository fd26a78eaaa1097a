"""What a leaf is: arrays of any library are arrays, text stays behind, and what would be lost is told."""

import array
import datetime
import decimal
import enum
import fractions
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from learnax.data import arranged, stack_on_host
from learnax.utils import tree_stack


class Tensor:
    """An array as other libraries have it."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


class Image:
    """An array as PIL has it."""

    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self._values = values


class Colour(enum.IntEnum):
    RED = 3


class OnGpu:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda tensor to numpy")


def exactly(text):
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize("stack", [tree_stack, lambda data: stack_on_host(data, range(len(data)))])
@pytest.mark.parametrize(
    ("leaf", "values"),
    [
        (Tensor(np.float32([1, 2])), [1, 2]),
        (Tensor(np.float32(1.5)), 1.5),
        (Image(np.arange(4, dtype=np.uint8).reshape(2, 2)), [[0, 1], [2, 3]]),
        (memoryview(bytes(3)), [0, 0, 0]),
        (array.array("f", [1, 2]), [1, 2]),
        (np.ma.array([1.0, 2.0]), [1, 2]),
        (Colour.RED, 3),
        (np.array(7, ">i4"), 7),
        (np.float32(2), 2),
        (np.True_, True),
        (True, True),
        (2j, 2j),
        (ml_dtypes.bfloat16(1.5), 1.5),
        (np.ones(2, ml_dtypes.float8_e4m3fn), [1, 1]),
        (np.ones(2, np.longdouble), [1, 1]),
        (jnp.ones(2), [1, 1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_gives_an_array_is_one(leaf, values, stack):
    (stacked,) = stack([[leaf], [leaf]])
    assert stacked.tolist() == [values, values]


DTYPES = [
    (1, "int32"), (np.uint64(1), "uint32"), (1.5, "float32"), (1j, "complex64"), (True, "bool"), (np.int8(1), "int8"),
    (np.float16(1), "float16"), (np.zeros(1, ">f4"), "float32"), (ml_dtypes.bfloat16(1), "bfloat16"),
    (np.longdouble(1), "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "dtype"), DTYPES)
def test_data_have_the_dtypes_that_devices_hold(leaf, dtype):
    (stacked,) = stack_on_host([leaf, leaf], [0, 1])
    assert stacked.dtype == jax.device_put(stacked).dtype == dtype


def test_data_of_several_dtypes_have_the_one_that_holds_them_all():
    first, second, third = [1, np.zeros(1, np.float32)], [2.5, np.ones(1)], [3, np.full(1, 2, np.int8)]
    numbers, arrays = tree_stack([first, second, third])
    assert numbers.tolist() == [1, 2.5, 3]
    assert arrays.tolist() == [[0], [1], [2]]
    assert numbers.dtype == arrays.dtype == np.float64


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (decimal.Decimal("1.5"), "is of type decimal.Decimal, neither array, number, text nor None; give it as"),
        (fractions.Fraction(1, 3), "is of type fractions.Fraction, neither"),
        (datetime.date(2020, 1, 1), "is of type datetime.date, neither array, number"),
        (np.datetime64("2020-01-01"), "is of type numpy.datetime64 and dtype datetime64[D], which no device can hold"),
        (np.array([None, 1]), "is of type numpy.ndarray and dtype object, which no device can hold"),
        (np.zeros(2, [("x", "f4")]), "is of type numpy.ndarray and dtype [('x', '<f4')], which no device"),
        ({1, 2}, "is of type set, neither"),
        (object(), "is of type object, neither"),
        (OnGpu(), "is of type tests.test_leaves.OnGpu, and gives no array: TypeError: can't convert cuda tensor to"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_array_is_an_error_with_path_index_and_type(leaf, text):
    with pytest.raises(TypeError, match=rf"^leaf \['x'\] of datum 8 {re.escape(text)}"):
        tree_stack([{"x": "text"}, {"x": leaf}], indices=[7, 8])
    with pytest.raises(TypeError, match=rf"^leaf \[0\]\['x'\] of datum 7 {re.escape(text)}"):
        stack_on_host([{"x": leaf}], [7])


def test_a_mask_is_not_lost():
    masked = np.ma.array([1.0, 2.0], mask=[False, True])
    text = (
        "leaf (the whole) of datum 1 is a masked array with masked elements; fill them, or give the mask as an array "
        "of its own"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        tree_stack([np.ones(2), masked])


WIDE = [
    (2**32, "4294967296", "int32", "give smaller numbers, or two parts of it"),
    (np.int64(-(2**31) - 1), "-2147483649", "int32", "give smaller numbers, or two parts of it"),
    (np.uint64(2**32), "4294967296", "uint32", "give smaller numbers, or two parts of it"),
    (2**63, "9223372036854775808", "uint32", "give smaller numbers, or two parts of it"),
    (1e300, "1e+300", "float32", "scale the data"),
    (np.float64(-1e39), "-1e+39", "float32", "scale the data"),
    (complex(1e300, np.inf), "(1e+300+infj)", "complex64", "scale the data"),
]


@pytest.mark.parametrize(("number", "name", "dtype", "advice"), WIDE)
def test_a_number_that_does_not_fit_is_an_error_or_exact_under_x64(number, name, dtype, advice):
    small = type(number)(1)
    text = f"leaf ['x'] of datum 5 has {name}, which does not fit into {dtype}; enable jax_enable_x64, or {advice}"
    data = [[{"x": small}], [{"x": number}]]
    with pytest.raises(ValueError, match=exactly(text.replace("leaf ", "leaf [0]"))):
        stack_on_host(data, [4, 5])
    rows = [{"x": np.asarray([small, number], np.asarray(number).dtype)}]
    with pytest.raises(ValueError, match=exactly(text.replace("leaf ", "leaf [0]").replace("datum 5", "datum 1"))):
        arranged(rows, [{"x": np.zeros(())}], 2, 1)
    with jax.enable_x64(True):
        (stacked,) = stack_on_host(data, [4, 5])
        assert stacked["x"].tolist() == [small, number]
        assert jax.device_put(stacked["x"]).dtype == stacked["x"].dtype


def test_the_place_in_an_array_is_told():
    values = np.zeros((2, 3), np.int64)
    values[1, 2] = 2**40
    text = (
        "leaf (the whole) of datum 1 has 1099511627776 at [1, 2], which does not fit into int32; enable "
        "jax_enable_x64, or give smaller numbers, or two parts of it"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        tree_stack([jnp.zeros((2, 3), jnp.int32), values])  # one of JAX makes all of JAX


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (
            [1, 2**64],
            "leaf [0] of datum 1 is 18446744073709551616, which no dtype of whole numbers holds; give it in two",
        ),
        ([-1, 2**63], "leaf [0] of datum 1 is 9223372036854775808, which does not fit into int64 beside -1"),
    ],
)
def test_whole_numbers_do_not_become_others(numbers, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        tree_stack([[number] for number in numbers])


def test_limits_infinity_and_nan_pass():
    most, least = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    (whole,) = stack_on_host([most, least], [0, 1])
    assert whole.tolist() == [most, least]
    (floats,) = stack_on_host([np.inf, -np.inf, np.nan, 3e38], range(4))
    np.testing.assert_array_equal(floats, np.float32([np.inf, -np.inf, np.nan, 3e38]))
    (empty,) = stack_on_host([np.zeros(0, np.int64)], [0])
    assert empty.shape == (1, 0)


def test_stacked_data_share_no_memory_with_the_trees():
    source = [[np.zeros(2, np.float32), Tensor(np.zeros(2, np.float32))]]  # a single one, for which a view would do
    for stacked in (tree_stack(source), stack_on_host(source, [0])):
        assert not any(np.shares_memory(leaf, np.asarray(one)) for leaf, one in zip(stacked, source[0], strict=True))
    mine = np.ones((4, 3), np.float32)
    (given,) = arranged([mine], [np.ones(3)], 4, 1)
    assert not np.shares_memory(given, mine)
