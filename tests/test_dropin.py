"""A script written for learnax 0.1.0 runs as it stands, and computes what it always did."""

import copy
import dataclasses
import pickle

import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import wandb

from learnax.loss import LossFunction, LossPipe
from learnax.run import Run
from learnax.trainer import Trainer
from tests import reference
from tests.helpers import MemoryRun, assert_trees_equal, host, make_data, make_trainer


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Molecule:
    """A user's own datum, with a string in it."""

    positions: np.ndarray
    charge: float
    target: np.ndarray
    name: str

    def tree_flatten(self):
        return (self.positions, self.charge, self.target, self.name), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


class Noisy(nn.Module):
    """Draws noise from the `params` stream, and drops units through a stream it was never given."""

    @nn.compact
    def __call__(self, molecule):
        x = molecule.positions.reshape(-1) * molecule.charge
        x = x + 0.1 * jax.random.normal(self.make_rng("params"), x.shape)
        x = nn.Dropout(0.25, deterministic=False)(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(4)(x)


class Quiet(nn.Module):
    """No noise, so that a validation tail has one right answer."""

    @nn.compact
    def __call__(self, molecule):
        return nn.Dense(4)(nn.tanh(nn.Dense(16)(molecule.positions.reshape(-1) * molecule.charge)))


class Distance(LossFunction):
    def __call__(self, output, batch):
        assert isinstance(batch, list)
        loss = jnp.sum((output - batch[0].target) ** 2)
        return output, loss, {"distance": jnp.sqrt(loss)}


class Annealed(LossFunction):
    def __call__(self, output, batch, step):
        weight = jnp.exp(-0.05 * jnp.asarray(step, jnp.float32))
        loss = weight * jnp.sum(jnp.abs(output))
        return output, loss, {"annealed": loss}


class Documented(LossFunction):
    def _call(self, output, batch):
        loss = jnp.mean(output**2)
        return output, loss, {}


def ramp(step):
    return 1.0 - 0.01 * jnp.asarray(step, jnp.float32)


def make_losses():
    return LossPipe(
        [Distance(), Annealed(), Documented(weight=0.5, scheduler=ramp)], transform=lambda output: 2.0 * output
    )


def reference_losses(output, datum, step):
    output = 2.0 * output
    distance = jnp.sum((output - datum[0].target) ** 2)
    annealed = np.exp(-0.05 * step).astype(np.float32) * jnp.sum(jnp.abs(output))
    documented = 0.5 * (1.0 - 0.01 * step) * jnp.mean(output**2)
    return distance + annealed + documented, {"distance": jnp.sqrt(distance), "annealed": annealed}


def make_molecules(n, seed):
    rng = np.random.default_rng(seed)
    return [
        Molecule(rng.normal(size=(4, 3)).astype(np.float32), float(rng.normal()), rng.normal(size=4), f"molecule {i}")
        for i in range(n)
    ]


def without_names(data):
    return [[dataclasses.replace(d, name=None, target=d.target.astype(np.float32))] for d in data]


@pytest.fixture(scope="module")
def seed():
    """A fresh one each time; a failure shows it."""
    return int(np.random.default_rng().integers(1 << 30))


@pytest.fixture(scope="module", params=[Noisy, pytest.param(Quiet, marks=pytest.mark.soak)], ids=["noisy", "quiet"])
def expected(request, seed):
    model = request.param()
    data = make_molecules(35, seed)
    # Sets with a tail and without; a tail takes nothing from the random sequence.
    held_out = {"near": make_molecules(16, seed + 1), "far": make_molecules(21, seed + 2)}
    schedule = optax.exponential_decay(3e-2, 10, 0.5)
    # The reference's parameters are the model's; it is only slow.
    with jax.numpy_dtype_promotion("standard"):
        history, params = reference.train(
            model,
            reference_losses,
            lambda count: float(schedule(count)),
            seed,
            without_names(data),
            {name: without_names(data) for name, data in held_out.items()},
            epochs=3,
            batch_size=8,
        )
    return model, data, held_out, schedule, history, params


@pytest.mark.thorough
def test_an_old_script_computes_what_it_did(expected, devices, seed):
    model, data, held_out, schedule, history, params = expected
    run = MemoryRun()
    trainer = Trainer(
        model,
        schedule,
        make_losses(),
        seed,
        data,
        3,
        8,
        0,
        val_datasets=held_out,
        run=run,
        registry="molecules",
        load_checkpoint=run.id,
        save_every=5,
        devices=devices,
    )
    assert trainer.train() is run
    for name, values in history.items():
        if isinstance(model, Noisy) and name.startswith("far/"):
            continue  # the noise in a tail is of nobody's choosing
        np.testing.assert_allclose(trainer.metrics[name], values, rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        host(trainer.train_state.params),
        host(params),
    )


# ---- scripts in the spellings that there are, as they stand


COMMON = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)

data = [np.random.default_rng(i).normal(size=4).astype("float32") for i in range(20)]
"""

DOCUMENTED = f"""
from learnax.trainer import Trainer, TrainState, in_notebook, libcudart
from learnax.loss import LossFunction, LossPipe
from learnax.metrics import Metric, MetricPipe
from learnax.registry import Registry
from learnax.run import Run
{COMMON}
class Size(Metric):
    def __call__(self, output, batch):
        output = output if self.transform is None else self.transform(output)
        return {{"size": jnp.abs(output).mean()}}

class Halved(LossFunction):
    def _call(self, output, batch):
        return output, (output ** 2).mean(), MetricPipe([Size(transform=lambda x: x / 2)])(output, batch)

registry = Registry("documented")
run = registry.new_run({{"rate": 1e-2}})
run.save("inputs/first.pkl", {{"datum": data[0], "labels": ["a", "b"]}})
trainer = Trainer(Net(), 1e-2, LossPipe([Halved(0.5, lambda step: 1.0), Halved(weight=2.0)], None), 0, data, 2, 4, 0,
                  1.0, 300, 5, None, True, "val/loss", True, None, None, {{"val": data[:7]}}, None, run, "documented")
trainer.train()
run.finish()
same = Run.restore(run.id, registry.path, "documented", None)
saved = same.get_train_state(-1)
state, weights = saved["state"], same.get_weights(checkpoint="best")
inputs = same.read("inputs/first.pkl")
everything = same.read_all("*.pkl", read_fn=same.read)
config = same.get_config()
same.finish()
"""


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """No wandb account is found, and no session outlasts the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.finish()
    wandb.teardown()


@pytest.mark.processes
@pytest.mark.usefixtures("no_account")
def test_a_script_in_the_documented_spelling_runs(registry_path):
    names = {}
    exec(DOCUMENTED, names)
    run, trainer, folder = names["run"], names["trainer"], registry_path / "documented" / names["run"].id
    assert str(run) == f"Run({run.name})"
    assert names["saved"]["step"] == 10
    assert_trees_equal(names["state"], trainer.train_state)
    assert set(names["weights"]) == {"Dense_0"}
    assert names["inputs"]["labels"] == ["a", "b"]
    assert list(names["everything"]) == [str(folder / "inputs" / "first.pkl")]
    assert names["config"].rate == 1e-2
    assert len(trainer.metrics["val/size"]) == 2


WHEEL = f"""
from learnax import *
{COMMON}
class Noisy:
    def __call__(self, rng_key, output, datum, step):
        loss = ((output + 0.1 * jax.random.normal(rng_key, output.shape)) ** 2).mean()
        return output, loss, {{"step": step}}

trainer = Trainer(Net(), 1e-2, Noisy(), 0, data, 2, 4, 0, val_dataset=data[:7])
trainer.init()
trainer.init(TrainState(trainer.train_state.params, trainer.train_state.opt_state))
trainer.train()
batch = tree_stack(data[:4])
keys = jax.random.split(jax.random.key(1), 4)
state = TrainState(trainer.train_state.params, trainer.train_state.opt_state)
loss = trainer.loss(state.params, keys, batch, 3)
devices = trainer.device_count
split = lambda x: x.reshape(devices, 4 // devices, *x.shape[1:])
gradients = trainer.grad(state.params, split(keys), split(batch), 4)
updated = trainer.update(jax.random.key(1), state, data[:4], 5)
"""


def test_a_script_in_the_spelling_of_the_wheel_runs(caplog):
    names = {}
    exec(WHEEL, names)
    trainer = names["trainer"]
    assert {"Trainer", "TrainState", "Registry", "Run", "in_notebook", "tree_stack", "tree_unstack"} <= set(names)
    assert not {"run", "loss_", "metrics", "utils"} & set(names)
    assert caplog.messages == [
        "val_dataset is taken as the validation set 'val'; its name is now val_datasets={'val': ...}"
    ]
    assert len(trainer.metrics["val/loss"]) == 2
    assert trainer.metrics["train/step"] == list(range(10))
    assert trainer.train_state.step == 10
    (_, (_, _, seen)), (_, (_, _, also)), (_, state, metrics) = names["loss"], names["gradients"], names["updated"]
    assert seen["step"] == 3
    assert np.unique(also["step"]) == [4]
    assert metrics["step"] == 5
    assert state.step == 6


def test_the_steps_that_losses_see_are_the_states_unless_another_is_given():
    def losses(output, datum, step):
        return output, (output**2).mean(), {"step": step}

    trainer = make_trainer(losses=losses, num_epochs=1)
    trainer.train()
    state, data = trainer.train_state, make_data(8)
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *data)
    keys = jax.random.split(jax.random.key(0), 8)
    for given, expected in ((None, 5), (7, 7), (np.int64(9), 9), (jnp.int32(11), 11)):
        assert trainer.loss(state.params, keys, batch, step=given)[1][2]["step"] == expected
        lead = jax.tree.map(lambda leaf: leaf[None], batch)
        assert trainer.grad(state.params, keys[None], lead, step=given)[1][2]["step"].tolist() == [expected]
        _, after, metrics = trainer.update(jax.random.key(0), state, data, step=given)
        assert (metrics["step"], after.step) == (expected, expected + 1)
    assert state.step == 5


@pytest.mark.thorough
def test_a_trainer_takes_a_state_it_is_given_whatever_it_is_in(registry_path):
    first = make_trainer(registry="x", num_epochs=1)
    first.train()
    saved = Run("trainer", registry_path / "x" / "trainer").get_train_state()
    given = host(first.train_state)
    for init in (
        lambda trainer, state: trainer.maybe_init(train_state=state),
        lambda trainer, state: trainer.init(state),
    ):
        for state in (given, tuple(given), saved, saved["state"]):
            trainer = make_trainer(num_epochs=1)
            init(trainer, state)
            assert_trees_equal(trainer.train_state, given)
            assert trainer.log.step == 5
            trainer.maybe_init()  # one there is stays
            assert_trees_equal(trainer.train_state, given)
    trainer.train()
    assert trainer.train_state.step == 10
    assert len(trainer.metrics["train/loss"]) == 5
    _, after, _ = trainer.update(jax.random.key(0), saved, make_data(8))
    assert after.step == 6


def test_one_validation_set_and_several_are_an_error():
    with pytest.raises(ValueError, match="val_dataset") as error:
        make_trainer(val_dataset=make_data(8), val_datasets={"near": make_data(8)})
    assert str(error.value) == (
        "val_dataset and val_datasets are both given; val_datasets={'val': ...} takes all validation sets"
    )
    assert list(make_trainer(val_dataset=None).loaders) == ["train"]
    with pytest.raises(ValueError, match="'val'"):
        make_trainer(val_dataset=[])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, cloudpickle.dumps])
def test_a_trainer_cannot_be_copied_and_says_what_can(copied):
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"^a trainer cannot be copied or pickled: it holds compiled programs, "):
        copied({"trainer": trainer} if copied is not copy.copy else trainer)


@pytest.mark.parametrize("seed", [-1, -(2**32) + 5, 2**32, 2**32 + 5, 2**40, np.int64(2**40), np.int32(-1)])
def test_a_seed_that_would_be_that_of_another_run_is_an_error(seed):
    with pytest.raises(ValueError, match="seed") as error:
        make_trainer(seed=seed)
    assert (
        str(error.value) == f"seed must be from 0 to 4294967295, so that each seed is a run of its own, but is {seed}"
    )


def test_seeds_of_any_type_are_the_same_and_the_largest_is_no_other():
    params = [
        host(make_trainer(seed=seed).train_state.params)["Dense_0"]["kernel"]
        for seed in (5, np.int64(5), np.uint8(5), 2**32 - 1, np.uint32(2**32 - 1), 2**31 - 1)
    ]
    np.testing.assert_array_equal(params[0], params[1])
    np.testing.assert_array_equal(params[0], params[2])
    np.testing.assert_array_equal(params[3], params[4])
    assert not np.array_equal(params[0], params[3])
    assert not np.array_equal(params[3], params[5])
