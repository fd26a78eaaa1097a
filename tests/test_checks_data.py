"""Datasets that are none, or nearly: what came, and the list to make of it."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import MLP, Squared, make_data, make_trainer

X = np.stack([x for x, _ in make_data(16)])
Y = np.stack([y for _, y in make_data(16)])


def text_of(error, **arguments):
    with pytest.raises(error) as caught:
        make_trainer(**arguments)
    text = str(caught.value)
    assert len(text.splitlines()) <= 12
    return text


@pytest.mark.parametrize("dataset", [(X, Y), [X, Y], (jnp.asarray(X), Y)], ids=["tuple", "list", "of jax"])
def test_whole_arrays_in_place_of_data(dataset):
    kind = type(dataset).__name__
    text = text_of(ValueError, train_dataset=dataset)
    assert text == (
        "dataset 'train' has 2 data, fewer than one batch of 8: every batch would be skipped.\n"
        f"These are 2, since each item of the {kind} is one datum, float32[16, 8], float32[16, 3].\n"
        "If they hold all the data, 16 rows each, write\n"
        "  learnax.data.arrays(X, y)\n"
        "If not, use batch_size <= 2"
    )
    text = text_of(ValueError, val_datasets={"far": dataset})
    assert text.startswith(f"dataset 'far' has 2 data: each item of the {kind} is one datum, float32[16, 8], ")
    assert text.endswith("  learnax.data.arrays(X, y)")


def test_whole_arrays_are_told_even_where_they_make_a_batch():
    labels = np.zeros(16, np.int32)
    text = text_of(ValueError, train_dataset=(X, labels), batch_size=1)
    assert text.startswith(
        "dataset 'train' has 2 data: each item of the tuple is one datum, float32[16, 8], int32[16]."
    )


def test_few_data_of_one_shape_are_a_dataset():
    def losses(output, datum):
        return output, jnp.mean(output**2), {}

    data = [np.zeros((6, 8), np.float32)] * 4
    trainer = make_trainer(train_dataset=data, batch_size=2, losses=losses, val_datasets=[data[:2], tuple(data[:3])])
    assert list(trainer.loaders) == ["train", "val", "val_1"]


def test_a_dict_of_whole_arrays_in_place_of_data():
    text = text_of(TypeError, train_dataset={"image": X, "label": Y})
    assert text == (
        "dataset 'train' must be a list of data, but is a dict of 'image', 'label', which hold all the data at once: "
        "learnax.data.arrays(...) around it makes a dict of each datum, and model and losses see one of them at a time"
    )
    text = text_of(TypeError, val_datasets={"far": {"xs": X, "xt": Y.tolist()}})
    assert "dataset 'far' must be a list of data" in text
    text = text_of(TypeError, train_dataset={"train": make_data(8), "test": object()})
    assert text.endswith("but is a dict of 'train', 'test'; a list of dicts is one, a datum each")
    # Numbered from 0 it is read as a list is.
    assert make_trainer(train_dataset=dict(enumerate(make_data(8)))) is not None


class Iterable:
    def __len__(self):
        return 16

    def __iter__(self):
        return iter(make_data(16))


class Unsized(Iterable):
    def __getitem__(self, index):
        return make_data(16)[index]

    def __len__(self):
        raise TypeError("object of type 'Unsized' has no len()")


class Frame:
    """As pandas' are: its [0] is a column."""

    iloc, columns = (), ("image", "label")

    def __len__(self):
        return 16

    def __getitem__(self, name):
        raise KeyError(name)


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        (zip(X, Y, strict=True), "zip; a list of data is the simplest: write list(...) around it"),
        (Iterable(), "Iterable; a list of data is the simplest: write list(...) around it"),
        (Unsized(), "Unsized (object of type 'Unsized' has no len()); a list of data is the simplest: write list(...)"),
        (np.float32(1), "float32; a list of data is the simplest"),
        ("mnist.npz", "str, 'mnist.npz'; read it into a list of data first"),
        (Frame(), "Frame, whose [0] is no row; write a list of data, table.to_dict('records') for a dict of each row"),
    ],
    ids=["zip", "iterable", "unsized", "number", "path", "frame"],
)
def test_what_cannot_be_read_by_number(dataset, shown):
    wanted = "must have __len__ and __getitem__, but is "
    assert text_of(TypeError, train_dataset=dataset).startswith(f"dataset 'train' {wanted}{shown}")
    assert text_of(TypeError, val_datasets=[dataset]).startswith(f"dataset 'val' {wanted}{shown}")


def test_validation_data_in_place_of_validation_sets():
    wanted = "val_datasets must be a mapping of names to datasets or a list of datasets, but is "
    text = text_of(TypeError, val_datasets=make_data(8))
    assert text == (
        f"{wanted}a list of 8 data: its first item is like a training datum,\n"
        "  datum[0]: float32[8]\n  datum[1]: float32[3]\n"
        'so this is one dataset; write val_datasets={"val": data}'
    )
    dicts = [{"image": x, "name": "a"} for x in X]
    first = lambda output, datum: (output, jnp.mean(output), {})  # noqa: E731

    class Image(MLP):
        def __call__(self, datum):
            return datum["image"]

    assert "'name'" in text_of(TypeError, model=Image(), losses=first, train_dataset=dicts, val_datasets=dicts)
    text = text_of(TypeError, val_datasets=X)
    assert text == f'{wanted}ndarray float32[16, 8]; write val_datasets={{"val": data}} for one dataset'
    assert text_of(TypeError, val_datasets=zip(X, Y, strict=True)).startswith(f"{wanted}zip; write val_datasets=")
    text = text_of(TypeError, val_datasets=(X, Y))
    assert text.startswith(f"{wanted}arrays:\neach item of the tuple is one datum, float32[16, 8], float32[16, 3].")
    assert text.endswith('  learnax.data.arrays(X, y)\nand write val_datasets={"val": data} for it')


def test_validation_sets_are_told_from_data_without_reading_them_whole():
    class Watched:
        reads = ()

        def __len__(self):
            return 1 << 40

        def __getitem__(self, index):
            self.reads += (index,)
            return X[index]

    dataset = Watched()
    losses = lambda output, datum: (output, jnp.mean(output), {})  # noqa: E731
    make_trainer(train_dataset=list(X), losses=losses, val_datasets=[dataset], single_batch=True)
    assert dataset.reads == ()
    assert make_trainer(losses=Squared(), val_datasets=[make_data(2)]) is not None


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["val", "val_epoch"], "val_datasets: 'val' and 'val_epoch' go for the same, since the means of 'val' are"),
        (["far_epoch", "far"], "val_datasets: 'far' and 'far_epoch' go for the same"),
        (["1", 1], "val_datasets: 1 and another name are both the text '1'; rename one"),
        (["train_epoch"], "a validation set cannot be named 'train_epoch'; the training split's means go there"),
        (["grads"], "a validation set cannot be named 'grads'; the gradients' norms go to grads/..."),
        ([" "], "a validation set cannot be named ' '; write a word"),
        (["a", "a/b"], "val_datasets: 'a' and 'a/b' both report 'a/b/error'; rename one of them"),
    ],
)
def test_names_of_validation_sets(names, text):
    def losses(output, datum):
        error = jnp.mean(output)
        return output, error, {"error": error, "b/error": error}

    with pytest.raises(ValueError, match=re.escape(text)):
        make_trainer(losses=losses, val_datasets={name: make_data(2) for name in names})
