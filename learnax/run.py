"""A run: its folder on disk, its config, its wandb session, its checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax

from learnax.checkpoint import Checkpointer
from learnax.checkpoint.thaw import read_plain
from learnax.cluster.processes import connected
from learnax.log.axis import for_wandb, plot_over_steps, with_step
from learnax.utils.names import expanded, folder_name

_PICKLE = b"\x80"
"""What a pickle of any protocol since the second begins with."""


class SavedState(dict[str, Any]):
    """What a checkpoint holds: a dict with `state`, `step`, `time` (seconds since 1970), and `metrics` if saved.

    The fields of its state are its attributes, too: `params`, `opt_state`, `step`.
    """

    def __getattr__(self, name: str) -> Any:
        if "state" not in self:  # while it is unpickled
            raise AttributeError(name)
        return getattr(self["state"], name)


def _children(saved: SavedState) -> tuple[list[tuple[Any, Any]], Hashable]:
    return [(jax.tree_util.DictKey(name), saved[name]) for name in sorted(saved)], tuple(sorted(saved))


def _from_children(names: Any, children: Iterable[Any]) -> SavedState:
    return SavedState(zip(names, children, strict=True))


# As a plain dict is to JAX.
jax.tree_util.register_pytree_with_keys(SavedState, _children, _from_children)


def read_content(path: Path) -> Any:
    """What `Run.save` wrote, read without running any code; a file that is no pickle is its bytes.

    Raises:
        ValueError: it is a pickle of something that is not plain content; its class is named.
        DamagedError: it is a torn pickle.
    """
    with path.open("rb") as file:
        if file.read(len(_PICKLE)) != _PICKLE:
            return path.read_bytes()
    return read_plain(path)


class Run:
    """One training run.

    A row that is logged belongs to a step of the training where it says so: by its column `step`, which
    `log(row, step=n)` writes. wandb numbers rows for itself, and is told to plot over that column
    (`define_metric("*", step_metric="step")`; call it with another one once the trainer is built). The run that a plot
    is given takes `step=` in the same way. `wandb.log(row, step=n)` goes to wandb alone, which drops rows that are
    behind its own count: use the column there.

    Args:
        id: its id, also its folder's name.
        path: its folder; `~` and variables are put in.
        name: its name for people.
        wandb_run: its wandb session, or None for a run that is only read.

    Raises:
        ValueError: an id that cannot be a folder's name.
    """

    def __init__(self, id: str, path: str | os.PathLike[str], name: str | None = None, wandb_run: Any = None):
        self.id = folder_name(id, "a run's id")
        self.path = expanded(path, "a run's path")
        self.name = name or self.id
        self.wandb_run = wandb_run
        plot_over_steps(wandb_run)

    def __repr__(self) -> str:
        return f"Run({self.name})"

    @classmethod
    def new(cls, project: str, path: str | os.PathLike[str], config: Any = None, entity: str | None = None) -> Run:
        """Starts a wandb run, and makes its folder `path/<id>` with the config in `config.yml`.

        Of several processes (`jax.distributed`) the first one does; the others have the same run without a session.

        Args:
            project: the wandb project.
            path: the folder of all of the project's runs.
            config: a mapping, dataclass or OmegaConf config.
            entity: the wandb entity; None takes wandb's own default.
        """
        from omegaconf import OmegaConf

        folder, processes = expanded(path, "the path of runs"), connected()
        if not processes.first:
            id, name = json.loads(processes.from_first(""))
            return cls(id, folder / id, name)
        folder.mkdir(parents=True, exist_ok=True)
        config = OmegaConf.create({}) if config is None else OmegaConf.create(config)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        session = _session(project=project, entity=entity, config=plain, dir=str(folder))
        (folder / session.id).mkdir(exist_ok=True)
        run = cls(session.id, folder / session.id, session.name, session)
        OmegaConf.save(config, run.path / "config.yml")
        processes.from_first(json.dumps([run.id, run.name]))
        return run

    @classmethod
    def restore(cls, id: str, path: str | os.PathLike[str], project: str, entity: str | None = None) -> Run:
        """Goes on with a run: its folder `path/<id>`, and its wandb run.

        Raises:
            FileNotFoundError: there is no such run.
        """
        folder = cls.folder(id, path)
        if not connected().first:
            return cls(id, folder)
        session = _session(project=project, entity=entity, id=id, resume="allow", dir=str(folder.parent))
        return cls(id, folder, session.name, session)

    @staticmethod
    def folder(id: str, path: str | os.PathLike[str]) -> Path:
        """The folder of a run; FileNotFoundError, with the runs there are, where it is not there."""
        path = expanded(path, "the path of runs")
        # A trainer on a plain wandb run leaves checkpoints and no config; wandb's own folder has neither.
        folders = {entry.parent for kept in ("config.yml", "checkpoints") for entry in path.glob(f"*/{kept}")}
        there = {folder.name: folder for folder in folders}
        if str(id) not in there:
            raise FileNotFoundError(f"no run {id!r} in {path}; there are: {', '.join(sorted(there)) or 'none'}")
        return there[str(id)]

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs a row to wandb; a run without a session keeps nothing.

        Args:
            metrics: the row.
            step: of the training that it belongs to; the row's column `step`.
        """
        if self.wandb_run is not None:
            self.wandb_run.log(for_wandb(with_step(metrics, step)))

    @property
    def summary(self) -> Any:
        """The wandb session's summary, to be updated; None without a session."""
        return None if self.wandb_run is None else self.wandb_run.summary

    def finish(self) -> None:
        """Ends the wandb session, with everything written."""
        if self.wandb_run is not None:
            self.wandb_run.finish()

    def get_train_state(self, checkpoint: Any = -1) -> SavedState:
        """A checkpoint: -1 for the latest, "best", or a step.

        Returns:
            A dict with `state` and `step`; the state's `params`, `opt_state` and `step` are attributes of it.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        checkpointer = Checkpointer.at(self.path / "checkpoints")
        loaded = checkpointer.load(checkpoint, resume=False)
        if loaded is None:
            raise FileNotFoundError(f"run {self.id!r} has no checkpoint in {checkpointer.path}")
        return SavedState(loaded)

    def get_weights(self, checkpoint: Any = -1) -> Any:
        """The parameters of a checkpoint; see `get_train_state`."""
        return self.get_train_state(checkpoint)["state"].params

    def get_config(self) -> Any:
        """The config that the run was made with, as an OmegaConf config."""
        from omegaconf import OmegaConf

        return OmegaConf.load(self.path / "config.yml")

    def read(self, filepath: str | os.PathLike[str], read_fn: Callable[[Path], Any] = read_content) -> Any:
        """Reads a file of the run's folder.

        Args:
            filepath: where it is, inside the folder.
            read_fn: reads it, given its path; by default `read_content`: what `save` wrote.

        Raises:
            ValueError: the path leads out of the run's folder, or the file holds what is not read without running code.
        """
        return read_fn(self._inside(filepath))

    def read_all(self, pattern: str, read_fn: Callable[[Path], Any] = read_content) -> dict[str, Any]:
        """Reads all files at any depth of the run's folder that match a glob pattern (`**/<pattern>`).

        Args:
            pattern: of a name (`"*.pkl"`), or of names behind one another (`"samples/*.pkl"`).
            read_fn: reads each, given its path; see `read`.

        Returns:
            The contents by the files' whole paths, as text, in the order of these. `read` takes them, too.

        Raises:
            ValueError: as `read`; or the pattern is no part of a path.
        """
        if not pattern or pattern.startswith("/") or ".." in PurePath(pattern).parts:
            raise ValueError(f"read_all({pattern!r}): a pattern is matched inside of the run's folder {self.path}")
        found = sorted({path for path in self.path.glob(f"**/{pattern}") if path.is_file()})
        return {str(path): self.read(path, read_fn) for path in found}

    def save(
        self,
        filepath: str | os.PathLike[str],
        content: Any,
        write_fn: Callable[[Path, Any], Any] | None = None,
    ) -> Path:
        """Writes a file into the run's folder.

        Args:
            filepath: where, inside the folder; folders on the way are made.
            content: anything that can be pickled. `read` gives back numbers, text, bytes, arrays and plain containers
                of them.
            write_fn: `(path, content)`, writes it in place of pickle: `np.save`, or `Path.write_text`, for example.

        Returns:
            The file's path.

        Raises:
            TypeError: the content cannot be pickled; nothing is written.
            ValueError: the path leads out of the run's folder.
        """
        path = self._inside(filepath)
        if write_fn is None:
            try:
                pickled = pickle.dumps(content)
            except Exception as error:
                raise TypeError(
                    f"save({str(filepath)!r}): {type(content).__name__} cannot be pickled ({error}); save plain "
                    "content, or give a write_fn"
                ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        if write_fn is None:
            path.write_bytes(pickled)
        else:
            write_fn(path, content)
        return path

    def clear_dir(self, name: str) -> Path:
        """Empties a folder inside the run's folder, and makes it where there is none."""
        path = self._inside(name)
        if path == self.path.resolve():
            raise ValueError(f"clear_dir({name!r}) would empty the whole run {self.id!r}; name a folder inside it")
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def _inside(self, name: str | os.PathLike[str]) -> Path:
        path = (self.path / name).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise ValueError(f"{str(name)!r} is outside of the run's folder {self.path}")
        return path


def _session(**options: Any) -> Any:
    import wandb

    # A script that starts a second run would be given the session of the first again, and log both into one.
    wandb.finish()
    return wandb.init(**options)
