"""A script written for learnax 0.1.0 runs as it stands, and computes what it always did."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.loss import LossFunction, LossPipe
from learnax.trainer import Trainer
from tests import reference
from tests.helpers import MemoryRun, host


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


@pytest.fixture(scope="module", params=[Noisy, Quiet], ids=["noisy", "quiet"])
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
