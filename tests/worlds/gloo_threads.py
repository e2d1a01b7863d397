"""Which of gloo's threads a rank has, and whether they have ended when it ends: one that outlives the interpreter may
abort it.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_ENDED_S = 10  # a thread that has been joined is still listed for a moment


def running(name: str = "gloo") -> list[int]:
    """Ids of this process's threads that have `name` in theirs."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if name in (task / "comm").read_text():
                found.append(int(task.name))
    return found


def have_ended() -> None:
    """To be registered with atexit before all others, so that it is asked last. Ends the process with code 3 if not."""
    deadline_s = time.monotonic() + _ENDED_S
    while running():
        if time.monotonic() > deadline_s:
            print(f"{len(running())} of gloo's threads are left", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(0.01)
