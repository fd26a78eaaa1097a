"""A run: its folder on disk, its config, its wandb session, its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from learnax.checkpoint import Checkpointer
from learnax.processes import connected
from learnax.state import TrainState


class Run:
    """One training run.

    Args:
        id: its id, also its folder's name.
        path: its folder.
        name: its name for people.
        wandb_run: its wandb session, or None for a run that is only read.
    """

    def __init__(self, id: str, path: str | os.PathLike[str], name: str | None = None, wandb_run: Any = None):
        self.id = id
        self.path = Path(path)
        self.name = name or id
        self.wandb_run = wandb_run

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

        folder, processes = Path(path), connected()
        if not processes.first:
            id, name = json.loads(processes.from_first(""))
            return cls(id, folder / id, name)
        folder.mkdir(parents=True, exist_ok=True)
        config = OmegaConf.create({}) if config is None else OmegaConf.create(config)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        session = _session(project=project, entity=entity, config=plain, dir=str(folder))
        run = cls(session.id, folder / session.id, session.name, session)
        run.path.mkdir(exist_ok=True)
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
        session = _session(project=project, entity=entity, id=id, resume="allow", dir=str(Path(path)))
        return cls(id, folder, session.name, session)

    @staticmethod
    def folder(id: str, path: str | os.PathLike[str]) -> Path:
        """The folder of a run; FileNotFoundError, with the runs there are, where it is not there."""
        # A trainer on a plain wandb run leaves checkpoints and no config; wandb's own folder has neither.
        folders = {entry.parent for kept in ("config.yml", "checkpoints") for entry in Path(path).glob(f"*/{kept}")}
        there = {folder.name: folder for folder in folders}
        if id not in there:
            raise FileNotFoundError(f"no run {id!r} in {path}; there are: {', '.join(sorted(there)) or 'none'}")
        return there[id]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs to wandb; a run without a session keeps nothing."""
        if self.wandb_run is not None:
            self.wandb_run.log(dict(metrics))

    @property
    def summary(self) -> Any:
        """The wandb session's summary, to be updated; None without a session."""
        return None if self.wandb_run is None else self.wandb_run.summary

    def finish(self) -> None:
        """Ends the wandb session, with everything written."""
        if self.wandb_run is not None:
            self.wandb_run.finish()

    def get_train_state(self, checkpoint: Any = -1) -> TrainState:
        """The training state of a checkpoint: -1 for the latest, "best", or a step.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        checkpointer = Checkpointer.at(self.path / "checkpoints")
        loaded = checkpointer.load(checkpoint, resume=False)
        if loaded is None:
            raise FileNotFoundError(f"run {self.id!r} has no checkpoint in {checkpointer.path}")
        return loaded["state"]

    def get_weights(self, checkpoint: Any = -1) -> Any:
        """The parameters of a checkpoint; see `get_train_state`."""
        return self.get_train_state(checkpoint).params

    def get_config(self) -> Any:
        """The config that the run was made with, as an OmegaConf config."""
        from omegaconf import OmegaConf

        return OmegaConf.load(self.path / "config.yml")

    def read(self, filename: str, read_fn: Callable[[Path], Any] = Path.read_bytes) -> Any:
        """Reads a file of the run's folder: what `read_fn(path)` returns, its bytes by default."""
        return read_fn(self._inside(filename))

    def read_all(self, pattern: str, read_fn: Callable[[Path], Any] = Path.read_bytes) -> list[Any]:
        """Reads all files of the run's folder that match a glob pattern, in the order of their names."""
        return [
            read_fn(self._inside(path.relative_to(self.path)))
            for path in sorted(self.path.glob(pattern))
            if path.is_file()
        ]

    def save(self, filename: str, data: bytes | str | Any, write_fn: Callable[[Path, Any], Any] | None = None) -> Path:
        """Writes a file into the run's folder.

        Args:
            filename: where, inside the folder; folders on the way are made.
            data: bytes or text, or anything with a `write_fn`.
            write_fn: `(path, data)`, writes it.

        Returns:
            The file's path.
        """
        path = self._inside(filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        if write_fn is not None:
            write_fn(path, data)
        elif isinstance(data, bytes):
            path.write_bytes(data)
        elif isinstance(data, str):
            path.write_text(data)
        else:
            raise TypeError(
                f"save({filename!r}): data must be bytes or str, or come with a write_fn, but is {type(data).__name__}"
            )
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
