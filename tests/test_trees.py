"""Any tree comes back from a checkpoint as it was: whatever its keys, containers, number types and shapes."""

import collections
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from learnax.checkpoint import Checkpointer, SaveError
from learnax.checkpoint.trees import flat, nested, old_names
from learnax.step.optimizers import adam
from learnax.step.state import TrainState
from learnax.utils import is_key, key_data, leaves_by_path, unescaped
from tests.helpers import make_data, make_trainer

ODD_LETTERS = "/.→[]*?\\%@~ aA0_-:'\"{}$#\n\x00\udc80é"
NUMBERS = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex64 complex128"
NARROW = (
    "int2 uint2 int4 uint4 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz "
    "float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
IMPLEMENTATIONS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
DTYPES = [*NUMBERS.split(), *NARROW.split()]


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_pytree_node_class
class Bag:
    """A container of its own, which gives its leaves no keys."""

    def __init__(self, *items):
        self.items = items

    def tree_flatten(self):
        return self.items, None

    @classmethod
    def tree_unflatten(cls, _, items):
        return cls(*items)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    first: object
    second: object


def round_trip(state, folder=None, target=True):
    """The state as a fresh checkpointer reads it, from a folder of its own."""
    path = Path(folder or tempfile.mkdtemp(prefix="learnax-tests-"))
    try:
        saver = Checkpointer.at(path / "checkpoints")
        saver.save_latest(state, 3)
        saver.wait()
        return Checkpointer.at(path / "checkpoints").load_latest(target=state if target else None)["state"]
    finally:
        shutil.rmtree(path)


def bits(leaf):
    array = np.asarray(key_data(leaf))
    return str(leaf.dtype), array.shape, array.tobytes()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert bits(one) == bits(other)


def array_of(dtype, shape, seed=0):
    values = np.random.default_rng(seed).integers(-1 if np.dtype(jnp.dtype(dtype)).kind == "i" else 0, 2, shape)
    return values.astype(jnp.dtype(dtype))


# ---- names


def names(tree):
    return list(leaves_by_path(tree))


def test_ordinary_names_stay_as_they_are():
    params = {"Dense_0": {"kernel": 1, "bias": 2}, "layers_1-a": {"scale": 3}, "größe": 4, "two words": 5}
    ordinary = ["Dense_0/bias", "Dense_0/kernel", "größe", "layers_1-a/scale", "two words"]
    assert sorted(names(params)) == ordinary
    state = jax.eval_shape(optax.adam(1e-2).init, {"w": jnp.ones(2)})
    assert names(state) == ["0/count", "0/mu/w", "0/nu/w"]
    assert names([1, {0: 2, 1: 3}, Pair(4, None), Record(5, Bag(6))]) == [
        "0", "1/0", "1/1", "2/left", "3/first", "3/second/0"
    ]  # fmt: skip
    assert names(7) == [""]


def test_what_is_not_plain_in_a_key_is_escaped():
    assert names({"layer.kernel": 1}) == ["layer%2Ekernel"]
    assert names({"a/b": 1, "a": {"b": 2}}) == ["a/b", "a%2Fb"]
    assert names({"": 1, " ": 2, "%": 3}) == ["%", "%20", "%25"]
    assert names({"x@1": 1, "é→": 2, " a  b ": 3}) == ["%20a%20 b%20", "x%401", "é%E2%86%92"]
    assert names({(0, "a"): 1}) == ["%280%2C %27a%27%29"]


@pytest.mark.parametrize(
    "tree",
    [
        collections.OrderedDict([(0, 1), ("0", 2)]),
        collections.OrderedDict([(0, 1), ("0", {"a": 2}), ("0~int", 3)]),
        collections.OrderedDict([(1.5, 1), ("1.5", 2), ((1,), 3), ("(1,)", 4), (True, 5), ("True", 6)]),
        {"a": 1, "a/b": 2, "a.b": 3, "a%2Fb": 4},
        collections.OrderedDict([(0, {"x": 1}), ("0", {"y": 2})]),
    ],
)
def test_keys_that_are_spelled_alike_give_different_names_in_any_order(tree):
    leaves = leaves_by_path(tree)
    assert len(leaves) == len(jax.tree.leaves(tree))
    assert flat(nested(leaves)) == leaves
    other = collections.OrderedDict(reversed(tree.items()))
    assert dict(leaves_by_path(other)) == dict(leaves)


def test_a_container_that_gives_two_leaves_one_key_gives_them_two_names():
    @jax.tree_util.register_pytree_with_keys_class
    class Twice(Bag):
        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("same"), item) for item in self.items], None

    assert len(leaves_by_path(Twice(1, 2, {"a": 3}))) == 3
    assert flat(nested(leaves_by_path(Twice(1, {"a": 2})))) == leaves_by_path(Twice(1, {"a": 2}))


@pytest.mark.thorough
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.sets(st.text(ODD_LETTERS), min_size=1, max_size=4))
def test_any_text_as_a_key_can_be_read_from_its_name(keys):
    given = {key: number for number, key in enumerate(keys)}
    assert {unescaped(name): number for name, number in leaves_by_path(given).items()} == given
    assert all(set(name) <= set("%0123456789ABCDEFaA_- é") for name in leaves_by_path(given))


# ---- any tree


def leaf_arrays():
    arrays = st.builds(
        array_of,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.integers(0, 99),
    )
    keys = st.builds(
        lambda impl, shape: jax.random.wrap_key_data(np.ones((*shape, IMPLEMENTATIONS[impl]), np.uint32), impl=impl),
        st.sampled_from(list(IMPLEMENTATIONS)),
        st.sampled_from([(), (2,), (2, 1), (0,)]),
    )
    return st.one_of(arrays, arrays, arrays, keys)


def trees():
    texts = st.one_of(st.sampled_from(["a", "b", "0", "1", "a.b", "a/b", "w", ""]), st.text(ODD_LETTERS, max_size=6))
    mixed = st.one_of(texts, st.integers(0, 2), st.tuples(st.integers(0, 1)))
    return st.recursive(
        st.one_of(st.none(), leaf_arrays()),
        lambda inner: st.one_of(
            st.dictionaries(texts, inner, max_size=4),
            st.dictionaries(st.integers(-2, 3), inner, max_size=3),
            st.dictionaries(mixed, inner, max_size=4).map(collections.OrderedDict),
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.builds(Pair, inner, inner),
            st.builds(Record, inner, inner),
            st.lists(inner, max_size=2).map(lambda items: Bag(*items)),
        ),
        max_leaves=12,
    )


@pytest.mark.thorough
@hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(trees(), trees())
def test_any_tree_comes_back_bit_for_bit(params, opt_state):
    state = TrainState(params, opt_state, np.int32(3))
    path = Path(tempfile.mkdtemp(prefix="learnax-tests-"))
    try:
        saver = Checkpointer.at(path)
        saver.save_latest(state, 3)
        saver.wait()
        assert_same(Checkpointer.at(path).load_latest(target=state)["state"], state)
        # Without a target the containers are dicts, and no leaf is lost or another one.
        plain = Checkpointer.at(path).load_latest()["state"]
        assert sorted(map(bits, jax.tree.leaves(plain.params))) == sorted(map(bits, jax.tree.leaves(params)))
        assert sorted(map(bits, jax.tree.leaves(plain.opt_state))) == sorted(map(bits, jax.tree.leaves(opt_state)))
    finally:
        shutil.rmtree(path)


def test_all_number_types_come_back():
    params = {dtype: [array_of(dtype, (2, 3)), array_of(dtype, ()), array_of(dtype, (0, 2))] for dtype in DTYPES} | {
        "jax": [jnp.asarray(array_of(dtype, (4,))) for dtype in DTYPES if jnp.dtype(dtype).itemsize <= 4]
    }
    state = TrainState(params, (), np.int32(3))
    got = round_trip(state)
    assert_same(got, state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got.params))


def test_names_of_any_length_come_back(tmp_path):
    params = {"n" * 300: jnp.ones(2), "d" * 3000: {".": {"→" * 500: jnp.zeros(3)}}}
    assert_same(round_trip(TrainState(params, {}, np.int32(3))).params, params)


def test_without_a_target_keys_come_back_as_they_were():
    params = {
        "layer.kernel": jnp.ones(2),
        "layer": {"kernel": jnp.zeros(2), "": jnp.ones(1)},
        "a/b": {"x y%": jnp.ones(3)},
    }
    state = TrainState(params, adam(1e-2).init(params), np.int32(3))
    got = round_trip(state, target=False)
    assert_same(got._replace(step=state.step), state)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_typed_random_keys_come_back_as_such(impl):
    key = jax.random.key(3, impl=impl)
    state = TrainState({"w": jnp.ones(2)}, {"one": key, "many": jax.random.split(key, 3)}, np.int32(3))
    for target in (True, False):
        got = round_trip(state, target=target)
        assert_same(got._replace(step=state.step), state)
        jax.random.normal(got.opt_state["one"])


def test_a_key_of_another_kind_than_the_models_is_named():
    state = TrainState({}, {"key": jax.random.key(3)}, np.int32(3))
    folder = Path(tempfile.mkdtemp(prefix="learnax-tests-"))
    saver = Checkpointer.at(folder)
    saver.save_latest(state, 3)
    with pytest.raises(ValueError, match=r"opt_state/key: key<fry>\[\] in the checkpoint, key<rbg>\[\] in the model"):
        saver.load_latest(target=state._replace(opt_state={"key": jax.random.key(3, impl="rbg")}))
    shutil.rmtree(folder)


OPTIMISERS = {
    "nothing": lambda: optax.identity(),
    "a chain": lambda: optax.chain(
        optax.clip(1.0), optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.scale_by_adam(), optax.sgd(1e-2, 0.9)
    ),
    "noise": lambda: optax.noisy_sgd(1e-2, key=jax.random.key(5)),
    "a mask": lambda: optax.masked(optax.adam(1e-2), {"a.b": True, "c": {"d/e": False}}),
    "several": lambda: optax.multi_transform(
        {"x/y": optax.adam(1e-3), "x.y": optax.set_to_zero()}, {"a.b": "x/y", "c": {"d/e": "x.y"}}
    ),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "a schedule": lambda: adam(optax.linear_schedule(1e-2, 1e-3, 9)),
    "every few steps": lambda: optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(),
    "a wrapped one": lambda: optax.apply_if_finite(optax.inject_hyperparams(optax.adamw)(1e-2), 3),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_of_any_optimiser_comes_back(name):

    params = {"a.b": jnp.ones(2), "c": {"d/e": jnp.zeros((2, 2))}}
    opt_state = OPTIMISERS[name]().init(params)
    state = TrainState(params, opt_state, np.int32(3))
    assert_same(round_trip(state), state)
    assert [bits(leaf) for leaf in jax.tree.leaves(round_trip(state, target=False).params)] == [
        bits(leaf) for leaf in jax.tree.leaves(params)
    ]


@pytest.mark.parametrize("params", [{}, (), {"a": jnp.zeros((0, 3))}, {"a": {}, "b": (), "c": None}, jnp.ones(2)])
@pytest.mark.parametrize("opt_state", [(), optax.EmptyState(), {"m": np.zeros((2, 0), np.int8)}, None, jnp.ones(())])
def test_states_that_are_hardly_there_come_back(params, opt_state):
    state = TrainState(params, opt_state, np.int32(3))
    if opt_state is None:  # a target without one asks for the parameters alone
        assert_same(round_trip(state), state)
    else:
        assert_same(round_trip(state), state)


# ---- what trains can be saved


@pytest.mark.thorough
def test_a_run_with_random_keys_in_its_optimiser_goes_on_as_if_it_had_not_stopped(registry_path):
    def make(**overrides):
        noise = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(1e-2))
        return make_trainer(optimizer=noise, train_dataset=make_data(16), **overrides)

    whole = make(num_epochs=3)
    whole.train()
    make(num_epochs=1, registry="r").train()
    resumed = make(num_epochs=3, registry="r", load_checkpoint=True)
    resumed.train()
    assert is_key(resumed.train_state.opt_state[0].rng_key)
    assert_same(whole.train_state, resumed.train_state)


def test_a_preflight_takes_random_keys(registry_path):
    noise = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(1e-2))
    trainer = make_trainer(optimizer=noise, train_dataset=make_data(16))
    flight = trainer.preflight()
    assert "bit for bit" in str(flight)
    assert is_key(trainer.train_state.opt_state[0].rng_key)
    trainer.train()


# ---- saves of before names were escaped


def test_a_save_of_before_names_were_escaped_can_be_read(tmp_path):
    import orbax.checkpoint as ocp

    from learnax.checkpoint import files, seals

    params = {
        "two words": jnp.ones(2),
        "x.y": jnp.arange(3.0),
        "x@y": jnp.ones(1),
        "p%q": {"é": jnp.ones(2)},
        "s/t": jnp.zeros((2, 0)),
    }
    state = TrainState(params, adam(1e-2).init(params), np.int32(3))
    arrays = {name: np.asarray(leaf) for name, leaf in old_names(state._asdict()).items()}
    content = {
        **{"step": 3, "numbered": False, "best": None, "time": 1.5, "metrics": None, "history": [], "position": None},
        "script": None,
        "checksums": {name: seals.checksum(array) for name, array in arrays.items() if array.size},
        "empty": {name: [list(array.shape), array.dtype.name] for name, array in arrays.items() if not array.size},
    }  # fmt: skip
    held = {"content": content, "checksum": seals.seal(content)}
    tree = nested({name: array for name, array in arrays.items() if array.size})
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(held))
    files._orbax(together=False).save(tmp_path / "0", args=args)
    reader = Checkpointer.at(tmp_path)
    assert_same(reader.load_latest(target=state)["state"], state)
    plain = reader.load_latest()["state"]
    assert set(plain.params) == {"two words", "x.y", "x@y", "p%q", "s"}  # as it was: the slash divides
    assert_same(plain.params["p%q"], params["p%q"])
    twice = state._replace(params={**params, "p%q/é": jnp.ones(2)})
    with pytest.raises(
        ValueError, match="two leaves of the model have one name in this checkpoint, which is of an earlier"
    ):
        reader.load_latest(target=twice)


# ---- names of folders

FOLDERS = [
    "lr=[0.1]",
    "a*b",
    "a?b",
    "a\\b",
    "gs:",
    " a ",
    "a%20b#",
    "{x}",
    "~",
    "$HOME",
    "größe→",
    "a\nb",
    "a\udc80",
    "x" * 250,
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_any_name_can_be_saved_to_and_read_from(tmp_path, name):
    saver = Checkpointer.at(tmp_path / name / "checkpoints")
    saver.save_checkpoint(TrainState({"w": jnp.full(2, 2.0)}, (), np.int32(1)), 1)
    saver.wait()
    reader = Checkpointer.at(tmp_path / name / "checkpoints")
    assert list(reader.list_available_checkpoints()) == ["latest", 1]
    assert reader.load_latest()["state"].params["w"][0] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # and nothing elsewhere


def test_a_name_that_would_match_another_folder_reads_its_own(tmp_path):
    for number, name in enumerate(["ab", "a?", "a[b]"]):
        saver = Checkpointer.at(tmp_path / name)
        saver.save_latest(TrainState({"w": jnp.full(2, float(number))}, (), np.int32(1)), 1)
        saver.wait()
    for number, name in enumerate(["ab", "a?", "a[b]"]):
        assert Checkpointer.at(tmp_path / name).load_latest()["state"].params["w"][0] == number


def test_where_no_other_path_leads_there_it_is_told(tmp_path, monkeypatch):
    odd = tmp_path / "[x]"
    odd.mkdir()
    saver, state = Checkpointer.at(odd / "checkpoints"), TrainState({"w": jnp.ones(2)}, (), np.int32(1))
    saver.save_latest(state, 1)
    saver.wait()
    with monkeypatch.context() as temporary:
        temporary.setattr(tempfile, "tempdir", str(odd))
        saver.save_latest(state, 2)
        with pytest.raises(SaveError, match=r"OSError: .*storage libraries cannot open.*set TMPDIR to another one"):
            saver.wait()
        with pytest.raises(OSError, match="set TMPDIR to another one"):
            Checkpointer.at(odd / "checkpoints").load_latest()
    assert Checkpointer.at(odd / "checkpoints").load_latest()["step"] == 1
