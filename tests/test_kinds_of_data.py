"""Each kind of data of the page "Your data" trains."""

import re

import flax.linen as nn
import pytest

from tests.helpers import ROOT, make_trainer


def snippet():
    page = (ROOT / "docs" / "data.md").read_text().partition("## Every kind of data\n")[2]
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names = {}
    exec(code, names)
    return names


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(1)(x)


@pytest.mark.parametrize("name", ["whole", "stream", "batches"])
def test_each_kind_of_data_of_the_page_trains(name):
    dataset = snippet()[name]
    options = {"model": Net(), "batch_size": 64, "shuffle": name == "whole", "num_epochs": 2}
    trainer = make_trainer(train_dataset=dataset, learning_rate=0.1, **options)
    trainer.train()
    losses = trainer.metrics["train_epoch/loss"]
    assert len(trainer.metrics["train/loss"]) == (20 if name == "stream" else 30)
    assert losses[1] < losses[0]
