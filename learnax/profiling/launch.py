"""What stands between py-spy and the program: it starts the program when py-spy is ready, and tells how that ended.

python -I -S launch.py WAIT,TELL,OUT,ERR PROGRAM [ARGS ...]

The four are descriptors: when there is something to read, the program is started, with its output as it was before
py-spy; its process id and then its exit status are told, a line each. It imports next to nothing, for not to be seen.
"""

import os
import sys

IGNORED = (13, 25)
"""SIGPIPE and SIGXFSZ, which this Python ignores, and the program would, too. `signal` would take long to import."""


def main() -> None:
    """Waits, starts, tells."""
    wait, tell, out, err = descriptors = [int(text) for text in sys.argv[1].split(",")]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not os.read(wait, 1):  # nobody is there any more
        return
    program = os.posix_spawn(
        sys.argv[2],
        sys.argv[2:],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, err, 2)],
        setsigdef=IGNORED,
    )
    os.write(tell, b"%d\n" % program)
    _, status = os.waitpid(program, 0)
    os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
