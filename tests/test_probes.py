"""Probes see the step as it is made, and change no bit of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from learnax.hooks import At, Every, HookError, Probe
from learnax.loss import LossPipe
from tests.helpers import Noisy, Poisonable, Streamed, assert_trees_close, assert_trees_equal, make_data, make_trainer

TIMES = ("train/update_time", "train_epoch/update_time")


def norms(view):
    return {
        "grads": optax.tree_utils.tree_norm(view.grads),
        "updates": optax.tree_utils.tree_norm(view.updates),
        "mean": jnp.mean(view.batch[0]),
        "outputs": jnp.mean(jnp.square(view.outputs - view.batch[1])),
        "step": view.step,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_execution": 1, "model": Noisy()},
        pytest.param({"devices": 4, "model": Noisy()}, marks=pytest.mark.soak),
        {"devices": 4, "shard_state": True},
        {
            "accumulate_steps": 2,
            "train_dataset": make_data(83),
            "optimizer": optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau()),  # which asks for the loss
        },
    ],
    ids=["fused", "single", "four", "divided", "accumulated"],
)
def test_a_probe_changes_no_bit_and_sees_the_step(options):
    count = options.get("devices", 1)
    options = options | {"devices": jax.devices()[:count]}
    plain = make_trainer(**options)
    plain.train()
    before, after, seen, data = {}, {}, {}, {}
    trees = lambda view: {f"{kind}/{path}": leaf for kind in ("params", "updates", "new_params") for path, leaf in  # noqa: E731
                          zip("abcd", jax.tree.leaves(getattr(view, kind)), strict=True)}  # fmt: skip

    def keep(moment):
        (before if moment.step % 4 == 3 else after)[moment.step] = jax.tree.leaves(moment.params)
        data[moment.step] = np.mean([datum[0] for datum in moment.batch])

    hooks = [
        Probe(4, norms),
        Probe(4, trees, "trees", then=lambda moment, values: seen.update({moment.step: values})),
        At([3, 4, 7, 8], keep),
    ]
    trainer = make_trainer(hooks=hooks, **options)
    trainer.train()
    assert_trees_equal(trainer.train_state, plain.train_state)
    own = {name: values for name, values in trainer.metrics.items() if "norms/" not in name and name not in TIMES}
    np.testing.assert_equal(own, {name: values for name, values in plain.metrics.items() if name not in TIMES})
    metrics = trainer.metrics
    assert metrics["train/norms/step"] == [3, 7]
    rows = [3, 7]
    np.testing.assert_allclose(metrics["train/norms/grads"], np.take(metrics["train/gradient norm"], rows), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/norms/mean"], [data[4], data[8]], rtol=1e-4, atol=1e-6)
    if "accumulate_steps" not in options:
        np.testing.assert_allclose(metrics["train/norms/outputs"], np.take(metrics["train/loss"], rows), rtol=1e-4)
    for step in (4, 8):
        assert_trees_equal([seen[step][f"params/{path}"] for path in "abcd"], before[step - 1])
        assert_trees_close([seen[step][f"new_params/{path}"] for path in "abcd"], after[step], rtol=1e-4, atol=1e-5)
        sums = [seen[step][f"params/{path}"] + seen[step][f"updates/{path}"] for path in "abcd"]
        assert_trees_close(sums, after[step], rtol=1e-4, atol=1e-5)


def test_steps_between_pay_nothing():
    options = {"train_dataset": make_data(8 * 100), "num_epochs": 1, "steps_per_execution": 16}
    trainer, plain = make_trainer(hooks=[Probe(50, norms)], **options), make_trainer(**options)
    trainer.train()
    plain.train()
    calls = [{p.kind: p.calls for p in each.engine.programs.values()} for each in (trainer, plain)]
    assert calls[1] == {"train": 7}
    assert calls[0]["probe norms"] == 2
    # In blocks of 16: three of 16; 1, then 15, the first of which is looked into; two of 16; 3, the other one.
    assert calls[0]["train"] == 9


def test_a_probe_of_every_step_and_one_of_a_resumed_run():
    def make(**options):
        data = Streamed(make_data(43))
        hooks = [Probe(1, norms), Every(2, lambda m: None)]
        return make_trainer(hooks=hooks, train_dataset=data, registry="r", **options)

    whole = make()
    whole.train()
    assert len(whole.metrics["train/norms/grads"]) == 10
    stopped = make_trainer(hooks=[Probe(1, norms), At([7], lambda m: m.stop("now"))], registry="r")
    stopped.train()
    again = make(load_checkpoint=True)
    again.train()
    assert again.metrics["train/norms/grads"] == whole.metrics["train/norms/grads"]
    assert_trees_equal(again.train_state, whole.train_state)


def test_of_an_update_that_is_dropped_nothing_is_kept():
    data = make_data(43)
    data[17][1][0] = 7  # in the third batch
    probe = Probe(1, lambda view: {"grads": optax.tree_utils.tree_norm(view.grads)}, "p")
    trainer = make_trainer(train_dataset=data, losses=LossPipe([Poisonable()]), hooks=[probe])
    trainer.train()
    # That an update was dropped is known only after the look. Where a hook waits for what is seen, the step that is due
    # is looked into once more; else all training steps count, and the eighth is dropped.
    function = lambda view: {"step": view.step}  # noqa: E731
    for then, steps, calls in [(lambda moment, values: None, [3, 7], 4), (None, [2], 2)]:
        rare = Probe(4, function, "rare", then=then)
        late = make_trainer(train_dataset=data, losses=LossPipe([Poisonable()]), hooks=[rare])
        late.train()
        assert late.metrics["train/rare/step"] == steps
        (program,) = [program for program in late.engine.programs.values() if program.kind == "probe rare"]
        assert program.calls == calls
        assert_trees_equal(late.train_state, trainer.train_state)
    assert len(trainer.metrics["train/p/grads"]) == trainer.train_state.step == 8
    assert np.isfinite(trainer.metrics["train/p/grads"]).all()


@pytest.mark.parametrize(
    ("function", "then", "wanted"),
    [
        (
            lambda view: view.step,
            None,
            r"^probe 'p' must return a dict of scalars or arrays, but returned an array int",
        ),
        (lambda view: {"a": "b"}, None, r"^probe 'p' returned for 'a' 'b', but values are real numbers, or arrays of"),
        (lambda view: {1: view.step}, None, "^probe 'p' returned the name 1, but names are text: write '1'"),
        (
            lambda view: {"a": jnp.zeros(70_000)},
            print,
            r"^probe 'p' returned for 'a' an array float32\[70000\], which has 70000 elements; at most 65536 leave the "
            "device: return its norm, or a histogram",
        ),
        (
            lambda view: {"a": jnp.zeros(3)},
            None,
            r"^probe 'p' returned for 'a' an array float32\[3\], which is no scalar to become a metric, and nothing "
            r"takes it: give then=function\(moment, values\), or reduce it",
        ),
        (
            lambda view: {"a": float(jnp.sum(view.outputs))},
            None,
            r"^probe 'p' failed while it was traced: ConcretizationTypeError: [\s\S]*a probe is compiled, so no if,",
        ),
        (
            lambda view: jax.debug.print("{}", view.step) or {},
            None,
            r"^probe 'p' works on the host \(debug_.*\), for which the device would wait at each look; return what",
        ),
        (
            lambda view: {"a": jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(1))},
            None,
            r"^probe 'p' works on the host \(pure_callback\)",
        ),
        (
            lambda view: {"a": view.gradients},
            None,
            "^probe 'p' failed while it was traced: AttributeError: ",
        ),
    ],
)
def test_what_no_probe_may_do_is_an_error_when_the_trainer_is_built(function, then, wanted):
    with pytest.raises(HookError, match=wanted):
        make_trainer(hooks=[Probe(3, function, "p", then=then)])


def test_what_makes_no_probe_is_an_error():
    with pytest.raises(ValueError, match=r"^Probe: every must be a whole number above 0, but is 0$"):
        Probe(0, norms)
    with pytest.raises(TypeError, match=r"^Probe: then must be callable, but is 3$"):
        Probe(1, norms, then=3)
