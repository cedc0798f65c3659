"""End a process group when standard input closes: whoever started this is gone, however it ended.

`python guard.py PGID`, in a session of its own. A server that is killed can leave children behind, and a test run that is killed
its server; neither may keep its gigabytes.
"""

import contextlib
import os
import signal
import sys

if __name__ == "__main__":
    sys.stdin.buffer.read()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
