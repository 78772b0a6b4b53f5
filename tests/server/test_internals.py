"""Names and signatures inside of libraries that the gateway relies on and nobody has promised.

After an upgrade, a failure here says which one is no longer what it was, and who reads it.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import fastapi.routing
import prometheus_client.mmap_dict
import prometheus_client.values
import psycopg
import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import Server, ServerState
from uvicorn_worker import UvicornWorker

# What is called or overridden, the parameters it has, and where the gateway does so.
SIGNATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "server/protocol.py makes its cycles by": (
        RequestResponseCycle.__init__,
        """self scope transport flow logger access_logger access_log default_headers message_event expect_100_continue
        keep_alive on_response""",
    ),
    "server/protocol.py overrides": (HttpToolsProtocol.on_headers_complete, "self"),
    "server/protocol.py overrides, of a body": (HttpToolsProtocol.on_body, "self body"),
    "server/protocol.py overrides, at the end of a request": (HttpToolsProtocol.on_message_complete, "self"),
    "server/protocol.py overrides, at the end of a response": (HttpToolsProtocol.on_response_complete, "self"),
    "server/protocol.py overrides, when a worker stops": (HttpToolsProtocol.shutdown, "self"),
    "server/master.py overrides, of a worker's signals": (UvicornWorker.init_signals, "self"),
    "server/master.py overrides, of a worker's run": (UvicornWorker._serve, "self"),
    "server/master.py calls for SIGQUIT": (Server.handle_exit, "self sig frame"),
    "server/master.py overrides, of SIGTERM": (Arbiter.handle_term, "self"),
    "server/master.py overrides, of SIGHUP": (Arbiter.handle_hup, "self"),
    "server/master.py overrides, to see the last step of a reload": (Arbiter.manage_workers, "self"),
    "server/master.py overrides, of the log": (Logger.setup, "self cfg"),
    "server/master.py overrides, of the log's files": (Logger.reopen_files, "self"),
    "server/scrape.py gives each seat its files by": (
        prometheus_client.values.MultiProcessValue,
        "process_identifier",
    ),
    "server/scrape.py overrides, of a value": (
        prometheus_client.values.MultiProcessValue().inc,  # type: ignore[no-untyped-call]
        "self amount",
    ),
    "server/scrape.py writes a value by": (
        prometheus_client.mmap_dict.MmapedDict.write_value,
        "self key value timestamp",
    ),
    "instruments.py overrides, of a histogram": (prometheus_client.Histogram.observe, "self amount exemplar"),
    "store/postgres_store.py bounds the wait for PostgreSQL by": (psycopg.Connection.wait, "self gen interval timeout"),
}


@pytest.mark.parametrize("use", SIGNATURES)
def test_each_internal_function_has_its_known_parameters(use: str) -> None:
    function, expected = SIGNATURES[use]
    assert list(inspect.signature(function).parameters) == expected.split(), f"{use} {function.__qualname__}"


def test_gunicorn_reloads_in_the_order_that_master_relies_on() -> None:
    """Master sets `graceful_timeout` to 0 in `manage_workers`, so that the wait behind it is no wait."""
    source = inspect.getsource(Arbiter.reload)
    steps = ["self.app.reload()", "self.spawn_worker()", "self.manage_workers()", "self.cfg.graceful_timeout"]
    places = [source.find(step) for step in steps]
    assert places == sorted(places), source
    assert places[0] >= 0, source
    assert isinstance(Arbiter.WORKERS, dict)
    assert "SIG_QUEUE" in inspect.getsource(Arbiter)


def test_uvicorns_protocol_and_cycle_have_the_fields_that_ours_read() -> None:
    protocol = inspect.getsource(HttpToolsProtocol)
    for name in ("parser", "url", "headers", "scope", "cycle", "pipeline", "flow", "transport", "server_state", "app"):
        assert re.search(rf"self\.{name}\b", protocol), f"HttpToolsProtocol.{name}"
    cycle = inspect.getsource(RequestResponseCycle.__init__)
    fields = "disconnected response_complete response_started chunked_encoding expected_content_length body more_body"
    for name in fields.split():
        assert f"self.{name}" in cycle, f"RequestResponseCycle.{name}"
    assert STATUS_LINE[200].endswith(b" 200 OK\r\n"), STATUS_LINE[200]
    assert {"read_paused", "write_paused"} <= set(vars(FlowControl(None)))  # type: ignore[arg-type]
    assert {"total_requests", "connections", "tasks", "default_headers"} <= set(vars(ServerState()))


def test_the_other_internals_that_the_server_uses_still_exist() -> None:
    assert issubclass(psycopg.errors._WaitTimeout, Exception), "store/postgres_store.py"
    assert isinstance(prometheus_client.values.MutexValue, type), "server/scrape.py"
    app = fastapi.FastAPI()

    @app.get("/")
    def page(of: str) -> str:
        return of

    route = app.routes[-1]
    assert isinstance(route, fastapi.routing.APIRoute)
    assert [it.alias for it in route.dependant.query_params] == ["of"], "api/admin/routes.py"
