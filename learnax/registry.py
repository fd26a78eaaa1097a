"""Where runs live on disk: `<base path>/<project>/<run id>`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from learnax.run import Run
from learnax.utils.names import expanded, folder_name

PATH_VARIABLE = "TRAINAX_REGISTRY_PATH"


class Registry:
    """The runs of one project.

    Args:
        project: the project's name, in wandb too, and its folder's.
        base_path: the folder of all projects; by default what `TRAINAX_REGISTRY_PATH` says. `~` and variables are
            put in, and a relative path is one of the folder that the process is in now.
        entity: the wandb entity; None takes wandb's own default.

    Raises:
        ValueError: neither `base_path` nor the variable is set, or a name that cannot be a folder's.
    """

    def __init__(self, project: str, base_path: str | os.PathLike[str] | None = None, entity: str | None = None):
        self.project = folder_name(project, "a registry's project", nested=True)
        base = os.environ.get(PATH_VARIABLE) if base_path is None else base_path
        if not base:
            raise ValueError(
                f"registry {project!r}: no folder to keep runs in; set the environment variable {PATH_VARIABLE}, "
                "or give Registry a base_path"
            )
        self.base_path = expanded(base, PATH_VARIABLE if base_path is None else "base_path")
        self.entity = entity

    @property
    def path(self) -> Path:
        """The project's folder."""
        return self.base_path / self.project

    def new_run(self, config: Any = None) -> Run:
        """Starts a run, with a wandb session; see `Run.new`."""
        return Run.new(self.project, self.path, config, self.entity)

    def restore_run(self, id: str, read_only: bool = False) -> Run:
        """A run there is: with its wandb session to go on with, or `read_only` without.

        Raises:
            FileNotFoundError: there is no such run.
        """
        if read_only:
            return Run(id, Run.folder(id, self.path))
        return Run.restore(id, self.path, self.project, self.entity)

    def fetch_run(self, id: str) -> Run:
        """A run there is, to be read only."""
        return self.restore_run(id, read_only=True)

    def checkpoints(self, run_id: str) -> Path:
        """Where the checkpoints of a run are.

        Raises:
            ValueError: an id that cannot be a folder's name.
        """
        return self.path / folder_name(run_id, "a run's id") / "checkpoints"
