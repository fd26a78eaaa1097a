"""A divided state: the same trajectory, less memory on each device, and checkpoints that any layout reads."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from learnax.engine.sharding import divided
from learnax.loss import LossPipe
from learnax.registry import Registry
from learnax.step import AXIS
from learnax.step.packing import SMALL
from tests.helpers import (
    MLP,
    MemoryRun,
    Poisonable,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

WIDTH = 4 * SMALL // 8
"""Of a layer whose kernel (8 x WIDTH) is worth dividing; the one behind it (WIDTH x 3) is, too."""


def make_wide(**options):
    return make_trainer(**({"model": MLP(WIDTH), "train_dataset": make_data(43), "max_grad": 0.5} | options))


def train_program(trainer):
    (program,) = [program for (kind, _), program in trainer.engine.programs.items() if kind == "train"]
    return program


def test_arrays_are_divided_along_their_first_axis_that_the_devices_divide():
    def spec(*shape):
        return divided({"a": jax.ShapeDtypeStruct(shape, jnp.float32)}, 4, AXIS)["a"]

    assert spec(1024, 4096) == PartitionSpec(AXIS)
    assert spec(1023, 4096) == PartitionSpec(None, AXIS)
    assert spec(4096, 1024) == PartitionSpec(AXIS)
    assert spec(4096, 4096) == PartitionSpec(AXIS)
    assert spec(1024, 4097) == PartitionSpec(AXIS)
    assert spec(1023, 4097) == PartitionSpec()  # nothing fits
    assert spec(SMALL) == PartitionSpec()  # it is packed with others
    assert spec(SMALL + 4) == PartitionSpec(AXIS)
    assert spec() == PartitionSpec()
    assert divided({"a": np.zeros((512, 512))}, 1, AXIS) == {"a": PartitionSpec()}


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (4, {}),
        pytest.param(1, {}, marks=pytest.mark.soak),
        pytest.param(4, {"steps_per_execution": 1}, marks=pytest.mark.soak),
        pytest.param(2, {"accumulate_steps": 2}, marks=pytest.mark.thorough),
        pytest.param(4, {"optimizer": optax.adamw(1e-3)}, marks=pytest.mark.soak),
        pytest.param(2, {"losses": LossPipe([Poisonable()])}, marks=pytest.mark.thorough),
    ],
)
def test_the_trajectory_is_that_of_a_whole_state(count, options):
    data = make_data(43)
    data[10][1][:] = 7  # poisons the second batch of `Poisonable`
    given = {"train_dataset": data, "val_datasets": [make_data(21, 1)], **options}
    given["devices"] = jax.devices()[:count]
    plain, sharded = make_wide(**given), make_wide(shard_state=True, **given)
    for trainer in (plain, sharded):
        trainer.train()
    # Adam makes much of the last bits of a gradient that is nearly zero.
    assert_trees_close(sharded.train_state, plain.train_state, rtol=1e-5, atol=1e-5)
    assert set(sharded.metrics) == set(plain.metrics)
    for name in plain.metrics:
        if name.endswith("update_time"):
            continue
        np.testing.assert_allclose(sharded.metrics[name], plain.metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    if "losses" in options:
        assert sum(sharded.metrics["train/has_nan"]) == 2


def test_memory_per_device_falls_as_the_devices_grow_in_number():
    arguments, aliased = [], []
    for number in (1, 2, 4):
        trainer = make_wide(shard_state=True, devices=jax.devices()[:number])
        trainer.parts.compile()
        costs = train_program(trainer).compiled.memory_analysis()
        arguments.append(costs.argument_size_in_bytes)
        aliased.append(costs.alias_size_in_bytes)
        for leaf in jax.tree.leaves(trainer.train_state):
            if leaf.size > SMALL:
                assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // number}
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state) if leaf.size <= SMALL)
    assert state > 10 * whole
    for number, size, in_place in zip((1, 2, 4), arguments, aliased, strict=True):
        wanted = whole + (state - whole) / number
        assert size == pytest.approx(wanted, rel=0.02)
        assert in_place == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("count", [1, 4])
def test_parameters_are_gathered_where_the_step_needs_them_and_nothing_is_copied(count, caplog):
    devices = jax.devices()[:count]
    trainer = make_wide(shard_state=True, devices=devices, steps_per_execution=1)
    trainer.train()
    text = train_program(trainer).compiled.as_text()
    gathers = len(re.findall(r"all-gather(?:-start)?\(", text))
    # Each kernel once, and once more for a gradient that goes on below it; its own gradient is summed, not gathered.
    assert gathers == (2 + 1 if len(devices) > 1 else 0)
    assert not [line for line in caplog.messages if "did not reuse the memory" in line]
    assert trainer.preflight().copied == ()


def test_a_fresh_state_is_nowhere_whole():
    trainer = make_wide(shard_state=True, devices=jax.devices()[:4])
    fresh = trainer.init_train_state()
    kernel = fresh.params["Dense_1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8 // 4, WIDTH)}
    assert_trees_equal(fresh, make_wide(devices=jax.devices()[:1]).init_train_state())


@pytest.mark.thorough
def test_checkpoints_are_read_by_any_layout(tmp_path):
    registry = Registry("tests", tmp_path)
    reference = make_wide(num_epochs=3, devices=jax.devices()[:4])
    reference.train()
    layouts = [(4, True), (2, True), (1, False)]
    for epochs, (number, sharded) in enumerate(layouts, 1):
        options = {"num_epochs": epochs, "devices": jax.devices()[:number], "shard_state": sharded}
        trainer = make_wide(registry=registry, load_checkpoint=True, save_every=3, **options)
        assert trainer.log.step == 5 * (epochs - 1)
        trainer.train()
    assert_trees_close(trainer.train_state, reference.train_state, atol=1e-5)
    np.testing.assert_allclose(trainer.metrics["train/loss"], reference.metrics["train/loss"], rtol=1e-5)


@pytest.mark.thorough
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    registry = Registry("tests", tmp_path)
    options = {"shard_state": True, "devices": jax.devices()[:4]}
    whole = make_wide(**options)
    whole.train()
    make_wide(registry=registry, num_epochs=1, **options).train()
    resumed = make_wide(registry=registry, load_checkpoint=True, **options)
    resumed.train()
    assert_trees_equal(resumed.train_state, whole.train_state)


def test_plots_samples_and_the_model_see_whole_arrays():
    seen, devices = [], jax.devices()[:4]
    trainer = make_wide(
        shard_state=True,
        devices=devices,
        run=MemoryRun(),
        save_model=lambda params: seen.append(params["Dense_1"]["kernel"].shape),
        save_every=5,
        plot_pipe=lambda run, outputs, batch: seen.append((len(outputs), len(batch))),
        plot_every=5,
        sample_every=5,
        sample_model=lambda params, key, datum: params["Dense_1"]["kernel"].sum(),
        sample_metrics=lambda sample, datum: {"sum": float(sample)},
    )
    trainer.train()
    assert seen == [(8, 8), (8, WIDTH)] * 2
    total = host(trainer.train_state.params["Dense_1"]["kernel"]).sum()
    assert trainer.metrics["train/sum"][-1] == pytest.approx(total, rel=1e-3, abs=1e-2)


def test_an_update_by_hand_works():
    devices = jax.devices()[:4]
    trainer = make_wide(shard_state=True, devices=devices)
    plain = make_wide(devices=devices)
    key = jax.random.key(3)
    for made in (trainer, plain):
        made.outputs, made.after, made.scalars = made.update(key, made.train_state, make_data(8, 5))
    assert_trees_close(trainer.after, plain.after)
    assert_trees_close(trainer.outputs, plain.outputs)


class Named(nn.Module):
    """A model that names the mapped axis."""

    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(3)(x) - jax.lax.pmean(x.mean(), "devices")


def test_a_model_that_names_the_axis_is_an_error():
    with pytest.raises(
        ValueError, match=r"^shard_state=True knows no mapped axis, but the model or the losses use 'devic"
    ):
        make_trainer(model=Named(), shard_state=True)
