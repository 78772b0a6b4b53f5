"""Console: keep the process that makes the console's pages, beside the workers.

gunicorn's master forks it, starts it again when it dies, and replaces it when settings are read again. It ends with the
master.
"""

import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from gunicorn.arbiter import Arbiter

from gateway import logs
from gateway.console.process import Server, listen
from gateway.console.views import Views
from gateway.shared_memory import Flag

log = logging.getLogger("stack")

NAME = "stack-console"  # of the process, in `ps` and `top`
# Workers come first. With 19, other programs that keep the cores busy would stop the process for a quarter of a second
# while it holds the lock of memory that it shares with the workers, and they would wait for it.
NICE = 5
FIRST_KILLED = 500  # its oom_score_adj: a page is a smaller loss than a worker's answers
AGAIN = 1.0  # seconds between two starts
AGAIN_FAILED = 60.0  # and after one that was not possible


class ConsoleProcess:
    """Start and end the process. Only the thread of the master that forks the workers may call this."""

    def __init__(self, directory: Path) -> None:
        """`directory` is that of the workers' sockets."""
        self._directory = directory
        self._listener: socket.socket | None = None
        self._pid, self._retired = 0, Flag()
        self._next_try = float("-inf")

    def keep(self, make: Callable[[], Views], unwanted: Iterable[Any]) -> None:
        """Start the process if it does not run. Call this once a second. The process closes the sockets that are
        `unwanted`."""
        if self._runs() or time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + AGAIN
        try:
            if self._listener is None:
                self._listener = listen(self._directory)
            self._retired, parent = Flag(), os.getpid()
            pid = os.fork()
        except OSError as exc:  # among other reasons, the path of the socket may be too long
            log.error("the console's process cannot be started: %s", exc)  # noqa: TRY400  no bug of ours
            self._next_try += AGAIN_FAILED
            return
        if pid == 0:
            _become(self._listener, self._retired, make, unwanted, parent)
        self._pid = pid
        log.info("console", extra={"pid": pid})

    def retire(self) -> None:
        """Have the process end when it has made the pages that it has begun. `keep` starts another one at once."""
        self._retired.set()
        self._pid, self._next_try = 0, float("-inf")

    def end(self) -> None:
        """End the process now."""
        if self._runs():
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def let_go(self) -> None:
        """Close the master's socket in a worker, which is not to keep it open when the master is dead."""
        if self._listener is not None:
            self._listener.close()

    def _runs(self) -> bool:
        if not self._pid:
            return False
        with suppress(ChildProcessError):  # gunicorn has waited for it, as for every child
            if os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                return True
        log.warning("the console's process has ended")
        self._pid = 0
        return False


def _become(
    listener: socket.socket, retired: Flag, make: Callable[[], Views], unwanted: Iterable[Any], parent: int
) -> NoReturn:
    """Be the process. Never returns, because the caller goes on as the master."""
    status = 1
    try:
        with suppress(OSError):  # macOS has neither
            Path("/proc/self/comm").write_text(NAME)
            Path("/proc/self/oom_score_adj").write_text(str(FIRST_KILLED))
        for number in (*Arbiter.SIGNALS, signal.SIGCHLD):  # the master's handlers only note them
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the master ends this process
        os.nice(NICE)
        for each in unwanted:
            each.close()
        gc.freeze()
        Server(listener, retired, make(), parent).run()
        status = 0
    except Exception:
        log.exception("the console's process cannot run")
    finally:
        logs.flush()
        os._exit(status)
