"""Processes that need not import what is slow: forks of one that has imported it, and has done nothing else."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from tests.helpers import ROOT

SERVER = """
import json, os, sys, traceback, warnings

{imports}

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            for name, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            exec(compile(asked["source"], "script.py", "exec"), {{"__name__": "__main__"}})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """What came of a script."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Runs scripts in processes of their own, which begin where all imports are done.

    Args:
        imports: statements.
        env: variables for the imports; one that is None is unset.
    """

    def __init__(self, imports, env):
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER.format(imports=imports)],
            env=self._environment(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _environment(env):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        return {name: value for name, value in environment.items() if value is not None}

    def run(self, source, folder, *, env):
        """Runs one script, in a folder, where it may fail; a variable that is None is unset."""
        asked = {"source": source, "folder": str(folder), "environment": self._environment(env)}
        outputs = {name: folder.parent / f"{folder.name}.{name}" for name in ("stdout", "stderr")}
        paths = {name: str(path) for name, path in outputs.items()}
        self._server.stdin.write(json.dumps(asked | paths) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Done(status, *(path.read_text() for path in outputs.values()))

    def end(self):
        """Ends the process that forks."""
        self._server.communicate()
