"""What the compiled programs are: how many, what they copy, what they reuse, what they transfer."""

import logging
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.engine import MANY_PROGRAMS, SAME, SPLIT
from learnax.profiling.phases import Phases
from tests.helpers import MemoryRun, assert_trees_equal, host, make_data, make_trainer, run_script


class Wide(nn.Module):
    """8 MB of parameters, nearly all of them in one matrix."""

    @nn.compact
    def __call__(self, x, y):
        x = nn.relu(nn.Dense(1408)(x))
        return nn.Dense(3)(nn.relu(nn.Dense(1408)(x)))


def program(trainer, kind):
    (found,) = [p for p in trainer.engine.programs.values() if p.kind == kind]
    return found


@pytest.mark.parametrize(("steps_per_execution", "dispatches"), [(1, (15, 12)), (4, (8, 6)), ("auto", (6, 6))])
def test_a_run_compiles_one_program_to_train_and_one_to_evaluate(devices, steps_per_execution, dispatches):
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            traces.append(isinstance(x, jax.core.Tracer))
            return nn.Dense(3)(x)

    trainer = make_trainer(
        model=Counting(),
        num_epochs=3,
        val_datasets={"near": make_data(19, 1), "far": make_data(8, 2)},
        registry="counts",
        save_every=4,
        compile=True,
        devices=devices,
        steps_per_execution=steps_per_execution,
    )
    before = len(traces)
    trainer.train()
    assert len(traces) == before, "the model was traced again after it was compiled"
    assert sorted(p.kind for p in trainer.engine.programs.values()) == ["evaluate", "train"]
    # Three epochs of five steps, cut at every fourth; sets of three batches and of one.
    assert (program(trainer, "train").calls, program(trainer, "evaluate").calls) == dispatches


def test_the_cache_is_the_same_compiled_early_or_late(one_device):
    early = make_trainer(val_datasets=[make_data(8, 1)], compile=True)
    late = make_trainer(val_datasets=[make_data(8, 1)])
    assert len(early.engine.programs) == 2
    assert not late.engine.programs
    early.train()
    late.train()
    assert set(early.engine.programs) == set(late.engine.programs)
    assert_trees_equal(early.train_state.params, late.train_state.params)


def test_compiling_early_covers_every_validation_set_and_the_sampling():
    trainer = make_trainer(
        val_datasets={"same": make_data(8), "short": [[x] for x, _ in make_data(8)]},
        losses=lambda output, datum: (output, jnp.mean(output**2), {}),
        sample_model=lambda params, key, datum: datum[0] * 2,
        sample_every=2,
        compile=True,
    )
    before = dict(trainer.engine.programs)
    assert sorted(p.kind for p in before.values()) == ["evaluate", "evaluate", "sample", "train"]
    trainer.train()
    assert trainer.engine.programs == before


class Pooled(nn.Module):
    """Takes data of any length."""

    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(3)(x.mean(keepdims=True))


def lengthened(data, times):
    return [[np.tile(x, times), y] for x, y in data]


@pytest.mark.parametrize(("steps_per_execution", "calls"), [(1, [8, 4]), (4, [4, 2])])
def test_data_of_a_new_shape_compile_once_more_and_say_so(caplog, steps_per_execution, calls):
    data = [*lengthened(make_data(16), 2), *make_data(16, 1), *lengthened(make_data(16, 2), 2)]
    trainer = make_trainer(
        model=Pooled(), train_dataset=data, num_epochs=2, steps_per_execution=steps_per_execution, compile=True
    )
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer.train()
    programs = list(trainer.engine.programs.values())
    assert [p.kind for p in programs] == ["train", "train"]
    assert [p.calls for p in programs] == calls
    seconds = sum(programs[1].seconds.values())
    room = steps_per_execution
    assert caplog.messages == [
        f"train: a batch of a new shape was compiled for in {seconds:.2f} s: "
        f"[0] from float32[{room}, 8, 16] to float32[{room}, 8, 8] (program 2 of its kind)"
    ]


def test_the_line_for_a_new_shape_names_each_leaf_that_differs(caplog):
    data = [[{"x": x, "z": x[:2]}, y] for x, y in make_data(8)]
    data += [[{"x": x[:4].astype(np.float16), "z": x[:2]}, y] for x, y in make_data(8)]

    class Named(nn.Module):
        @nn.compact
        def __call__(self, d, y):
            return nn.Dense(3)(d["x"].astype(jnp.float32).mean(keepdims=True) + d["z"].mean())

    make_trainer(model=Named(), train_dataset=data, num_epochs=1, steps_per_execution=1).train()
    (line,) = caplog.messages
    assert line.endswith(" s: [0/x] from float32[1, 8, 8] to float16[1, 8, 4] (program 2 of its kind)")


@pytest.mark.thorough
def test_a_program_for_each_of_many_shapes_is_told_with_what_to_do(caplog):
    data = [datum for times in range(1, MANY_PROGRAMS + 2) for datum in lengthened(make_data(8), times)]
    make_trainer(model=Pooled(), train_dataset=data, num_epochs=1, steps_per_execution=1).train()
    lines = [line for line in caplog.messages if "a batch of a new shape" not in line]
    assert lines == [
        "train: 8 programs are compiled, for batches of as many shapes. Each costs its compilation and its memory: "
        "pad the data to one shape, or sort them into a few buckets of one shape each"
    ]
    assert len(caplog.messages) == MANY_PROGRAMS + 1
    assert caplog.messages.index(lines[0]) == MANY_PROGRAMS - 1


def test_validation_sets_of_other_shapes_are_compiled_for_at_the_start_and_are_no_news(caplog):
    held_out = {"short": make_data(9), "long": lengthened(make_data(9), 2)}
    make_trainer(model=Pooled(), val_datasets=held_out).train()
    assert not caplog.messages


def test_the_seconds_of_the_start_are_told(one_device):
    trainer = make_trainer(val_datasets=[make_data(8, 1)])
    assert list(trainer.startup) == ["import", "init", "trace", "lower", "compile", "first step"]
    done = ["init", *(["import"] if trainer.startup["import"] else [])]  # the import is the first trainer's alone
    assert {name for name, seconds in trainer.startup.items() if seconds} == set(done)
    trainer.train()
    startup = trainer.startup
    assert all(startup[name] > 0 for name in startup if name != "import")
    programs = trainer.engine.programs.values()
    assert startup["trace"] == pytest.approx(sum(program.seconds["trace"] for program in programs), rel=0.05)
    assert 0 < startup["compile"] <= sum(program.seconds["compile"] for program in programs)
    assert make_trainer().startup["import"] == 0
    trainer.epoch(0)
    assert trainer.startup == startup


NOT_REUSED = """
import jax
import tests.conftest
jax.config.update("jax_debug_nans", True)  # under which nothing is donated
from tests.helpers import make_trainer
make_trainer(devices=jax.devices()[:COUNT]).train()
"""


@pytest.mark.processes
@pytest.mark.parametrize("count", [1, 4])
def test_a_state_that_is_copied_and_not_updated_in_place_is_told_once_by_name(tmp_path, count):
    # Without a cache: XLA of jaxlib 0.10.0 has a line of its own for each program that it loads from one.
    result = run_script(NOT_REUSED.replace("COUNT", str(count)), tmp_path, env={"LEARNAX_COMPILATION_CACHE": "off"})
    (line,) = result.stderr.splitlines()
    leaves = [f"Dense_{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]
    hyperparams = [f"hyperparams/{name}" for name in ("b1", "b2", "eps", "eps_root", "learning_rate")]
    adam = ["count", *(f"{moment}/{leaf}" for moment in ("mu", "nu") for leaf in leaves)]
    opt_state = ["count", *hyperparams, *(f"inner_state/0/{name}" for name in adam)]
    names = [*(f"params/{leaf}" for leaf in leaves), *(f"opt_state/{name}" for name in opt_state), "step"]
    shown = ", ".join([*names[:10], "and others"])
    assert line == f"the step did not reuse the memory of 20 of the state's 20 arrays, and copies them: {shown}"


def test_a_state_that_is_updated_in_place_is_no_news(devices, caplog):
    trainer = make_trainer(devices=devices, num_epochs=1)
    trainer.train()
    trainer.train_state = host(trainer.train_state)
    trainer.epoch(0)
    assert not caplog.messages


def test_training_copies_no_state_and_holds_no_second_one(one_device):
    trainer = make_trainer(model=Wide(), compile=True)
    compiled = program(trainer, "train").compiled
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state))
    params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state.params))
    memory = compiled.memory_analysis()
    # Gradients are as large as the parameters, and so are their squares where XLA does not fuse them (jaxlib 0.10.0);
    # a second state would be three times as large.
    assert memory.temp_size_in_bytes < 2.25 * params_bytes
    # What is donated is what comes out: all of the state.
    assert memory.alias_size_in_bytes >= state_bytes
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer.train_state.params) if leaf.size > 1000}
    assert shapes
    for shape in shapes:
        dims = ",".join(map(str, shape))
        assert not re.search(rf"f32\[{dims}\]\S* copy\(", compiled.as_text()), f"a parameter of shape {shape} is copied"


def test_the_check_on_copies_sees_a_guard_that_copies(one_device):
    """The check above, tried on the naive guard: it must be able to fail."""
    trainer = make_trainer(model=Wide(), compile=True)

    def naive(state, new):
        return jax.tree.map(lambda n, old: jnp.where(jnp.isnan(n).any(), old, n * 2), new, state), new

    state = jax.eval_shape(lambda: trainer.train_state.params)
    memory = jax.jit(naive, donate_argnums=0).lower(state, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes < memory.output_size_in_bytes


def pointers(tree):
    return sorted(s.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)


def test_a_step_updates_the_donated_buffers_in_place(devices):
    trainer = make_trainer(model=Wide(), train_dataset=make_data(8), num_epochs=1, devices=devices)
    before = trainer.parts.progress.live
    places = pointers(before)
    trainer.epoch(0)
    assert pointers(trainer.parts.progress.live) == places
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_a_restored_state_is_updated_in_place_too(one_device):
    make_trainer(registry="again", train_dataset=make_data(8), num_epochs=1).train()
    trainer = make_trainer(registry="again", train_dataset=make_data(8), num_epochs=2, load_checkpoint=True)
    places = pointers(trainer.parts.progress.live)
    trainer.epoch(1)
    assert pointers(trainer.parts.progress.live) == places


@pytest.mark.thorough
@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_dispatch_fetches_one_array_from_the_device(devices, monkeypatch, steps_per_execution):
    """The scalars of all its steps are one transfer, and nothing else is read."""
    fetched = []
    implementation = type(jnp.zeros(()))
    value, in_numpy = implementation._value, False

    def by_jax(self):  # float(x), x.item(), and numpy where the memory is not shared
        if not in_numpy:
            fetched.append(self.shape)
        return value.fget(self)

    def by_numpy(function):  # numpy reads the memory of a single CPU device without asking JAX
        def counted(x, *args, **kwargs):
            nonlocal in_numpy
            in_numpy = isinstance(x, jax.Array)
            if in_numpy:
                fetched.append(x.shape)
            try:
                return function(x, *args, **kwargs)
            finally:
                in_numpy = False

        return counted

    trainer = make_trainer(
        train_dataset=make_data(80),
        num_epochs=1,
        compile=True,
        devices=devices,
        run=MemoryRun(),
        steps_per_execution=steps_per_execution,
    )
    monkeypatch.setattr(implementation, "_value", property(by_jax))
    monkeypatch.setattr(np, "asarray", by_numpy(np.asarray))
    monkeypatch.setattr(np, "array", by_numpy(np.array))
    trainer.train()
    monkeypatch.undo()
    assert len(trainer.metrics["train/loss"]) == 10
    names = [*trainer.metrics, *(name for name in trainer.run.rows[1] if name.startswith("grads/"))]
    columns = sum(not name.startswith("train_epoch/") and name != "train/update_time" for name in names)
    assert fetched == [(steps_per_execution, columns)] * program(trainer, "train").calls
    assert program(trainer, "train").calls == {1: 10, 4: 3}[steps_per_execution]


def test_steps_in_flight_are_bounded_on_several_cpu_devices():
    trainer = make_trainer(devices=jax.devices()[:4])
    assert trainer.engine.in_flight == 0
    assert make_trainer(devices=jax.devices()[:1]).engine.in_flight == 2


@pytest.mark.parametrize("spec", [SAME, SPLIT], ids=["same", "split"])
def test_what_is_put_on_devices_comes_back(devices, spec):
    from learnax.engine import Engine

    tree = {"a": np.random.default_rng().normal(size=(8, 3)).astype(np.float32), "none": None}
    assert_trees_equal(Engine(devices, Phases()).put(tree, spec), tree)


def test_owned_copies_share_no_memory_with_what_they_were_made_of(devices):
    from learnax.engine import Engine

    # A CPU device takes over numpy's memory where it lies on a boundary of 64 bytes.
    room = np.zeros((1 << 16) + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    array = room[start : start + (1 << 16)]
    owned = Engine(devices, Phases()).own({"numpy": array, "jax": jax.device_put(array, devices[0])})
    array[:] = 1
    assert host(owned["numpy"]).max() == 0
    assert array.ctypes.data not in pointers(owned)


@pytest.mark.thorough
def test_every_number_of_devices_trains_alike():
    """Fresh random data each time; only the order of sums differs between them."""
    seed = int(np.random.default_rng().integers(1 << 30))
    data, held_out = make_data(43, seed), make_data(13, seed + 1)
    trainers = [make_trainer(train_dataset=data, val_datasets=[held_out], devices=jax.devices()[:n]) for n in (1, 2, 4)]
    for trainer in trainers:
        trainer.train()
    for other in trainers[1:]:
        for name, values in trainers[0].metrics.items():
            if "update_time" in name:
                continue
                np.testing.assert_allclose(
                    other.metrics[name], values, rtol=1e-4, atol=1e-6, err_msg=f"{name}, seed {seed}"
                )


def test_a_model_that_names_the_mapped_axis_trains_on_any_number_of_devices(devices):
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3)(x - jax.lax.pmean(x, "devices"))

    trainer = make_trainer(model=Centred(), val_datasets=[make_data(9, 1)], devices=devices)
    trainer.train()
    assert np.isfinite(trainer.metrics["train/loss"]).all()
