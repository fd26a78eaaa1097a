"""Datasets: what is one, what is nearly one, and validation sets by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from learnax.checks.names import check_split_names
from learnax.checks.settings import Settings
from learnax.checks.texts import short, structure_of, what_is
from learnax.data import Feed, FirstDatum, Stream, first_datum
from learnax.data.batch import as_list
from learnax.utils import same_structure
from learnax.utils.leaves import is_array

_logger = logging.getLogger("learnax")


def splits_of(settings: Settings) -> tuple[dict[str, Any], dict[str, FirstDatum]]:
    """A run's datasets by name, checked, and the first datum of each.

    Args:
        settings: the trainer's arguments: the datasets, and how they are cut into batches.

    Raises:
        TypeError: not a dataset, or not validation sets.
        ValueError: an empty dataset, a training set with no full batch, names that go for the same.
    """
    batch_size, train_dataset = settings.batch_size, settings.train_dataset
    validated = validation_sets(settings.val_datasets, settings.val_dataset)
    if isinstance(train_dataset, Stream):
        check_stream("train", train_dataset, settings)
        train_dataset = Feed("train", train_dataset, told=True)
    else:
        check_dataset("train", train_dataset, batch_size * settings.accumulate_steps, batch_size)
    splits, data = {"train": train_dataset}, {"train": first_datum("train", train_dataset, told=True)}
    named = named_splits(None if settings.train_only else validated, data["train"])
    check_split_names(list(named))
    for name, dataset in named.items():
        if isinstance(dataset, Stream):
            check_stream(name, dataset, settings)
            dataset = Feed(name, dataset, told=False)
        else:
            check_dataset(name, dataset, 1, batch_size)
        splits[name], data[name] = dataset, first_datum(name, dataset)
        check_no_arrays(name, dataset, data["train"])
    return splits, data


def validation_sets(val_datasets: Any, val_dataset: Any) -> Any:
    """The validation sets, where one alone may be given by the name that once was its.

    Raises:
        ValueError: both are given.
    """
    if val_dataset is None:
        return val_datasets
    if val_datasets is not None:
        raise ValueError(
            "val_dataset and val_datasets are both given; val_datasets={'val': ...} takes all validation sets"
        )
    _logger.warning("val_dataset is taken as the validation set 'val'; its name is now val_datasets={'val': ...}")
    return {"val": val_dataset}


def named_splits(val_datasets: Any, first: FirstDatum) -> dict[str, Any]:
    """Validation sets by name: a mapping as it is, a list as `val`, `val_1`, and so on.

    Args:
        val_datasets: what was given.
        first: the first training datum, by which a list of data is known from a list of datasets.

    Raises:
        TypeError: neither a mapping nor a list or tuple of datasets.
        ValueError: two names that are the same text.
    """
    if val_datasets is None:
        return {}
    wanted = "val_datasets must be a mapping of names to datasets or a list of datasets"
    hint = 'write val_datasets={"val": data}'
    if isinstance(val_datasets, Mapping):
        named: dict[str, Any] = {}
        for name, dataset in val_datasets.items():
            if str(name) in named:
                raise ValueError(f"val_datasets: {name!r} and another name are both the text {str(name)!r}; rename one")
            named[str(name)] = dataset
        return named
    if isinstance(val_datasets, (list, tuple)):
        if val_datasets and _is_like(val_datasets[0], first):
            raise TypeError(
                f"{wanted}, but is a {type(val_datasets).__name__} of {len(val_datasets)} data: its first item is "
                f"like a training datum,\n{structure_of(as_list(val_datasets[0]), 'datum')}\n"
                f"so this is one dataset; {hint}"
            )
        if _whole_arrays(val_datasets) and not same_structure([val_datasets[0]], first.arguments):
            raise TypeError(f"{wanted}, but is arrays:\n{_whole_text(val_datasets)}\nand {hint} for it")
        return {f"val_{i}" if i else "val": dataset for i, dataset in enumerate(val_datasets)}
    raise TypeError(f"{wanted}, but is {_kind(val_datasets)}; {hint} for one dataset")


def check_dataset(name: str, dataset: Any, least: int, batch_size: int) -> None:
    """Checks that a dataset can be read, and has enough data.

    Args:
        name: the split.
        dataset: what was given.
        least: data that it must have.
        batch_size: data per batch.

    Raises:
        TypeError: not a dataset.
        ValueError: fewer data.
    """
    size = _size_of(name, dataset)
    if size == 0:
        raise ValueError(f"dataset {name!r} is empty; expected at least {least} data")
    if isinstance(dataset, Mapping) and 0 not in dataset:
        raise TypeError(_mapping_text(name, dataset))
    whole = _whole_arrays(dataset)
    if size >= least:
        if whole and len({np.ndim(array) for array in dataset}) > 1:
            raise ValueError(f"dataset {name!r} has {size} data: {_whole_text(dataset)}")
        return
    group = least // batch_size
    batches = f"one batch of {batch_size}" if group == 1 else f"the {group} batches of {batch_size} of one update"
    hint = f"batch_size <= {size // group}" if size >= group else f"accumulate_steps <= {max(size // batch_size, 1)}"
    text = f"dataset {name!r} has {size} data, fewer than {batches}: every batch would be skipped"
    if whole:
        raise ValueError(f"{text}.\nThese are {size}, since {_whole_text(dataset)}\nIf not, use {hint}")
    raise ValueError(f"{text}; use {hint}")


def check_stream(name: str, stream: Stream, settings: Settings) -> None:
    """Checks what can be known of a stream before it is read.

    Raises:
        ValueError: the arguments, or those of the trainer, ask for what it cannot do.
    """
    kind = type(stream).__name__
    if name != "train" and stream.steps_per_epoch is not None:
        raise ValueError(
            f"dataset {name!r}: steps_per_epoch is for training data; each validation takes a whole pass, or at most "
            "val_steps= batches"
        )
    if name == "train" and settings.shuffle:
        raise ValueError(
            f"shuffle=True needs data that can be read by number, but train_dataset is a {kind}: shuffle where it is "
            "made, by dataset.shuffle(seed=0) of a grain MapDataset, for one, or .shuffle(seed=0, buffer_size=10000) "
            "of Hugging Face"
        )


def _size_of(name: str, dataset: Any) -> int:
    """A dataset's length; a TypeError, with what to write, for what has none or cannot be read by number."""
    wanted = f"dataset {name!r} must have __len__ and __getitem__, but is {_kind(dataset)}"
    if hasattr(dataset, "iloc") and hasattr(dataset, "columns"):  # of pandas: its [0] asks for a column called 0
        raise TypeError(
            f"{wanted}, whose [0] is no row; write a list of data, table.to_dict('records') for a dict of each row, "
            "or list(table.to_numpy('float32')) for an array of each"
        )
    if isinstance(dataset, (str, bytes)):
        raise TypeError(f"{wanted}, {short(dataset)}; read it into a list of data first")
    size = None
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        try:
            size = len(dataset)
        except TypeError as error:
            wanted += f" ({error})"
    if size is not None:
        return size
    if hasattr(dataset, "__iter__") or hasattr(dataset, "__next__"):
        raise TypeError(
            f"{wanted}; a list of data is the simplest: write list(...) around it, or learnax.data.Stream(...) to have "
            "the data read as they come"
        )
    raise TypeError(f"{wanted}; a list of data is the simplest")


def _kind(value: Any) -> str:
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"{type(value).__name__} {value.dtype}{list(value.shape)}" if np.ndim(value) else what_is(value)
    return type(value).__name__


def _mapping_text(name: str, dataset: Mapping[Any, Any]) -> str:
    names = [str(key) for key in dataset]
    # numpy would read all data of a dataset that is a sequence.
    columns = all(isinstance(value, (np.ndarray, jax.Array, list, tuple)) for value in dataset.values())
    listed = ", ".join(map(repr, names))
    text = f"dataset {name!r} must be a list of data, but is a {type(dataset).__name__} of {listed}"
    if not columns:
        return f"{text}; a list of dicts is one, a datum each"
    return (
        f"{text}, which hold all the data at once: learnax.data.arrays(...) around it makes a dict of each datum, and "
        "model and losses see one of them at a time"
    )


def _whole_arrays(dataset: Any) -> bool:
    """Whether a dataset looks like `(X, y)`: a few arrays, with a row for each datum."""
    if not isinstance(dataset, (list, tuple)) or not 2 <= len(dataset) <= 8:
        return False
    if not all(isinstance(array, (np.ndarray, jax.Array)) and np.ndim(array) for array in dataset):
        return False
    rows = {len(array) for array in dataset}
    return len(rows) == 1 and rows.pop() > len(dataset)


def _whole_text(dataset: Sequence[Any]) -> str:
    columns = ["X", "y", "z", "w"][: len(dataset)] if len(dataset) <= 4 else [f"V{i}" for i in range(len(dataset))]
    shown = ", ".join(f"{array.dtype}{list(array.shape)}" for array in dataset[:4])
    return (
        f"each item of the {type(dataset).__name__} is one datum, {shown}.\nIf they hold all the data, "
        f"{len(dataset[0])} rows each, write\n"
        f"  learnax.data.arrays({', '.join(columns)})"
    )


def check_no_arrays(name: str, dataset: Any, first: FirstDatum) -> None:
    """Raises ValueError for a validation set `(X, y)` where training data are something else than one array."""
    if _whole_arrays(dataset) and not same_structure([dataset[0]], first.arguments):
        raise ValueError(f"dataset {name!r} has {len(dataset)} data: {_whole_text(dataset)}")


def _is_like(item: Any, first: FirstDatum) -> bool:
    """Whether something has the structure and shapes of a training datum."""
    if isinstance(item, list) != first.is_list or hasattr(item, "__next__"):
        return False
    # The lengths tell a dataset from a datum in most cases, without reading it.
    inside, own = (item, first.arguments) if first.is_list else (item, first.arguments[0])
    if isinstance(inside, (list, tuple, dict)) and (type(inside) is not type(own) or len(inside) != len(own)):
        return False
    structure: Any
    wanted: Any
    leaves, structure = jax.tree.flatten(as_list(item), is_leaf=lambda leaf: leaf is None)
    known, wanted = jax.tree.flatten(first.arguments, is_leaf=lambda leaf: leaf is None)
    if structure != wanted:
        return False
    # numpy is asked for the shape of arrays alone: of a dataset it would read all data.
    return all(
        not is_array(leaf) if array is None else is_array(leaf) and np.shape(leaf) == np.shape(array)
        for leaf, array in zip(leaves, known, strict=True)
    )
