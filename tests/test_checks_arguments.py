"""Arguments of a trainer: numbers of numpy and JAX are numbers; what is none says what to write."""

import copy
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from learnax.trainer import Trainer
from tests.helpers import MLP, MemoryRun, Squared, make_data, make_trainer


def text_of(error, **arguments):
    with pytest.raises(error) as caught:
        make_trainer(**arguments)
    text = str(caught.value)
    assert len(text.splitlines()) <= 12
    return text


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, jnp.float32], ids=["f4", "f8", "array", "jax"])
def test_numbers_of_numpy_and_jax_are_rates_and_limits(kind):
    trainer = make_trainer(learning_rate=kind(0.5), max_grad=kind(2), max_seconds=kind(100))
    assert (type(trainer.learning_rate), trainer.learning_rate) == (float, 0.5)
    assert (type(trainer.max_grad), trainer.max_grad) == (float, 2.0)
    assert float(trainer.train_state.opt_state.hyperparams["learning_rate"]) == 0.5


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, jnp.int32], ids=["i8", "u1", "array", "jax"])
def test_numbers_of_numpy_and_jax_are_counts(kind):
    names = ["seed", "num_epochs", "batch_size", "num_workers", "save_every", "val_every", "sample_batch_size"]
    names += ["steps_per_execution", "learning_rate"]
    values = dict(zip(names, [3, 1, 4, 0, 7, 1, 2, 2, 1], strict=True))
    sampler = {"sample_model": lambda params, key, datum: datum[0], "sample_every": kind(2)}
    trainer = make_trainer(**{name: kind(value) for name, value in values.items()}, **sampler)
    for name in ("seed", "num_epochs", "batch_size", "num_workers", "val_every", "sample_every"):
        assert type(getattr(trainer, name)) is int
    assert trainer.learning_rate == 1.0
    assert trainer.plan.room == 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batch_size": 32.0}, TypeError, "batch_size must be a whole number, but is 32.0; write batch_size=32"),
        ({"batch_size": "32"}, TypeError, "batch_size must be a whole number, but is '32', which is text; write batch"),
        ({"batch_size": np.array([8])}, TypeError, "batch_size must be a whole number, but is array([8])"),
        ({"seed": np.bool_(True)}, TypeError, "seed must be a whole number, but is np.True_"),
        ({"num_epochs": np.int64(0)}, ValueError, "num_epochs must be at least 1, but is 0"),
        (
            {"learning_rate": np.ones(3)},
            TypeError,
            "learning_rate must be a number or an optax schedule, but is array(",
        ),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number or an optax schedule, but is True"),
        ({"max_grad": np.ones(2)}, ValueError, "max_grad must be a number above 0, but is array([1., 1.])"),
        ({"max_seconds": np.float32(0)}, ValueError, "max_seconds must be a number of seconds above 0, or None for no"),
        ({"single_batch": "false"}, TypeError, "single_batch must be True or False, but is the text 'false', which"),
        ({"registry": 3}, TypeError, "registry must be the name of a project, registry='digits' for instance, or a"),
        ({"registry": True}, TypeError, "registry must be the name of a project"),
        (
            {"run": "first"},
            TypeError,
            "run must be a wandb run (wandb.init()), a learnax.run.Run, or have id, name and",
        ),
    ],
)
def test_arguments_that_are_nearly_right(arguments, error, text):
    assert text_of(error, **arguments).startswith(text)


def test_a_seed_that_is_a_random_key():
    text = (
        "seed must be a whole number, but is a random key; write the number that it is made from, seed=0 for instance"
    )
    assert text_of(TypeError, seed=jax.random.key(0)) == text
    assert text_of(TypeError, seed=jax.random.PRNGKey(3)) == text


def test_a_run_without_an_id_beside_a_registry():
    class Bare:
        def log(self, values):
            pass

    assert make_trainer(run=Bare()) is not None
    assert "which has no id; the registry keeps its checkpoints under the id" in text_of(
        TypeError, run=Bare(), registry="r"
    )
    assert make_trainer(run=MemoryRun(), registry="r") is not None


def test_devices():
    first = jax.devices()[0]
    wanted = "devices must be a list of JAX devices, devices=jax.devices()[:1] for instance, but "
    for given, error, text in [
        ("cpu", TypeError, f"{wanted}is 'cpu'; devices=jax.devices('cpu') are those of a platform"),
        (1, TypeError, f"{wanted}is 1; devices=jax.devices()[:1] are the first 1"),
        (first, TypeError, f"{wanted}is one device, {first}; write a list, [device]"),
        (["cpu:0"], TypeError, f"{wanted}devices[0] is 'cpu:0'"),
        ([], ValueError, f"{wanted}is empty; leave it out, or write None, for all devices"),
        ([first, first], ValueError, f"devices must be different ones, but {first} is there more than once"),
    ]:
        assert text_of(error, devices=given) == text
    assert make_trainer(devices=np.array(jax.devices()[:2])).device_count == 2


# ---- rates


def stepped(step):
    if step < 5:
        return 1e-2
    return 1e-3


@pytest.mark.parametrize(
    "schedule",
    [stepped, lambda step: 0.9 ** float(step), lambda step: np.cos(step), lambda step: [1e-2, 1e-3][step]],
    ids=["if", "float", "numpy", "index"],
)
def test_a_schedule_that_asks_for_the_steps_value(schedule):
    text = text_of(TypeError, learning_rate=schedule)
    assert text.startswith(
        f"learning_rate: the schedule {schedule.__name__} is compiled into the step, so it cannot ask for the step's "
        "value in Python, by if, float(), int(), a list's index or numpy:\nTracer"
    ) or text.startswith("learning_rate: the schedule <lambda> is compiled into the step")
    assert "\n  in test_checks_arguments.py, line " in text
    assert "write jnp.where(step < 5, 1e-2, 1e-3) in place of the if" in text
    assert "optax.join_schedules" in text


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (lambda step: None, "must return a finite number of at least 0, but returns None"),
        (lambda step: float("nan"), "must return a finite number of at least 0, but returns nan"),
        (lambda step: -1, "must return a finite number of at least 0, but returns -1"),
        (lambda step: jnp.ones(3) * step, "must return one float, but returns an array float32[3]"),
        (lambda step: step, "must return one float, but returns an array int32[]"),
        (
            lambda step, epoch: 1e-3,
            "must take the number of updates made, a whole number, and return the rate, but fails:",
        ),
    ],
)
def test_a_schedule_that_gives_no_rate(schedule, text):
    assert text_of(TypeError, learning_rate=schedule).startswith(f"learning_rate: the schedule <lambda> {text}")


def test_an_optimizer_in_place_of_the_rate_and_the_other_way_round():
    assert text_of(TypeError, learning_rate=optax.adam(1e-3)) == (
        "learning_rate must be a number or an optax schedule, but is an optax transformation: that is what optimizer= "
        "takes. Write learning_rate=1e-3, optimizer=optax.adamw(1e-3), for instance"
    )
    assert text_of(TypeError, learning_rate=optax.sgd) == (
        "learning_rate must be a number or an optax schedule, but sgd makes an optimizer: write learning_rate=1e-3, "
        "optimizer=optax.sgd(1e-3), for instance"
    )
    assert text_of(TypeError, optimizer=np.float32(1e-3)).endswith(
        "; a rate is given as learning_rate=np.float32(0.001)"
    )


def test_a_rate_may_be_left_out_with_an_optimizer_and_nothing_else():
    given = {"losses": Squared(), "seed": 0, "train_dataset": make_data(8), "num_epochs": 1, "batch_size": 8}
    trainer = Trainer(MLP(), optimizer=optax.adam(1e-3), num_workers=0, **given)
    trainer.train()
    assert "train/learning_rate" not in trainer.metrics
    kept = optax.inject_hyperparams(optax.adam)(learning_rate=0.25)
    trainer = Trainer(MLP(), optimizer=kept, num_workers=0, **given)
    trainer.train()
    assert trainer.metrics["train/learning_rate"] == [0.25]
    with pytest.raises(TypeError, match=re.escape("missing 1 required positional argument: 'learning_rate'")):
        Trainer(MLP(), num_workers=0, **given)
    with pytest.raises(TypeError, match=re.escape("missing 1 required positional argument: 'num_workers'")):
        Trainer(MLP(), 1e-3, **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimiser'"):
        Trainer(MLP(), 1e-3, num_workers=0, optimiser=optax.adam(1e-3), **given)


# ---- optimizers


def test_an_optimizer_that_asks_for_more_than_there_is():
    def update(updates, state, params=None, *, curvature):
        return updates, state

    asking = optax.GradientTransformationExtraArgs(lambda params: (), update)
    text = text_of(TypeError, optimizer=asking)
    assert text.startswith(
        "optimizer: its update asks for curvature, which a step does not give: it gives gradients, state and "
        "parameters, and by name value, grad, value_fn, grad_fn and obj_fn, optax's extra arguments."
    )


@pytest.mark.parametrize(
    ("patterns", "error", "text"),
    [
        (
            {"Dense_0/.*": optax.sgd(0.1)},
            ValueError,
            "the parameter Dense_1/bias matches none of 'Dense_0/.*'; patterns",
        ),
        (
            {"Dense_0/.*": optax.sgd(0.1), ".*kernel": None, ".*": None},
            ValueError,
            "the parameter Dense_0/kernel matches 'Dense_0/.*' and '.*kernel'; make the patterns apart",
        ),
        (
            {"head": optax.sgd(0.1), ".*": None},
            ValueError,
            "the pattern 'head' matches no parameter; there are Dense_0",
        ),
        ({".*": None}, ValueError, "all parameters are frozen"),
        ({"(": None}, ValueError, "the pattern '(' is no regular expression: missing ), unterminated subpattern"),
        ({".*": 0.1}, TypeError, "what '.*' is trained by must be an optax transformation, or None for frozen, but is"),
        ({1: None}, TypeError, "a pattern must be text, 'head/.*' for instance, but is 1"),
    ],
)
def test_patterns_that_overlap_or_miss(patterns, error, text):
    assert text in text_of(error, optimizer=patterns)


def test_an_optimizer_that_fails_on_these_parameters():
    labels = {"Dense_0": "slow", "Dense_1": "fast"}
    text = text_of(ValueError, optimizer=optax.multi_transform({"slow": optax.sgd(0.1)}, labels))
    assert text.startswith("optimizer: its init(params) fails on the model's parameters:\n  Dense_0/bias: float32[3]\n")
    assert "\nValueError: Some parameters have no corresponding transformation.\n" in text
    text = text_of(ValueError, optimizer=optax.masked(optax.sgd(0.1), {"Dense_7": True}))
    assert "what it is made of (masks, labels of optax.multi_transform) must name these parameters" in text
    wrong = optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: (grads["Dense_0"], state))
    text = text_of(ValueError, optimizer=wrong)
    assert text.startswith("optimizer: its update must return (updates, state) with an update for each parameter, but")


def test_optimizers_that_need_no_more_still_train():
    for optimizer in (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), optax.MultiSteps(optax.sgd(0.1), 2)):
        assert make_trainer(optimizer=optimizer) is not None


# ---- around a trainer


def test_where_jax_compiles_nothing_a_trainer_says_so():
    text = r"jax.disable_jit\(\) is on \(or JAX_DISABLE_JIT\), but a trainer's step is compiled before it runs"
    with jax.disable_jit(), pytest.raises(RuntimeError, match=text):
        make_trainer()
    trainer = make_trainer()
    with jax.disable_jit(), pytest.raises(RuntimeError, match=text):
        trainer.train()
    trainer.train()
    assert len(trainer.metrics["train/loss"]) == 10


def test_a_trainer_is_built_and_runs_where_implicit_transfers_are_disallowed():
    sampler = {"sample_model": lambda params, key, datum: datum[0], "sample_every": 4}
    with jax.transfer_guard("disallow"):
        trainer = make_trainer(
            **sampler,
            learning_rate=np.float32(0.125),
            val_datasets=[make_data(9)],
            plot_pipe=lambda *given: None,
            plot_every=3,
            registry="guarded",
            save_every=4,
        )
        trainer.train()
    assert len(trainer.metrics["val/loss"]) == 2
    assert trainer.metrics["train/learning_rate"] == [0.125] * 10


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_trainer_is_neither_copied_nor_pickled(take):
    with pytest.raises(TypeError, match="a trainer cannot be copied or pickled: it holds compiled programs"):
        take(make_trainer())


def test_a_model_with_the_mapped_axis_may_have_an_optimizer_of_its_own():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x, y=None):
            return nn.Dense(3)(x - jax.lax.pmean(x, "devices"))

    assert make_trainer(model=Mapped(), optimizer=optax.adamw(1e-3)).engine.mapped
