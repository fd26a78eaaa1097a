"""Evaluating and predicting beside a run: a validation's numbers, the model's outputs in order, and a run untouched."""

import copy
import multiprocessing
import re
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bench import predict as bench_predict
from learnax.checkpoint import Checkpointer
from learnax.data import Batches, Stream
from learnax.loss import LossPipe
from learnax.metrics import Max, Mean
from learnax.models import Functions, Linen
from tests import peers
from tests.helpers import (
    MLP,
    ROOT,
    Convolution,
    MemoryRun,
    Noisy,
    Squared,
    StopAt,
    Streamed,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)
from tests.test_models import KINDS, by_datum, called

HELD_OUT = make_data(19, 1)
"""Two whole batches and a tail."""
KEPT = {"registry": "tests", "save_every": 3, "checkpoint_every": 5, "keep_best_checkpoint": True}


def validated(trainer, epoch=-1, name="val"):
    found = {metric: values[epoch] for metric, values in trainer.metrics.items() if metric.startswith(f"{name}/")}
    return {metric.removeprefix(f"{name}/"): value for metric, value in found.items()}


def by_hand(params, data, model=None):
    return np.stack([np.asarray((model or MLP()).apply({"params": params}, *datum)) for datum in data])


def calls(trainer, kind):
    return [program.calls for program in trainer.engine.programs.values() if program.kind == kind]


# ---- the numbers


def test_evaluation_is_validation_and_outputs_are_the_models_in_order(devices):
    trainer = make_trainer(devices=devices, val_datasets=[HELD_OUT])
    trainer.train()
    assert trainer.evaluate(HELD_OUT) == trainer.evaluate(Streamed(HELD_OUT)) == validated(trainer)
    for size in (1, 8, 19):
        expected = by_hand(trainer.train_state.params, HELD_OUT[:size])
        outputs = list(trainer.predict(HELD_OUT[:size]))
        assert len(outputs) == size
        np.testing.assert_allclose(np.stack(outputs), expected, rtol=1e-5, atol=1e-6)
        images = np.stack([x for x, _ in HELD_OUT[:size]])
        for dataset in (HELD_OUT[:size], tuple(HELD_OUT[:size]), Streamed(HELD_OUT[:size]), images):
            stacked = trainer.predict(dataset, stacked=True)
            assert stacked.shape == (size, 3)
            assert_trees_equal(stacked, np.stack(outputs))
    outputs[0][...] = 0  # they are the caller's
    stacked[...] = 0
    np.testing.assert_allclose(trainer.predict(HELD_OUT, stacked=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", [1, 2, 16])
def test_batches_are_fused_as_in_validation_and_programs_are_compiled_once(room):
    trainer = make_trainer(val_datasets=[HELD_OUT], steps_per_execution=room)
    trainer.train()
    evaluations = calls(trainer, "evaluate")
    dispatches = -(-3 // trainer.plan.room)
    assert evaluations == [2 * dispatches]
    for number in (1, 2):
        assert trainer.evaluate(HELD_OUT) == validated(trainer)
        trainer.predict(HELD_OUT, stacked=True)
        assert calls(trainer, "evaluate") == [(2 + number) * dispatches]
        assert calls(trainer, "predict") == [number * dispatches]
    assert len(list(trainer.predict(HELD_OUT))) == 19


def test_large_outputs_are_fused_less(monkeypatch):
    trainer = make_trainer()
    expected = trainer.predict(HELD_OUT, stacked=True)
    assert calls(trainer, "predict") == [1]
    monkeypatch.setattr("learnax.inference.BLOCK_BYTES", 2 * 8 * 3 * 4)  # two batches of 8 outputs of three floats
    assert_trees_equal(trainer.predict(HELD_OUT, stacked=True), expected)
    assert calls(trainer, "predict") == [1, 2]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linen", 4),
        ("nnx", 2),
        *(pytest.param(*both, marks=pytest.mark.soak) for both in [("equinox", 1), ("functions", 4)]),
    ],
)
def test_models_of_any_kind_are_in_their_mode_of_validation(kind, count):
    """With batch statistics and dropout."""
    options = {"losses": by_datum, "val_datasets": [HELD_OUT], "num_epochs": 1, "devices": jax.devices()[:count]}
    trainer = make_trainer(model=KINDS[kind](0.5), **options)
    trainer.train()
    assert trainer.evaluate(HELD_OUT) == validated(trainer)
    x = np.stack([x for x, _ in HELD_OUT])
    model, state = trainer.parts.model, host(trainer.train_state)
    expected, _ = called(model, state.params, state.model_state, x, False)
    np.testing.assert_allclose(trainer.predict(HELD_OUT, stacked=True), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(list(trainer.predict([x for x, _ in HELD_OUT])), expected, rtol=1e-4, atol=1e-5)


def test_losses_of_a_whole_share_and_metrics_with_weights():
    def whole(output, batch):
        error = (output - batch[1]) ** 2
        return output, error.mean(), {"far": Mean(error.sum(), 3.0 * len(error)), "most": Max(error.max())}

    model = Linen(MLP(), batched=True)
    trainer = make_trainer(model=model, losses=whole, val_datasets=[HELD_OUT], num_epochs=1, devices=jax.devices()[:2])
    trainer.train()
    assert trainer.evaluate(HELD_OUT) == validated(trainer)
    expected = by_hand(trainer.train_state.params, HELD_OUT)
    np.testing.assert_allclose(trainer.predict(HELD_OUT, stacked=True), expected, rtol=1e-5, atol=1e-6)


def test_a_convolution_is_predicted_too():
    trainer = make_trainer(model=Convolution(), val_datasets=[HELD_OUT], num_epochs=1)
    trainer.train()
    assert trainer.evaluate(HELD_OUT) == validated(trainer)
    expected = by_hand(trainer.train_state.params, HELD_OUT, Convolution())
    np.testing.assert_allclose(trainer.predict(HELD_OUT, stacked=True), expected, rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        scores = nn.Dense(3)(x)
        return {
            "scores": scores,
            "best": (scores.argmax(), None),
            "sum": scores.sum(),
            "half": scores.astype("float16"),
        }


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        nn.Dense(3)(x)


def test_outputs_are_trees_of_any_shape():
    losses = lambda output, datum: (output, jnp.mean((output["scores"] - datum[1]) ** 2), {})  # noqa: E731
    trainer = make_trainer(model=Nested(), losses=losses)
    stacked = trainer.predict(HELD_OUT, stacked=True)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), stacked) == {
        "scores": ((19, 3), "float32"),
        "best": (((19,), "int32"), None),
        "sum": ((19,), "float32"),
        "half": ((19, 3), "float16"),
    }
    outputs = list(trainer.predict(HELD_OUT))
    assert_trees_equal(jax.tree.map(lambda *leaves: np.stack(leaves), *outputs), stacked)
    assert outputs[3]["best"] == (stacked["scores"][3].argmax(), None)
    np.testing.assert_allclose(stacked["sum"], stacked["scores"].sum(1), rtol=1e-5, atol=1e-6)
    nothing = make_trainer(model=Nothing(), losses=lambda output, datum: (output, datum[1].mean(), {}))
    assert list(nothing.predict(HELD_OUT)) == [None] * 19


def test_a_model_of_many_sizes_predicts_each_and_stacks_what_is_of_one():
    model = Functions(lambda key: {"scale": jnp.ones(())}, lambda params, x: x * params["scale"])
    data = [np.full(3 if index < 10 else 5, index, np.float32) for index in range(19)]
    trainer = make_trainer(model=model, losses=lambda output, datum: (output, output.mean(), {}), train_dataset=data)
    # Buckets, as batches have one shape: eight data, two, six that repeat, three.
    data = data[:8] + data[10:]
    for output, datum in zip(trainer.predict(data), data, strict=True):
        assert_trees_equal(output, datum)
    with pytest.raises(ValueError, match=r"is of shape \(3,\) at first, and \(5,\) from datum 8 on"):
        trainer.predict(data, stacked=True)
    np.testing.assert_allclose(trainer.evaluate(data)["loss"], np.mean([datum[0] for datum in data]), rtol=1e-6)


@pytest.mark.processes
def test_workers_read_the_same_data_and_end_with_the_iterator():
    trainer, alone = make_trainer(num_workers=2), make_trainer()
    assert trainer.evaluate(HELD_OUT) == alone.evaluate(HELD_OUT)
    outputs = trainer.predict(Streamed(HELD_OUT))
    found = [next(outputs) for _ in HELD_OUT]
    assert multiprocessing.active_children()
    outputs.close()
    assert not multiprocessing.active_children()
    assert_trees_equal(np.stack(found), alone.predict(HELD_OUT, stacked=True))


# ---- the run


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", [MLP, Noisy])
def test_a_run_is_the_same_with_and_without_between_its_epochs_and_after_a_stop(model, registry_path):
    def make(name, **options):
        return make_trainer(
            model=model(), val_datasets=[HELD_OUT], run=MemoryRun(), **KEPT | {"registry": name}, **options
        )

    def look(trainer):
        trainer.checkpointer.wait()
        before = files_of(registry_path)
        state, place = host(trainer.train_state), copy.deepcopy((trainer.position, trainer.metrics, trainer.log.step))
        key = np.array(jax.random.key_data(trainer.rng_seq))
        for params in (None, "latest", jax.device_get(trainer.train_state.params)):
            assert trainer.evaluate(HELD_OUT, params=params).keys() == {"loss", "rmse"}
            assert len(list(trainer.predict(HELD_OUT[:5], params=params))) == 5
        assert_trees_equal(trainer.train_state, state)
        assert (trainer.position, trainer.metrics, trainer.log.step) == place
        assert_trees_equal(np.array(jax.random.key_data(trainer.rng_seq)), key)
        assert files_of(registry_path) == before

    straight, looked = make("straight"), make("looked")
    straight.train()
    looked.evaluate(HELD_OUT)
    looked.epoch(0)
    look(looked)
    looked.hooks.saves.append(StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        looked.train()
    look(looked)
    looked.train()
    look(looked)
    assert_trees_equal(looked.train_state, straight.train_state)
    assert_trees_equal(jax.random.key_data(looked.rng_seq), jax.random.key_data(straight.rng_seq))
    assert looked.metrics.keys() == straight.metrics.keys()
    for name, values in straight.metrics.items():
        assert "update_time" in name or looked.metrics[name] == values, name
    saved = [Checkpointer.at(trainer.checkpointer.path) for trainer in (straight, looked)]
    assert [*saved[0].list_available_checkpoints()] == [*saved[1].list_available_checkpoints()]
    assert_trees_equal(*(one.load_latest()["state"] for one in saved))


def test_a_model_that_draws_draws_what_a_validation_would_now():
    straight, stopped = (make_trainer(model=Noisy(), val_datasets=[HELD_OUT], num_epochs=1) for _ in range(2))
    straight.train()
    stopped.hooks.saves.append(StopAt(5))  # the last step, before the validation
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.evaluate(HELD_OUT) == validated(straight) == stopped.evaluate(HELD_OUT)
    outputs = stopped.predict(HELD_OUT, stacked=True)
    assert_trees_equal(np.stack(list(stopped.predict(HELD_OUT))), outputs)
    errors = np.mean((outputs - np.stack([y for _, y in HELD_OUT])) ** 2)
    np.testing.assert_allclose(stopped.evaluate(HELD_OUT)["loss"], errors, rtol=1e-5)  # by the same keys


def during(trainer, act):
    """What is raised by something that is done after the first step."""
    raised = []

    def save_model(params):
        try:
            act()
        except Exception as error:
            raised.append(error)

    trainer.hooks.saves.append(type("Act", (StopAt,), {"__call__": lambda self, moment: save_model(None)})(1))
    trainer.train()
    return raised


def threaded(act):
    raised = []

    def call():
        try:
            act()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("around", [lambda act: act(), threaded], ids=["in a hook", "in a thread"])
def test_during_training_it_is_an_error_which_the_training_does_not_notice(around):
    straight, trainer = make_trainer(), make_trainer()
    straight.train()
    acts = {
        "evaluate": lambda: trainer.evaluate(HELD_OUT),
        "predict": lambda: trainer.predict(HELD_OUT),
    }
    for name, act in acts.items():
        trainer = make_trainer()
        (error,) = during(trainer, lambda act=act: around(act))
        assert type(error) is RuntimeError
        assert str(error).startswith(f"{name}() was called while train() of this trainer is under way. What is to be ")
        assert "goes into val_datasets" in str(error)
        assert_trees_equal(trainer.train_state, straight.train_state)


def test_save_model_gets_the_error_and_a_run_that_does_not_catch_it_ends_by_it():
    trainer = make_trainer(save_model=lambda params: trainer.evaluate(HELD_OUT), save_every=2)
    with pytest.raises(RuntimeError, match=r"^evaluate\(\) was called while train\(\)"):
        trainer.train()
    assert trainer.evaluate(HELD_OUT).keys() == {"loss", "rmse"}


def test_an_iterator_ends_with_an_error_where_training_has_gone_on():
    trainer = make_trainer(steps_per_execution=1)
    outputs = trainer.predict(make_data(64))
    assert next(outputs).shape == (3,)
    (error,) = during(trainer, lambda: list(outputs))
    assert str(error).startswith("predict() was called while train() of this trainer is under way")
    outputs = trainer.predict(make_data(64))
    next(outputs)
    assert trainer.evaluate(HELD_OUT)  # beside it
    trainer.train_state = trainer.init_train_state()
    with pytest.raises(RuntimeError, match=r"predict\(\): the run has another state by now.*stacked=True, or list"):
        list(outputs)


def test_training_does_not_begin_while_something_is_evaluated():
    class Training(Streamed):
        def __getitem__(self, index):
            if index == 9:
                trainer.train()
            return super().__getitem__(index)

    trainer = make_trainer()
    with pytest.raises(RuntimeError, match=r"train\(\) was called while evaluate\(\) of this trainer is under way"):
        trainer.evaluate(Training(HELD_OUT))
    trainer.train()
    assert trainer.log.step == 10


# ---- parameters


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.soak),
        {"ema": 0.5},
        pytest.param({"ema": 0.5, "ema_eval": False}, marks=pytest.mark.soak),
        {"optimizer": optax.contrib.schedule_free_sgd(0.1)},
        {"devices": jax.devices()[:4], "shard_state": True, "model": MLP(16384)},
    ],
    ids=["plain", "ema", "ema not evaluated", "schedule-free", "divided"],
)
def test_parameters_of_checkpoints_are_evaluated_as_they_were_then(options):
    trainer = make_trainer(val_datasets=[HELD_OUT], run=MemoryRun(), num_epochs=3, **KEPT, **options)
    trainer.train()
    for epoch, params in enumerate((5, 10, "latest")):
        assert trainer.evaluate(HELD_OUT, params=params) == validated(trainer, epoch)
    assert trainer.evaluate(HELD_OUT, params=np.int64(5)) == validated(trainer, 0)
    best = int(np.argmin(trainer.metrics["val/loss"]))
    assert trainer.evaluate(HELD_OUT, params="best") == validated(trainer, best)
    early, late = (trainer.predict(HELD_OUT, params=params, stacked=True) for params in (5, None))
    assert np.abs(early - late).max() > 1e-4
    loss = np.mean((early - np.stack([y for _, y in HELD_OUT])) ** 2)
    np.testing.assert_allclose(loss, validated(trainer, 0)["loss"], rtol=1e-4)


def test_checkpoints_bring_what_their_model_carried():
    trainer = make_trainer(
        model=KINDS["linen"](), losses=by_datum, val_datasets=[HELD_OUT], run=MemoryRun(), num_epochs=2, **KEPT
    )
    trainer.train()
    assert trainer.evaluate(HELD_OUT, params=5) == validated(trainer, 0)


def test_a_tree_is_taken_in_any_containers(registry_path):
    run = MemoryRun()
    trainer = make_trainer(val_datasets=[HELD_OUT], run=run, **KEPT)
    trainer.train()
    params = host(trainer.train_state.params)
    loaded = Checkpointer.at(trainer.checkpointer.path).load_latest()["state"].params
    fresh = trainer.init_train_state().params
    for tree in (params, trainer.train_state.params, loaded, nn.FrozenDict(params)):
        assert trainer.evaluate(HELD_OUT, params=tree) == validated(trainer)
    other = trainer.predict(HELD_OUT, params=fresh, stacked=True)
    np.testing.assert_allclose(other, by_hand(fresh, HELD_OUT), rtol=1e-5, atol=1e-6)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)  # which devices hold as float32
    assert trainer.evaluate(HELD_OUT, params=wide) == validated(trainer)


# ---- what is wrong


class Images(nn.Module):
    @nn.compact
    def __call__(self, datum):
        return nn.Dense(2)(datum["image"])


def test_data_that_do_not_fit_are_named():
    trainer = make_trainer()
    x, y = HELD_OUT[0]
    like = "give data as those of 'train', each\n  datum[0]: float32[8]\n  datum[1]: float32[3]"
    unlike = {
        "[0]: int32[8] here, float32[8] in 'train'": [x.astype(np.int32), y],
        "[0]: float32[1, 8] here, float32[8] in 'train'": [x[None], y],
        "[2]: float32[3] here, nothing in 'train'": [x, y, y],
        "[0]: no array here, float32[8] in 'train'": ["text", y],
        "['x']: ": {"x": x},
    }
    for text, datum in unlike.items():
        for call in (trainer.evaluate, trainer.predict):
            start = f"dataset {call.__name__!r}: its data are not like those of 'train', which differ in\n"
            with pytest.raises(ValueError, match=re.escape(start)) as caught:
                call([datum])
            assert text in str(caught.value)
            assert like in str(caught.value)
    with pytest.raises(ValueError, match=re.escape("[1]: nothing here, float32[3] in 'train'")):
        trainer.evaluate([x])
    with pytest.raises(ValueError, match=re.escape("[1]: float32[1] here, float32[3] in 'train'")):
        trainer.evaluate([[x, y[:1]]])  # which a loss would broadcast
    for call in (trainer.evaluate, trainer.predict):
        text = f"the model MLP cannot take a datum of {call.__name__!r}, of this structure (2 arguments):\n"
        with pytest.raises(ValueError, match=re.escape(f"{text}  [0]: float32[9]\n")) as caught:
            call([[np.zeros(9, np.float32), y]])
        assert "while it takes a datum of 'train':\n  [0]: float32[8]" in str(caught.value)
    with pytest.raises(ValueError, match=r"losses.loss_list\[0\] \(Squared\) failed on a datum of 'evaluate'"):
        trainer.evaluate([[x, np.zeros(4, np.float32)]])


def test_what_the_model_does_without_may_be_left_out_of_a_datum():
    plain = make_trainer()
    few = [x for x, _ in HELD_OUT[:3]]  # which are no (X, y), though they look like it
    assert_trees_equal(plain.predict(few, stacked=True), plain.predict(HELD_OUT[:3], stacked=True))
    data = [{"image": x, "label": y} for x, y in HELD_OUT]
    losses = lambda output, datum: (output, jnp.mean(output) + datum[0]["label"].mean(), {})  # noqa: E731
    trainer = make_trainer(model=Images(), losses=losses, train_dataset=data)
    expected = trainer.predict(data, stacked=True)
    assert_trees_equal(trainer.predict([{"image": x} for x, _ in HELD_OUT], stacked=True), expected)
    with pytest.raises(ValueError, match=r"the model Images cannot take a datum of 'predict'(?s:.*)KeyError: 'image'"):
        trainer.predict([{"label": y} for _, y in HELD_OUT])


def test_data_that_change_on_the_way_are_named_by_their_place():
    trainer = make_trainer(steps_per_execution=2)
    data = [*HELD_OUT[:16], *([x.astype(np.int32), y] for x, y in HELD_OUT)]
    text = ", from datum 16 on': its data are not like those of 'train', which differ in\n  [0]: int32[8]"
    outputs = trainer.predict(data)
    assert len([next(outputs) for _ in range(16)]) == 16
    with pytest.raises(ValueError, match=re.escape(f"dataset 'predict{text}")):
        next(outputs)
    with pytest.raises(ValueError, match=re.escape(f"dataset 'evaluate{text}")):
        trainer.evaluate(data)


def test_what_is_no_dataset_is_an_error_before_anything_is_read():
    trainer = make_trainer()
    for call in (trainer.evaluate, trainer.predict):
        name = call.__name__
        with pytest.raises(ValueError, match=f"dataset '{name}' is empty; expected at least 1 data"):
            call([])
        with pytest.raises(TypeError, match=f"dataset '{name}' must have __len__ .* is generator; .* write list"):
            call(datum for datum in HELD_OUT)
        with pytest.raises(TypeError, match=f"dataset '{name}' must be a list of data, but is a dict of 'x'"):
            call({"x": np.zeros((19, 8))})
        with pytest.raises(ValueError, match=f"dataset '{name}' has 2 data: .*(?s:.*)learnax.data.arrays"):
            call((np.zeros((19, 8)), np.zeros((19, 3))))
        with pytest.raises(RuntimeError, match=f"dataset '{name}' raised at index 0: KeyError"):
            call(Streamed({1: 2}))


def test_parameters_that_are_not_the_models_are_named():
    trainer = make_trainer()
    params, other = host(trainer.train_state.params), make_trainer(model=MLP(17)).train_state.params
    narrow = {**params, "Dense_0": jax.tree.map(lambda leaf: leaf.astype(np.float16), params["Dense_0"])}
    wrong = {
        "Dense_0/bias: float16[3] given, float32[3] in the model": narrow,
        "Dense_1/bias: in the model only, float32[16]": {"Dense_0": params["Dense_0"]},
        "more/bias: given only, float32[3]": {**params, "more": {"bias": np.zeros(3, np.float32)}},
        "Dense_1/kernel: float32[8, 17] given, float32[8, 16] in the model": other,
        "they are inside of what was given: give what it has under 'params'": {"params": params},
        "give what it has under 'params'": trainer.train_state,
    }
    for text, tree in wrong.items():
        with pytest.raises(ValueError, match="params are not those of this model; leaves that differ") as caught:
            trainer.evaluate(HELD_OUT, params=tree)
        assert text in str(caught.value), text
    trainer = make_trainer(model=MLP(16384))  # whose large arrays are not copied when they are looked at
    kept = trainer.train_state.params
    trainer.train()
    with pytest.raises(ValueError, match=r"Dense_1/kernel is an array that a training step has taken over since; keep"):
        trainer.evaluate(HELD_OUT, params=kept)


def test_checkpoints_that_are_not_there_are_named():
    trainer = make_trainer(run=MemoryRun(), registry="tests")
    for params in ("best", "latest", 7):
        with pytest.raises(FileNotFoundError, match=r"params=.* asks for a checkpoint, but .*: registry= says where"):
            make_trainer().evaluate(HELD_OUT, params=params)
    with pytest.raises(
        FileNotFoundError, match=r"params='latest': no checkpoint in .* yet; the first one is saved after"
    ):
        trainer.predict(HELD_OUT, params="latest")
    trainer.train()
    with pytest.raises(FileNotFoundError, match=r"params=7: no checkpoint '7' in .*; there are: latest, 10$"):
        trainer.predict(HELD_OUT, params=7)
    with pytest.raises(FileNotFoundError, match=r"there are: latest, 10; keep_best_checkpoint=True keeps the best$"):
        trainer.evaluate(HELD_OUT, params="best")
    for params, kind, text in [
        ("bset", ValueError, "'latest', a step or a tree of parameters, but is 'bset'"),
        (-1, ValueError, "but is -1; 'latest' is the newest checkpoint"),
        (True, TypeError, "but is True"),
        (0.5, TypeError, "but is 0.5"),
    ]:
        with pytest.raises(kind, match=re.escape(text)):
            trainer.evaluate(HELD_OUT, params=params)


# ---- several processes, and what is written of it


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    env = {"PEERS": str(folder / "runs"), "TQDM_DISABLE": None}
    return peers.together("inferred", folder / "out", 2, 2, env=env, codes=(1,))


@pytest.mark.processes
def test_processes_evaluate_together_and_each_has_all_outputs(two):
    for peer in two:
        for kind in ("plain", "divided"):
            found = peer.results[kind]
            assert found["evaluated"] == found["validated"] == found["of the latest"]
            assert found["outputs"].shape == (peers.TAIL, 3)
            assert_trees_equal(found["listed"], found["outputs"])
            assert_trees_close(
                found["outputs"], by_hand(found["params"], make_data(peers.TAIL, 1), MLP(found["width"]))
            )
            assert_trees_equal(found["outputs"], two[0].results[kind]["outputs"])
    for call in ("evaluate", "predict"):
        assert re.search(rf"^{call}: \d+/\d+ \(100%\)$", two[0].err, re.MULTILINE)
    assert "100%" not in two[1].err


@pytest.mark.processes
def test_processes_that_give_different_data_are_told_so(two):
    for peer in two:
        assert peer.results["differ"] == (
            "the processes of this run differ in what evaluate() is given:\n"
            f"  len(dataset): {peers.TAIL} on process 0, {peers.TAIL - 1} on process 1\nGive all of them the same"
        )


@pytest.mark.processes
def test_a_process_whose_data_fail_ends_the_others(two):
    told = "DatasetError: dataset 'predict' raised at index 12: LookupError: no data on this machine"
    assert two[1].results["failed"] == tuple(told.split(": ", 1))
    kind, text = two[0].results["failed"]
    assert kind == "PeerError"
    assert f"process 1 of 2 failed: {told}" in text


def test_the_contenders_of_the_bench_give_the_same_outputs():
    taken = bench_predict.measure(1100, 2)  # which compares them
    names = ["learnax, stacked", "learnax, one by one", "by hand"]
    assert [(name, len(seconds)) for name, seconds in taken.items()] == [(name, 2) for name in names]


def test_the_page_shows_it():
    text = Path(ROOT / "docs" / "evaluate.md").read_text()
    snippet = text[text.index("```python\nscores") + 10 :].partition("```")[0]
    trainer = make_trainer(losses=LossPipe([Squared()]), run=MemoryRun(), num_epochs=1, val_datasets=[HELD_OUT], **KEPT)
    trainer.train()
    names = {"trainer": trainer, "test_data": HELD_OUT, "images": [x for x, _ in HELD_OUT]}
    exec(snippet, names)
    assert names["scores"] == validated(trainer)
    assert names["at_best"] == names["scores"]  # of one epoch
    assert names["outputs"].shape == (19, 3)


def test_streams_and_batches_are_evaluated_and_predicted_on_as_lists_are():
    data = make_data(21)
    trainer = make_trainer(train_dataset=make_data(16), num_epochs=1)
    trainer.train()
    batches = [[np.stack([datum[place] for datum in data[i : i + 8]]) for place in (0, 1)] for i in range(0, 21, 8)]
    expected = trainer.predict(data, stacked=True)
    for given in (Stream(lambda: iter(data)), Batches(lambda: iter(batches))):
        assert trainer.evaluate(given) == trainer.evaluate(data)
        np.testing.assert_array_equal(trainer.predict(given, stacked=True), expected)
        np.testing.assert_array_equal(np.stack(list(trainer.predict(given))), expected)
