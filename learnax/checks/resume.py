"""What must be alike: over the processes of a run, and between a run and the checkpoint that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from learnax.checks.arguments import check_profile
from learnax.checks.hooks import hook_name
from learnax.checks.settings import Settings
from learnax.data import Feed, FirstDatum
from learnax.utils import PyTree, describe, leaves_by_path

_logger = logging.getLogger("learnax")


def comparable(
    settings: Settings, splits: Mapping[str, Any], data: Mapping[str, FirstDatum], state: PyTree
) -> dict[str, str]:
    """What all processes of a run must have alike, in words.

    Args:
        settings: the trainer's arguments.
        splits: the datasets by name.
        data: the first datum of each.
        state: the training state's shapes.
    """
    given = settings.given
    plain = (bool, int, float, str, type(None))
    # Each process may have its own run and its own view of the devices.
    facts = {
        name: repr(value) if isinstance(value, plain) else "given"
        for name, value in given.items()
        if name not in ("run", "registry", "devices", "compilation_cache", "num_workers")
    }
    facts |= {
        f"len({name})": repr(dataset) if isinstance(dataset, Feed) else str(len(dataset))
        for name, dataset in splits.items()
    }
    facts |= {f"data of {name}": describe(datum.arguments) for name, datum in data.items()}
    facts["hooks"] = ", ".join(map(hook_name, settings.hooks)) or "None"  # by the names all of them agree what is due
    facts["registry"] = "None" if given["registry"] is None else "given"
    facts["profile"] = ", ".join(map(str, check_profile(given["profile"]))) or "None"  # where dispatches are cut
    return facts | {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(state).items()}


def check_same_script(step: int, saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Checks that a run can go on where a checkpoint was made.

    Args:
        step: of the checkpoint.
        saved: what its position in the data depends on; None where it does not say.
        now: the same of this script.

    Raises:
        ValueError: data would be trained on twice, or not at all; what was changed is named.
    """
    before = {} if saved is None else {"shuffle": False, **saved}  # older checkpoints do not speak of it
    changed = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if not changed:
        return
    # With shuffled data the seed is part of the place in them.
    if not now["shuffle"] and all(line.startswith("seed ") for line in changed):
        for line in changed:
            _logger.warning("%s: the run goes on with the random sequence of its checkpoint", line)
        return
    raise ValueError(
        f"the checkpoint of step {step} was made by another script: {', '.join(changed)}. From there, data would be "
        "trained on twice or not at all: use what was, or load_weights=True to begin anew with its parameters"
    )
