"""How a run is cut: the rule for the steps of a dispatch, and what is said of it."""

import jax
import numpy as np
import pytest

from learnax.engine.plan import BLOCK_BYTES, FUSED, SMALL_STATE_BYTES, Plan, plan
from tests.helpers import make_data, make_trainer

CONVOLUTION = frozenset({"conv_general_dilated", "dot_general"})
DENSE = frozenset({"dot_general"})


def test_a_cpu_fuses_sixteen_steps_or_as_many_as_an_epoch_has():
    assert plan("auto", "cpu", DENSE, 4096, 1000, 0) == Plan(16, "dispatches cost more than steps", True)
    assert plan("auto", "cpu", DENSE, 4096, 7, 0).room == 7
    assert FUSED == 16


def test_a_model_with_a_convolution_is_not_looped_on_a_cpu():
    assert plan("auto", "cpu", CONVOLUTION, 4096, 1000, 0) == Plan(
        1, "a convolution is slower inside a loop on a CPU", False
    )


def test_a_number_that_was_asked_for_is_what_is_done_even_with_a_convolution():
    why = "as asked for, or as many as an epoch has"
    assert plan(4, "cpu", CONVOLUTION, 4096, 1000, 0) == Plan(4, why, False)
    assert plan(40, "cpu", DENSE, 4096, 1000, 0) == Plan(40, why, True)
    assert plan(np.int64(40), "gpu", DENSE, 4096, 9, 0) == Plan(9, why, True)


def test_a_gpu_fuses_the_steps_of_small_models_those_with_convolutions_too():
    small = plan("auto", "gpu", CONVOLUTION, 4096, 1000, SMALL_STATE_BYTES)
    assert small == Plan(16, "dispatches cost more than steps", True)
    why = "with 119 MB of state, a step takes longer than its dispatch"
    assert plan("auto", "gpu", DENSE, 4096, 1000, 118_534_304) == Plan(1, why, True)
    assert plan(4, "gpu", DENSE, 4096, 1000, 118_534_304).room == 4


def test_other_devices_do_one_step_at_a_time_until_more_is_measured():
    assert plan("auto", "tpu", CONVOLUTION, 4096, 1000, 0) == Plan(1, "fusing is not measured on tpu", True)


@pytest.mark.parametrize(
    ("step_bytes", "room"),
    [
        (BLOCK_BYTES // 16, 16),
        (BLOCK_BYTES // 16 + 1, 8),
        (BLOCK_BYTES // 2, 2),
        (BLOCK_BYTES, 1),
        (BLOCK_BYTES * 9, 1),
    ],
)
def test_a_dispatchs_data_fit_into_their_memory(step_bytes, room):
    decided = plan("auto", "cpu", DENSE, step_bytes, 1000, 0)
    assert decided.room == room
    assert decided.why == ("dispatches cost more than steps" if room == 16 else "their data must fit into 64 MB")


def test_the_same_question_has_the_same_answer():
    assert {plan("auto", "cpu", DENSE, 1 << 23, 1000, 0) for _ in range(100)} == {
        Plan(8, "their data must fit into 64 MB", True)
    }


def test_a_plan_and_its_loaders_say_what_they_do():
    class Streamed:
        data = make_data(43)

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            return self.data[index]

    trainer = make_trainer(val_datasets={"near": Streamed(), "far": make_data(9)}, num_workers=2)
    assert str(trainer.plan) == (
        "5 step(s) per dispatch: dispatches cost more than steps; a dispatch's data take 0.00168 MB"
    )
    kept = "read by 2 worker processes once, kept on the devices while it takes at most 1024 MB"
    assert [str(loader) for loader in trainer.loaders.values()] == [
        f"train: 43 data in 5 batches, {kept}",
        "near: 43 data in 6 batches, read by 2 worker processes in each pass",
        f"far: 9 data in 2 batches, {kept}",
    ]
    single = make_trainer(single_batch=True, train_dataset=Streamed())
    assert str(single.plan) == (
        "16 step(s) per dispatch: dispatches cost more than steps; a dispatch's data take 0.00537 MB"
    )
    assert str(single.loaders["train"]) == "train: the first batch, 1000 times, kept on the devices"
    assert (
        str(make_trainer(single_datum=True).loaders["train"])
        == "train: the first datum, 1000 times, kept on the devices"
    )
    assert str(make_trainer(train_dataset=Streamed()).loaders["train"]) == (
        "train: 43 data in 5 batches, read by this process in each pass"
    )


def test_the_size_of_a_step_is_that_of_its_batches_after_they_are_converted():
    """A float64 datum of 1 MB takes half of that on the devices; a step is two batches of four of them."""
    data = [[np.zeros((1 << 17) - 3), np.zeros(3)] for _ in range(256)]
    trainer = make_trainer(train_dataset=data, batch_size=4, accumulate_steps=2)
    assert trainer.plan == Plan(16, "dispatches cost more than steps", True)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.parts.first["train"].arguments)) == 1 << 19
    assert make_trainer(train_dataset=data, batch_size=8, accumulate_steps=2).plan.room == 8


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        (0, ValueError, 'steps_per_execution must be at least 1, but is 0; or "auto"'),
        (2.5, TypeError, "steps_per_execution must be a whole number, but is 2.5"),
        ("all", TypeError, "steps_per_execution must be a whole number, but is 'all'"),
        (True, TypeError, "steps_per_execution must be a whole number, but is True"),
    ],
)
def test_what_is_no_number_of_steps_is_said_when_the_trainer_is_built(asked, error, text):
    with pytest.raises(error) as raised:
        make_trainer(steps_per_execution=asked)
    assert str(raised.value) == text
