"""A clock that can be set: runs a module with a time of day that is off by the seconds a file says, at any moment.

    python tests/support/fakes/clock.py FILE … MODULE

It is no module of the tests, which forget the environment that the gateway is started with.

Everything Python asks for the time of day is told so; the monotonic clock goes on as it does when a real one is set.
"""

import mmap
import runpy
import sys
import time
from pathlib import Path

SIZE = 8  # bytes in the file: a number in decimal
real, real_ns = time.time, time.time_ns


def main() -> None:
    with Path(sys.argv[1]).open("rb") as file:
        off = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    time.time = lambda: real() + int(off[:])
    time.time_ns = lambda: real_ns() + int(off[:]) * 1_000_000_000
    module = sys.argv[-1]
    sys.argv, sys.path[0] = [module], ""
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
