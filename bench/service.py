"""A service under test: started on its own core, with its output read, its CPU time read from /proc, and always
stopped."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from bench.chat import MODEL

KEY = "bench-key-0123456789abcdef"
READY_S, STOP_S = 120, 5  # seconds until the service answers, and between SIGTERM and SIGKILL

_ROOT = Path(__file__).parent.parent
_NGINX = """
daemon off; worker_processes 1; pid nginx.pid; events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    location / {{ proxy_pass http://engine; }}
  }}
}}
"""


class BenchError(Exception):
    """Say that the run is invalid. The message gives the reason."""


class Service:
    """A running process with its descendants (one session), its port on 127.0.0.1, and its output, which is read and
    counted."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes], settle_s: float) -> None:
        self.name, self.port, self.process = name, port, process
        self.settle_s = settle_s  # seconds after a load, for the work that follows its answers
        self.log_lines, self._last_output = 0, b""
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def cpu_s(self) -> float:
        """User and system time so far, in seconds, of every process of the service and of those it has reaped."""
        return sum(int(field) for stat in self._stats() for field in stat[11:15]) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Resident memory of all its processes in MB (10^6 bytes); a page that two processes share counts twice."""
        return sum(int(stat[21]) for stat in self._stats()) * os.sysconf("SC_PAGESIZE") / 1e6

    def pin(self, core: int) -> None:
        """Move every thread of the first process to this core."""
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})

    def wait_until_ready(self, path: str) -> None:
        """Return when GET `path` is answered with 200. Raises BenchError with the service's last output."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", path)
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return connection.close()
            time.sleep(0.1)
        self._reader.join(0.2)
        code = self.process.poll()
        state = f"did not answer GET {path} within {READY_S} s" if code is None else f"ended with code {code}"
        raise BenchError(f"{self.name} {state}:\n{self._last_output.decode(errors='replace')}")

    def _stats(self) -> Iterator[list[str]]:
        """The fields of /proc/PID/stat from the third on (see proc(5)) of each process of the session."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                stat = path.read_text().rpartition(")")[2].split()
                if int(stat[3]) == self.process.pid:
                    yield stat

    def _drain(self) -> None:
        assert self.process.stdout
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            self.log_lines += data.count(b"\n")
            self._last_output = (self._last_output + data)[-2000:]


def mock(core: int) -> AbstractContextManager[Service]:
    """The engine alone."""
    port = free_port()
    return _running("direct", port, [sys.executable, "-m", "bench.mock", str(port)], core, "/health")


def nginx(core: int, engine: int, scratch: Path) -> AbstractContextManager[Service]:
    """nginx as a plain reverse proxy: one worker, no log, no buffering, kept-alive connections on both sides."""
    port = free_port()
    (scratch / "nginx.conf").write_text(_NGINX.format(port=port, engine=engine))
    return _running("nginx", port, ["nginx", "-p", str(scratch), "-c", "nginx.conf", "-e", "stderr"], core, "/health")


def gateway(
    core: int, engine: int, scratch: Path, module: str = "gateway", name: str = "", **more: str
) -> AbstractContextManager[Service]:
    """The gateway as it is deployed, with logs, usage and a limit of every kind, and one worker. `module` starts it,
    and `more` are settings."""
    port = free_port()
    settings = {"STACK_BIND": f"127.0.0.1:{port}", "STACK_WORKERS": "1", "STACK_API_KEYS": KEY}
    settings |= {"LLM_BACKEND": "vllm", "LLM_BASE_URL": f"http://127.0.0.1:{engine}/v1", "LLM_MODEL": MODEL}
    settings |= {"STACK_DATA_DIR": str(scratch / "data"), "STACK_DRAIN_DELAY": "0"}  # no drain delay, to stop sooner
    limits = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month")
    settings |= {f"STACK_LIMIT_{limit.upper()}": str(10**10) for limit in limits}
    return _running(
        name or module, port, [sys.executable, "-m", module], core, "/livez", 1.2, **settings | more
    )  # usage goes to the store once a second


@contextmanager
def _running(
    name: str, port: int, command: list[str], core: int, ready: str, settle_s: float = 0.1, **settings: str
) -> Iterator[Service]:
    """Run `command` from the repository's root, pinned; yield when it is ready, stop it whatever happens."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("STACK_", "LLM_", "OTEL_", "GUNICORN_"))
    }
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # inherited, so that no thread of the service ever runs elsewhere
    process = subprocess.Popen(
        command, cwd=_ROOT, env=env | settings, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        os.sched_setaffinity(0, ours)
        service = Service(name, port, process, settle_s)
        service.wait_until_ready(ready)
        yield service
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
