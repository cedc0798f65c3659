"""Run a script, and end the process when the process that started it is gone.

Usage: `python -I -u leash.py SCRIPT [ARGUMENT ...]`. Started by a companion's own interpreter, so only the standard library
may be imported. A supervisor that dies by SIGKILL cannot stop its children; without a leash an engine would keep its port and
its memory for ever. The parent's id is watched, rather than `PR_SET_PDEATHSIG` set, because that signal is sent when the
*thread* that forked ends, and a supervisor may well start processes from a pool of threads.
"""

import os
import runpy
import signal
import sys
import threading
import time

CHECK_SECONDS = 0.5
GRACE_SECONDS = 5.0


def end_with(parent: int) -> None:
    """Wait until `parent` is no longer this process's parent, then ask for the end, then insist."""
    while os.getppid() == parent:
        time.sleep(CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), name="leash", daemon=True).start()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
