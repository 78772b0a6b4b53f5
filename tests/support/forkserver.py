"""Forkserver: start the gateway and the `stack` command as forks of a process that has already imported their modules.

Otherwise Python imports 700 modules for each of them, which takes a second of CPU, hundreds of times in a run. A fork
has its own arguments, environment, directory and files, like any process. Settings that Python reads when it starts
(PYTHON…, LC_…) come too late for a fork, so a process with other values of these is started in the ordinary way.
"""

import atexit
import io
import json
import os
import random
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_TREE = Path(__file__).parents[2]
_ONE_AT_A_TIME = threading.Lock()
_PROGRAMS = ("gateway", "gateway.cli")
_AT_START = ("PYTHON", "LC_", "LANG", "TZ", "LD_", "MALLOC_")


def popen(args: Sequence[str], *, env: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Do what subprocess.Popen does, with the forkserver if possible."""
    ours = list(args[:2]) == [sys.executable, "-m"] and args[2] in _PROGRAMS and options.get("cwd") == _TREE
    if ours and _early(env) == _early(os.environ):
        return _Forked(args, env=env, **options)
    return subprocess.Popen(args, env=env, **options)


def run(args: Sequence[str], *, stdin: str | bytes, **options: Any) -> "subprocess.CompletedProcess[Any]":
    """Run a program to its end, for at most a minute. Its output is text, or bytes if `stdin` is bytes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with popen(args, text=isinstance(stdin, str), **pipes, **options) as process:
        try:
            out, err = process.communicate(stdin, timeout=60)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def _early(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_AT_START)}


class _Forked(subprocess.Popen[Any]):
    """A child of the forkserver, which reports its exit status. The methods replace those by which CPython's Popen asks
    the kernel; their signatures are the same from 3.11 to 3.14."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        cwd, env, ends = more[4], more[5], more[9:15]
        self._status, far = socket.socketpair()
        message = json.dumps([list(args[2:]), str(cwd or Path.cwd()), dict(env)]).encode()
        theirs = [end if end != -1 else standard for standard, end in enumerate((ends[0], ends[3], ends[5]))]
        with far, _ONE_AT_A_TIME:
            server = _server()
            socket.send_fds(server, [struct.pack("I", len(message))], [far.fileno(), *theirs])
            server.sendall(message)
        self.pid = struct.unpack("i", self._status.recv(4, socket.MSG_WAITALL))[0]
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._status.setblocking(not wait_flags & os.WNOHANG)
        try:
            told = self._status.recv(4, socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, struct.unpack("i", told)[0] if told else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@cache
def _server() -> socket.socket:
    """Return the forkserver of this process, which ends with it."""
    near, far = socket.socketpair()
    command = [sys.executable, "-m", "tests.support.forkserver", str(far.fileno())]
    process = subprocess.Popen(command, pass_fds=[far.fileno()], stdin=subprocess.DEVNULL)
    far.close()

    def end() -> None:
        near.close()
        process.wait()

    atexit.register(end)
    return near


# -- the server -------------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    running: dict[int, socket.socket] = {}
    wakes, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted test run ends it by closing the socket
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(wakes, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wakes in ready:
                wakes.recv(4096)
                _tell(running)
            if requests in ready:
                head, files, _, _ = socket.recv_fds(requests, 4, 4)
                if not head:
                    return
                message = requests.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL)
                status = socket.socket(fileno=files[0])
                sys.stdout.flush()
                if (pid := os.fork()) == 0:
                    selector.close()
                    words, cwd, env = json.loads(message)
                    _become(words, cwd, env, files[1:])
                for file in files[1:]:
                    os.close(file)
                running[pid] = status
                status.sendall(struct.pack("i", pid))


def _tell(running: dict[int, socket.socket]) -> None:
    """Report the children that have ended."""
    while running:
        with suppress(ChildProcessError):
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with running.pop(pid) as status, suppress(OSError):
                status.sendall(struct.pack("i", ended))


def _become(words: list[str], cwd: str, env: dict[str, str], files: list[int]) -> None:
    """Run the program in the child, to its end."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for standard, file in enumerate(files):
            os.dup2(file, standard)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        random.seed()
        sys.argv = [f"{words[0]}/__main__.py", *words[1:]]
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")  # noqa: SIM115
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                open(fd, "wb", closefd=False),  # noqa: SIM115
                encoding="utf-8",
                errors=errors,
                line_buffering=fd == 2 or os.isatty(fd),
            )
            for fd, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        status = _main(words[0])
    finally:
        os._exit(status)


def _main(program: str) -> int:
    """Run the program, and return the exit status as CPython does: of a SystemExit, or 1 after a traceback, and then
    atexit."""
    try:
        {"gateway": serve, "gateway.cli": stack}[program]()
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if exc.code is not None and not isinstance(exc.code, int):
            print(exc.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    else:
        status = 0
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _warm_up() -> None:
    """Do once what every gateway does when it starts, because that imports modules and fills caches."""
    with tempfile.TemporaryDirectory() as data:
        settings = Settings(
            stack_api_keys="sk-test-0123456789abcdef",
            stack_admin_keys="sk-admin-0123456789abcdef",
            stack_data_dir=Path(data),
        )
        prepare(settings)
        server = Server(settings, from_settings(settings))
        server.load()
    tempfile.tempdir = None  # a process that is forked later has a TMPDIR of its own


if __name__ == "__main__":
    import gc

    from gateway.cli.main import main as stack
    from gateway.config import from_settings
    from gateway.server.master import Server
    from gateway.server.master import main as serve
    from gateway.settings import Settings
    from gateway.store.store import prepare

    _warm_up()
    gc.collect()
    gc.freeze()
    atexit._clear()
    _serve(socket.socket(fileno=int(sys.argv[1])))
