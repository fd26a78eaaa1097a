"""What a start is made of: how often user code is traced, how many programs are compiled, how long they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from learnax.loss import LossPipe
from learnax.models import BATCH_AXIS
from tests.helpers import Squared, make_trainer


class Counted(nn.Module):
    """A dense layer that notes when it is traced; it may ask for the axis over the data of a share."""

    calls: tuple = ()
    axis: str | None = None

    @nn.compact
    def __call__(self, x, y=None):
        self.calls[0].append(x.shape)
        x = nn.Dense(3)(x)
        if self.axis is not None and not self.is_initializing():
            x = x - jax.lax.pmean(x, self.axis)
        return x


class Noted:
    """A list that stays itself inside a module's fields."""

    def __init__(self):
        self.notes = []

    def append(self, note):
        self.notes.append(note)


class CountedLoss(Squared):
    calls = 0

    def _call(self, output, batch):
        CountedLoss.calls += 1
        return super()._call(output, batch)


class Scattered(nn.Module):
    """Parameters of one number each."""

    count: int

    @nn.compact
    def __call__(self, x, y=None):
        return jnp.stack([self.param(f"p{i}", nn.initializers.ones, ()) for i in range(self.count)]).sum() * x[:3]


@pytest.mark.parametrize("axis", [None, BATCH_AXIS])
def test_a_model_is_traced_once_to_initialise_it_and_once_for_the_checks_and_the_step(axis):
    noted = Noted()
    CountedLoss.calls = 0
    trainer = make_trainer(model=Counted((noted,), axis), losses=LossPipe([CountedLoss()]), num_epochs=1)
    trainer.train()
    if axis is None:
        assert len(noted.notes) == 2
        assert CountedLoss.calls == 2
    else:
        # The checks find the axis by its error, and the step has one of another size.
        assert len(noted.notes) == 5


def test_a_start_compiles_two_programs(tmp_path):
    make_trainer(compilation_cache=tmp_path).train()
    compiled = [path.name.split("-")[0] for path in tmp_path.glob("*-cache")]
    assert sorted(compiled) == ["jit_fresh", "jit_train"]


def test_a_parameter_adds_few_lines_to_the_step():
    def lines(count):
        trainer = make_trainer(model=Scattered(count), compile=True)
        (program,) = trainer.engine.programs.values()
        text = program.compiled.as_text()
        return len(text.splitlines()), text.count(" fusion(")

    few, many = lines(20), lines(60)
    per_parameter = [(more - less) / 40 for less, more in zip(few, many, strict=True)]
    # Two moments that are unpacked at the end of a dispatch, and an update that is added in each step.
    assert per_parameter[0] <= 56
    assert per_parameter[1] <= 4
