"""Faults of a single request, by number, and what its caller gets, streaming or not."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.faults import answers, clients, connections
from tests.support.faults.outcome import WHOLE
from tests.support.faults.scene import Scene, scene
from tests.support.faults.scripts import START
from tests.support.processes import FakeEngine, fake_engine, free_port, text_of
from tests.support.streams import sse

CONFIG = """
engines:
  engine: {{dialect: vllm, base_url: "{url}"}}
  folding: {{dialect: llamacpp, slots: 256, base_url: "{url}"}}
  spare: {{dialect: vllm, base_url: "{spare}"}}
  refusing: {{dialect: vllm, base_url: "http://127.0.0.1:{closed}"}}
  nowhere: {{dialect: vllm, base_url: "http://nowhere.invalid:1"}}
  hole: {{dialect: vllm, base_url: "http://127.0.0.1:{hole}"}}
models:
  fake-model: &fake {{targets: [{{engine: engine, model: fake-model}}]}}
  impatient: {{<<: *fake, timeouts: &short {{first_token: 0.5, idle: 0.5}}}}
  patient: {{<<: *fake, timeouts: {{first_token: 1.5}}}}
  brief: {{<<: *fake, timeouts: {{total: 0.5}}}}
  folded: &folded {{targets: [{{engine: folding, model: fake-model}}]}}
  "folded, impatient": {{<<: *folded, timeouts: *short}}
  refusing: &refusing {{targets: [{{engine: refusing, model: x}}]}}
  nowhere: {{targets: [{{engine: nowhere, model: x}}]}}
  hole: {{targets: [{{engine: hole, model: x}}], timeouts: {{connect: 0.5}}}}
  "patient, spare": {{<<: *fake, fallbacks: [{{engine: spare, model: spare}}], timeouts: {{first_token: 1.5}}}}
  "spare": {{<<: *fake, fallbacks: &spare [{{engine: spare, model: spare}}]}}
  "impatient, spare": {{<<: *fake, fallbacks: *spare, timeouts: *short}}
  "refusing, spare": {{<<: *refusing, fallbacks: *spare}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1, backoff: 0}}
"""


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no SYN: its backlog is full."""
    with ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        yield hole.getsockname()[1]


@pytest.fixture(scope="module")
def shared(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("faults")
    with fake_engine() as spare, black_hole() as hole:
        file = path / "stack.yaml"
        file.write_text(CONFIG.format(url=engine.url, spare=spare.url, closed=free_port(), hole=hole))
        settings = {
            "STACK_CONFIG": str(file),
            "STACK_HOLD": "1",
            "STACK_LIMIT_CONCURRENT": "1",  # a lease that isn't given back has the next request refused
            "STACK_READ_TIMEOUT": "1",
            "STACK_WRITE_TIMEOUT": "1",
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        with scene(path / "log", engine, spare, **settings) as shared:
            yield shared


def reset_peak(pids: list[int]) -> None:
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pids: list[int]) -> float:
    """The most memory that each had since then, added up, in MB."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in status) / 1024


CASES = {
    f"{it.number} {it.what} · {'streaming' if stream else 'blocking'}": (it, stream)
    for it in (*connections.FAULTS, *answers.FAULTS, *clients.FAULTS)
    for stream in (True, False)
    if (it.streaming if stream else it.blocking) is not None
}


@pytest.mark.parametrize("case", CASES)
def test_fault(shared: Scene, case: str) -> None:
    fault, stream = CASES[case]
    row = fault.streaming if stream else fault.blocking
    assert row is not None
    expected, script = row
    shared.begin()
    workers = shared.gateway.workers()
    reset_peak(workers)
    memory = peak(workers)
    # Only the first engine follows the script: the spare one's model has another name.
    fields = {"model": fault.model, "script_for": {"fake-model": script}} if script else {"model": fault.model}
    for _ in range(fault.times):
        call = shared.ask(stream=stream, caller=fault.caller, expected=expected, **fields)
        call.join(60)
    assert shared.settle() == [expected] * fault.times
    assert not re.search(rb"CUDA|127\.0\.0\.1|nowhere|Errno", call.got)
    if fault.passes is not None:
        assert call.text == fault.passes
    if stream and expected.status == 200 and expected != WHOLE:
        assert text_of(sse(call.text)) == ("one two" if script[:3] == START else "")
    if fault.tries is not None:
        assert len(shared.engine.seen(call.id)) == fault.tries
    line = shared.gateway.lines(call.id)[-2:][0]
    assert fault.by in (None, line.get("engine"))
    assert fault.tokens in (None, line.get("tokens_out"))
    if fault.bounded:
        assert peak(workers) - memory < 100
    assert shared.gateway.workers() == workers
