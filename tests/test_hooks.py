"""The user's hooks: due at exact steps, what they see and ask for, their state, their errors."""

import collections
import logging
import math
import re

import jax
import numpy as np
import optax
import pytest

import learnax.hooks
from learnax.hooks import AfterValidation, At, AtEnd, Every, Hook, HookError
from learnax.loss import LossPipe
from tests import peers
from tests.helpers import (
    MLP,
    ROOT,
    MemoryRun,
    Poisonable,
    StopAt,
    Streamed,
    assert_trees_equal,
    make_data,
    make_trainer,
)

TIMES = ("train/update_time", "train_epoch/update_time")


def steps_of(moments):
    return [moment[0] for moment in moments]


class Counter(Hook):
    """Counts its calls, by threes."""

    def __init__(self, name="counter"):
        self.name, self.calls, self.seen = name, 0, []

    def next_due(self, step):
        return step - step % 3 + 3

    def __call__(self, moment):
        self.calls += 1
        self.seen.append((moment.step, self.calls))
        return {"calls": self.calls} if self.name == "counter" else None

    def state(self):
        return {"calls": self.calls, "nested": [1, None, {"a": math.inf}]}

    def restore(self, state):
        assert state["nested"] == [1, None, {"a": math.inf}]
        self.calls = state["calls"]


def same_metrics(left, right):
    kept = [{k: v for k, v in each.metrics.items() if k not in TIMES} for each in (left, right)]
    np.testing.assert_equal(*kept)


# ---- what they see


@pytest.mark.parametrize(("count", "fused"), [(1, "auto"), (4, "auto"), (4, 1)])
def test_hooks_are_called_at_their_steps_and_change_no_bit(count, fused):
    options = {"devices": jax.devices()[:count], "steps_per_execution": fused}
    plain = make_trainer(**options)
    plain.train()
    data, seen, other = make_data(43), [], []

    def look(moment):
        assert moment.run is None
        assert moment.ema is None
        seen.append((moment.step, moment.epoch, dict(moment.metrics), moment.params, moment.batch, moment.outputs))

    trainer = make_trainer(
        hooks=[Every(3, look, outputs=True), At([9, 1, 2, 50], lambda m: other.append(m.step))], **options
    )
    trainer.train()
    assert [step for step, *_ in seen] == [3, 6, 9]
    assert other == [1, 2, 9]
    assert_trees_equal(trainer.train_state, plain.train_state)
    same_metrics(trainer, plain)
    for step, epoch, metrics, params, batch, outputs in seen:
        assert epoch == (step - 1) // 5
        assert metrics["train/loss"] == plain.metrics["train/loss"][step - 1]
        assert metrics["grads/Dense_0/kernel"] > 0
        first = (step - 1) % 5 * 8
        assert_trees_equal(batch, data[first : first + 8])
        assert len(outputs) == 8
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        errors = [np.mean((output - datum[1]) ** 2) for output, datum in zip(outputs, batch, strict=True)]
        np.testing.assert_allclose(np.mean(errors), metrics["train/loss"], rtol=1e-5)
    halfway = make_trainer(num_epochs=1, **options)
    halfway.train()
    by_hand = make_trainer(hooks=[At([5], lambda m: seen.append(m.params))], **options)
    by_hand.train()
    assert_trees_equal(seen[-1], halfway.train_state.params)


def test_what_a_hook_reads_is_its_own_copy_and_the_moment_dies():
    kept = []

    def spoil(moment):
        for leaf in jax.tree.leaves((moment.params, moment.batch)):
            leaf[...] = math.nan
        kept.append(moment)

    fine = []
    hooks = [Every(2, spoil), Every(2, lambda m: fine.append(m.params), name="other")]
    trainer, plain = make_trainer(hooks=hooks), make_trainer()
    trainer.train()
    plain.train()
    assert_trees_equal(trainer.train_state, plain.train_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fine))
    assert (kept[0].step, kept[0].epoch) == (2, 0)
    wanted = (
        r"^the moment of step 2 is over, and moment.params with it: the next step takes over the memory of the state. "
        r"Read it while hook 'spoil' is called, and keep what it gives, which is a copy, not the moment$"
    )
    with pytest.raises(RuntimeError, match=wanted):
        kept[0].params  # noqa: B018
    for what in (lambda m: m.metrics, lambda m: m.batch, lambda m: m.run, lambda m: m.stop("x"), lambda m: m.log({})):
        with pytest.raises(RuntimeError, match="is over"):
            what(kept[0])


def test_what_is_returned_joins_the_metrics_and_rows_go_to_the_run():
    run = MemoryRun()

    def look(moment):
        assert moment.run is run
        moment.log({"picture": "of a cat"})
        return {"size": np.float32(moment.step), "flag": True, "seen": jax.numpy.int32(len(run.rows))}

    trainer = make_trainer(hooks=[Every(4, look)], run=run)
    trainer.train()
    assert trainer.metrics["train/size"] == [4, 8]
    assert trainer.metrics["train/flag"] == [1, 1]
    assert trainer.metrics["train_epoch/size"] == [4, 8]
    rows = [row for row in run.rows if "train/loss" in row]
    assert [row.get("train/size") for row in rows] == [None, None, None, 4, None, None, None, 8, None, None]
    assert [row for row in run.rows if "picture" in row] == [{"step": s, "picture": "of a cat"} for s in (4, 8)]
    # The run has all earlier rows when a hook looks at it: the number of parameters, and those of three steps.
    assert trainer.metrics["train/seen"][0] == 4


def test_an_update_that_is_dropped_is_no_step():
    data = make_data(43)
    data[17][1][0] = 7  # in the third batch
    seen = []
    trainer = make_trainer(
        train_dataset=data, losses=LossPipe([Poisonable()]), hooks=[Every(1, lambda m: seen.append(m.step))]
    )
    trainer.train()
    assert seen == list(range(1, 9))
    assert trainer.train_state.step == 8


def test_they_are_called_after_validations_and_at_begin_and_end():
    calls = []

    class All(Hook):
        def begin(self, moment):
            calls.append(("begin", moment.step, dict(moment.metrics)))

        def after_validation(self, moment):
            calls.append(("validation", moment.step, moment.epoch, moment.metrics["val/loss"]))
            with pytest.raises(ValueError, match=r"^there is no moment.batch after a validation: it is that of a step"):
                moment.batch  # noqa: B018
            return {"step": moment.step}

        def end(self, moment):
            calls.append(("end", moment.step, moment.metrics["val/loss"]))

    run = MemoryRun()
    ends = []
    hooks = [All(), AfterValidation(lambda m: ends.append(m.step)), AtEnd(lambda m: ends.append(m.step), name="last")]
    trainer = make_trainer(hooks=hooks, val_datasets=[make_data(9, 1)], run=run)
    trainer.train()
    losses = trainer.metrics["val/loss"]
    wanted = [
        ("begin", 0, {}),
        ("validation", 5, 0, losses[0]),
        ("validation", 10, 1, losses[1]),
        ("end", 10, losses[1]),
    ]
    assert calls == wanted
    assert ends == [5, 10, 10]
    assert trainer.metrics["validation/step"] == [5, 10]
    assert [row["step"] for row in run.rows if "validation/step" in row] == [5, 10]


def test_they_are_asked_once_for_each_cut():
    asked = collections.Counter()

    class Rare(Hook):
        def __init__(self, number):
            self.name = f"rare {number}"

        def next_due(self, step):
            asked[self.name] += 1
            return step - step % 40 + 40

        def __call__(self, moment):
            asked["called"] += 1

    options = {"train_dataset": make_data(8 * 40), "num_epochs": 2, "steps_per_execution": 2}
    trainer, plain = make_trainer(hooks=[Rare(number) for number in range(10)], **options), make_trainer(**options)
    trainer.train()
    plain.train()
    assert asked.pop("called") == 20
    assert set(asked.values()) == {2}  # at the beginning, and once after each call but the last
    assert trainer.engine.calls == plain.engine.calls == 40


# ---- what they ask for


def test_a_stop_ends_the_run_saved_and_it_goes_on_as_if_it_had_not(caplog):
    ends = []
    hooks = [At([7], lambda m: m.stop("it is enough"), "judge"), AtEnd(lambda m: ends.append(m.step))]
    trainer = make_trainer(registry="r", run=MemoryRun(), hooks=hooks)
    with caplog.at_level(logging.WARNING, "learnax"):
        assert trainer.train() is trainer.run
    assert trainer.train_state.step == 7
    assert ends == [7]
    line = "stopped at step 7 by hook 'judge': it is enough, and saved: load_checkpoint=True goes on from here"
    assert line in caplog.messages
    whole, again = make_trainer(), make_trainer(registry="r", run=MemoryRun(), load_checkpoint=True)
    whole.train()
    again.train()
    assert_trees_equal(again.train_state, whole.train_state)
    same_metrics(again, whole)
    trainer.train()  # the one that was stopped goes on, too; its hook is not due any more
    assert_trees_equal(trainer.train_state, whole.train_state)


def test_a_stop_after_a_validation_comes_before_the_next_step(caplog):
    hook = AfterValidation(lambda m: m.stop("seen"), "judge")
    trainer = make_trainer(hooks=[hook], val_datasets=[make_data(8)], num_epochs=3)
    trainer.train()
    assert trainer.train_state.step == 5
    assert len(trainer.metrics["val/loss"]) == 1
    assert "stopped at step 5 by hook 'judge': seen" in caplog.text


def test_named_saves_are_kept_and_load_by_their_names():
    def save(moment):
        moment.save("third" if moment.step == 3 else None)
        moment.save("newest")

    options = {"registry": "r", "run": MemoryRun(), "save_every": 2}
    trainer = make_trainer(hooks=[At([3, 6, 8], save)], **options)
    trainer.train()
    there = trainer.checkpointer.list_available_checkpoints()
    assert {"third", "newest", "latest"} <= set(there)
    assert trainer.checkpointer.load("third")["step"] == 3
    assert trainer.checkpointer.load("newest")["step"] == 8
    assert trainer.checkpointer.load("newest")["metrics"]["train/loss"] == trainer.metrics["train/loss"][7]
    again = make_trainer(load_checkpoint="third", **options)
    assert again.log.step == 3
    again.train()
    assert_trees_equal(again.train_state, trainer.train_state)
    same_metrics(again, trainer)


def test_the_rate_is_scaled_and_a_run_goes_on_with_the_same_bits():
    def scale(moment):
        moment.scale_rate(0.3)

    def make(**options):
        return make_trainer(hooks=[At([2, 4, 8], scale)], learning_rate=0.07, registry="r", save_every=1, **options)

    whole = make()
    whole.train()
    rates = np.float32([0.07 * 0.3**n for n in (0, 0, 1, 1, 2, 2, 2, 2, 3, 3)])
    np.testing.assert_allclose(whole.metrics["train/learning_rate"], rates, rtol=1e-6)
    stopped = make(load_checkpoint=None)
    stopped.loop.session.save_stopped = lambda why: None
    stopped.hooks.saves.append(StopAt(6))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = make(load_checkpoint=True)
    assert again.log.step == 6
    again.train()
    assert_trees_equal(again.train_state, whole.train_state)
    same_metrics(again, whole)


def test_the_rate_of_an_optimiser_that_keeps_it_is_scaled(caplog):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    options = {"optimizer": optimizer, "learning_rate": None, "registry": "r"}
    trainer = make_trainer(hooks=[At([5], lambda m: m.scale_rate(0.5))], **options)
    trainer.train()
    assert trainer.metrics["train/learning_rate"] == [0.5] * 5 + [0.25] * 5
    again = make_trainer(load_checkpoint=True, num_epochs=3, **options)
    again.train()
    assert again.metrics["train/learning_rate"][-1] == 0.25
    assert "goes on with those of the checkpoint" not in caplog.text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"learning_rate": optax.constant_schedule(1e-2)},
            "the learning rate follows a schedule, which says it",
        ),
        (
            {"optimizer": optax.sgd(0.1)},
            r"the optimizer keeps no learning rate in its state: optax.inject_hyperparams\(",
        ),
    ],
)
def test_a_rate_that_cannot_be_scaled_is_an_error(given, wanted):
    trainer = make_trainer(hooks=[At([2], lambda m: m.scale_rate(0.5), "scale")], **given)
    with pytest.raises(HookError, match=rf"^hook 'scale' failed in __call__\(\) at step 2: ValueError: {wanted}"):
        trainer.train()


# ---- what they keep


@pytest.mark.parametrize("step", [5, 7])
@pytest.mark.parametrize("kind", ["list", "lazy"])
def test_state_goes_on_after_a_kill(step, kind):
    wrap = Streamed if kind == "lazy" else lambda data: data

    def make(**options):
        counter = Counter()
        made = make_trainer(hooks=[counter], train_dataset=wrap(make_data(43)), registry="r", save_every=4, **options)
        return made, counter

    whole, _ = make()
    whole.train()
    stopped, _ = make()
    stopped.loop.session.save_stopped = lambda why: None
    stopped.hooks.saves.append(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again, counter = make(load_checkpoint=True)
    assert (again.log.step, counter.calls) == (4, 1)
    again.train()
    assert counter.seen == [(6, 2), (9, 3)]
    assert again.metrics["train/calls"] == [1, 2, 3]
    same_metrics(again, whole)
    assert_trees_equal(again.train_state, whole.train_state)


def test_a_state_that_is_not_there_or_does_not_fit_is_told_of(caplog):
    class Other(Counter):
        def restore(self, state):
            raise KeyError("shape")

    options = {"registry": "r", "num_epochs": 1}
    make_trainer(hooks=[Counter("a"), Counter("b")], **options).train()
    hooks = [Other("a"), Counter("new"), Every(2, lambda m: None)]
    make_trainer(hooks=hooks, load_checkpoint=True, **options)
    assert caplog.messages[-3:] == [
        "hook 'a' could not take its state from the checkpoint of step 5, and begins anew: KeyError: 'shape'",
        "hook 'new' has no state in the checkpoint of step 5: it begins anew",
        "the checkpoint of step 5 has a state of hook 'b', which this run has not",
    ]


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (
            {"a": np.zeros(3)},
            r"\['a'\] is of type ndarray, which is no plain data; write .tolist\(\), and make an array",
        ),
        ((1, 2), "the state is of type tuple, which is no plain data; write a list"),
        ({"a": [{1: 2}]}, r"\['a'\]\[0\] has the key 1, but keys are text: write '1'"),
        (MLP(), "the state is of type MLP, which is no plain data; keep numbers, text, lists and dicts"),
    ],
)
def test_state_that_is_no_plain_data_is_an_error_when_the_trainer_is_built(state, wanted):
    class Odd(Hook):
        def state(self):
            return state

    with pytest.raises(
        HookError, match=rf"^hook 'Odd': its state\(\) cannot be kept in a checkpoint: TypeError: {wanted}|{wanted}"
    ):
        make_trainer(hooks=[Odd()])


def test_state_that_ceases_to_be_plain_ends_the_run_with_all_else_saved():
    class Late(Counter):
        def state(self):
            return {"calls": self.calls, "nested": [1, None, {"a": math.inf}]} | (
                {"bad": np.zeros(2)} if self.calls > 1 else {}
            )

    trainer = make_trainer(hooks=[Late()], registry="r", save_every=3)
    with pytest.raises(HookError, match=r"^hook 'counter': its state\(\) cannot be kept"):
        trainer.train()
    again = make_trainer(hooks=[hook := Counter()], registry="r", load_checkpoint=True)
    assert (again.log.step, hook.calls) == (6, 1)  # the last state that was plain


# ---- the page


def test_the_hooks_of_the_page_are_there():
    table = (ROOT / "docs" / "between-steps.md").read_text().split("| hook | what it does |")[1].split("\n\n")[0]
    names = re.findall(r"`([A-Z]\w+)\(", table)
    assert len(names) > 8
    for name in names:
        assert hasattr(learnax.hooks, name), name


# ---- several processes


@pytest.mark.processes
def test_several_processes_agree_on_what_hooks_return_and_ask_for(tmp_path):
    first, second = peers.together("hooked", tmp_path / "peers", 2, env={"PEERS": str(tmp_path)})
    one, two = first.results, second.results
    assert [entry[:2] for entry in one["seen"]] == [("first", 4), ("both", 5), ("first", 8)]
    assert two["seen"] == [("both", 5, 8, 8)] == one["seen"][1:2]
    assert "stopped at step 7 by hook 'judge': that is all, and saved" in first.err
    assert one["stopped"] == two["stopped"]
    assert one["stopped"][0] == 7
    assert "fourth" in one["stopped"][1]
    assert one["error"] == (
        "hook 'first' reads moment.batch, which is read by several processes, each its part, but is called on the "
        "first one alone: set the hook's attribute everywhere = True, and let it read the same on all of them"
    )
    np.testing.assert_equal(one["metrics"], two["metrics"])
    assert one["metrics"]["train/calls"] == [1, 2, 3]
    assert one["metrics"]["train/index"] == [0]
    assert one["metrics"]["train/norm/rows"] == [8] * 5
    scale = At([4], lambda m: m.scale_rate(0.5))
    alone = make_trainer(hooks=[scale], devices=jax.devices()[:2])
    alone.train()
    assert one["metrics"]["train/learning_rate"] == alone.metrics["train/learning_rate"]
    assert_trees_equal(one["params"], two["params"])
    assert_trees_equal(one["params"], alone.train_state.params)


# ---- what goes wrong


@pytest.mark.processes
def test_a_hook_that_raises_on_one_of_several_processes_ends_all_of_them_saved(tmp_path):
    first, second = peers.together("hook_fails", tmp_path / "peers", 2, env={"PEERS": str(tmp_path)})
    text = "hook 'broken' failed in __call__() at step 4: LookupError: the disk of this machine is gone"
    other = "hook 'Late' failed in next_due() at step 6: LookupError: no idea"
    told = [[(step, line.partition("\n")[0]) for step, line in one.results["errors"]] for one in (first, second)]
    assert told[1] == [(4, text), (6, f"on another process, {other}")]
    assert told[0] == [(4, f"on another process, {text}"), (6, other)]
    assert "stopped at step 4 by HookError: on another process, hook 'broken' failed" in first.err
    assert first.results["begins"] == second.results["begins"] == 6
    alone = make_trainer(devices=jax.devices()[:2])
    alone.train()
    for one in (first, second):
        assert_trees_equal(one.results["params"], alone.train_state.params)


def test_a_hook_that_raises_ends_the_run_saved_and_named(caplog):
    def broken(moment):
        raise LookupError("no such thing")

    trainer = make_trainer(hooks=[At([7], broken)], registry="r")
    wanted = r"^hook 'broken' failed in __call__\(\) at step 7: LookupError: no such thing\n  in test_hooks.py, line"
    with pytest.raises(HookError, match=wanted) as raised:
        trainer.train()
    assert isinstance(raised.value.__cause__, LookupError)
    assert len(trainer.metrics["train/loss"]) == 7
    again, whole = make_trainer(registry="r", load_checkpoint=True), make_trainer()
    assert again.log.step == 7
    again.train()
    whole.train()
    assert_trees_equal(again.train_state, whole.train_state)
    same_metrics(again, whole)


def test_a_stop_of_pythons_own_passes_as_it_is():
    def interrupt(moment):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(hooks=[At([3], interrupt)]).train()


def test_an_error_after_a_validation_repeats_none_of_it():
    def broken(moment):
        raise LookupError

    options = {"registry": "r", "val_datasets": [make_data(9, 1)]}
    run = MemoryRun()
    with pytest.raises(HookError, match=r"^hook 'broken' failed in after_validation\(\) at step 5"):
        make_trainer(hooks=[AfterValidation(broken)], run=run, **options).train()
    assert len([row for row in run.rows if "val/loss" in row]) == 1
    again, whole = make_trainer(load_checkpoint=True, run=run, **options), make_trainer(**options | {"registry": None})
    again.train()
    whole.train()
    same_metrics(again, whole)


class Bare:
    """A hook of no class of learnax."""

    def __init__(self, answer, returned=None):
        self._answer, self._returned = answer, returned

    def next_due(self, step):
        return self._answer(step)

    def __call__(self, moment):
        return self._returned


@pytest.mark.parametrize(
    ("hooks", "wanted"),
    [
        (Every(3, print), r"^hooks must be a list, hooks=\[...\], but is <learnax"),
        (
            [print],
            r"^hooks\[0\] must have next_due\(step\), and be callable with a moment, but is <built-in function print>, "
            r"which has no next_due; learnax.hooks.Every\(100, function\) makes one of a function$",
        ),
        ([Hook], r"^hooks\[0\] .* but is the class Hook; write Hook\(...\)$"),
        (
            [Every(1, print), At([1], print)],
            r"^hooks\[0\] and hooks\[1\] are both called 'print', and a checkpoint keeps the state of each by its "
            r"name; give one of them another, name='...'$",
        ),
    ],
)
def test_what_is_no_hook_is_an_error(hooks, wanted):
    with pytest.raises((TypeError, ValueError), match=wanted):
        make_trainer(hooks=hooks)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Every(0, print), "^Every: n must be a whole number above 0, but is 0$"),
        (lambda: Every(2.5, print), "^Every: n must be a whole number above 0, but is 2.5$"),
        (lambda: Every(3, None), "^Every: function must be callable with a moment, but is None$"),
        (lambda: At([3, -1], print), "^At: a step must be a whole number above 0, but is -1$"),
        (lambda: At(3, print), r"^At: steps must be a list of whole numbers, At\(\[3\], ...\), but is 3$"),
    ],
)
def test_what_makes_no_hook_is_an_error(make, wanted):
    with pytest.raises((TypeError, ValueError), match=wanted):
        make()


@pytest.mark.parametrize("answer", [0, 2.5, math.nan, None])
def test_a_hook_that_is_due_in_the_past_or_at_no_step_is_an_error(answer):
    wanted = r"^hook 'Bare': next_due\(0\) must be a step after 0, as a whole number, or infinity for none, but is "
    with pytest.raises(HookError, match=wanted + str(answer)):
        make_trainer(hooks=[Bare(lambda step: answer)]).train()


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        (3.0, r"returned 3.0, but a hook returns a dict of numbers, which join the metrics, or None$"),
        ({"a": np.zeros(3)}, r"returned for 'a' an array float64\[3\], but a hook .* or None; moment.log takes a row$"),
        ({"a": "text"}, r"returned for 'a' 'text', but a hook returns"),
        ({"loss": 1}, r"returned a metric called 'loss'; that name is the trainer's own, .* Call it 'Bare_loss' for"),
        ({"rmse": 1}, r"returned a metric called 'rmse'; that name is that of a metric of the losses"),
        ({3: 1}, r"returned a metric whose name must be text, but is 3; write '3'$"),
    ],
)
def test_what_a_hook_returns_is_looked_at(returned, wanted):
    with pytest.raises(HookError, match=rf"^hook 'Bare', at step 2, {wanted}"):
        make_trainer(hooks=[Bare(lambda step: 2 if step < 2 else math.inf, returned)]).train()


def test_two_hooks_that_return_the_same_are_told_apart():
    hooks = [Every(2, lambda m: {"a": 1}, "one"), Every(2, lambda m: {"a": 2}, "two")]
    wanted = r"^hook 'two', at step 2, returned a metric 'a', as another hook did at that step; rename one of them$"
    with pytest.raises(HookError, match=wanted):
        make_trainer(hooks=hooks).train()


@pytest.mark.parametrize(
    ("act", "wanted"),
    [
        (
            lambda m: m.outputs,
            "hook 'act' reads moment.outputs, which the training program gives only where a hook asks for",
        ),
        (lambda m: m.save(), r"moment.save\(\) needs a place for checkpoints: give the trainer a registry="),
        (lambda m: m.scale_rate(0), r"moment.scale_rate\(factor\) takes a number above 0, but got 0"),
        (lambda m: m.log([1]), "moment.log takes a dict, but got list"),
    ],
)
def test_what_cannot_be_had_of_a_moment_is_an_error(act, wanted):
    with pytest.raises(HookError, match=f"^hook 'act' failed in .* at step 1: .*{wanted}"):
        make_trainer(hooks=[At([1], act, "act")]).train()


@pytest.mark.parametrize("name", ["best", "latest", "12", "a/b", "", "x.pyd", 3])
def test_a_name_that_stands_for_something_else_is_no_name_of_a_save(name):
    with pytest.raises(
        HookError, match=r"ValueError: moment.save\(name\): a name is a word that is no number, no path"
    ):
        make_trainer(hooks=[At([1], lambda m: m.save(name))], registry="r").train()


def test_who_waits_for_validations_that_there_are_none_of_is_told(caplog):
    make_trainer(hooks=[AfterValidation(print)])
    assert "hook 'print' waits for validations, but this run has none" in caplog.messages


def test_a_metric_that_nothing_produces_is_an_error():
    class Watches(Hook):
        metric = "val/accuracy"

    held_out = {"val_datasets": [make_data(8)]}
    wanted = r"^hook 'Watches': the metric 'val/accuracy' is produced by no split of this run; there are: train/"
    with pytest.raises(ValueError, match=wanted):
        make_trainer(hooks=[Watches()], **held_out)
    make_trainer(hooks=[Watches()], single_batch=True, **held_out)  # validation is switched off, for a look
