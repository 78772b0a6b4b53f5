"""A busy engine is shared fairly: its slots, the queue for them, and the rejections. Two workers."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command import Command
from tests.support.crowd import KEYS, ask, obeyed, own_rate, settings
from tests.support.keys import ADMIN
from tests.support.kills import queue_kills
from tests.support.processes import (
    AUTH,
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
SECOND = "sk-second-0123456789abcdef"
CONFIG = """
engines:
  one: {{dialect: vllm, slots: 1, base_url: "{url}"}}
  spare: {{dialect: vllm, slots: 1, base_url: "{url}"}}
  patient: {{dialect: vllm, slots: 1, base_url: "{url}"}}
  many: {{dialect: vllm, slots: 8, base_url: "{url}"}}
  told: {{dialect: llamacpp, base_url: "{told}"}}
  broken: {{dialect: vllm, base_url: "{url}"}}
models:
  one: {{targets: [{{engine: one, model: fake-model}}]}}
  patient: {{targets: [{{engine: patient, model: fake-model}}]}}
  fake-model: {{targets: [{{engine: many, model: fake-model}}]}}
  told: {{targets: [{{engine: told, model: fake-model}}]}}
  pair: {{targets: [{{engine: one, model: fake-model}}, {{engine: spare, model: fake-model}}]}}
  resumed: {{targets: [{{engine: broken, model: fake-model}}], fallbacks: [{{engine: one, model: fake-model}}]}}
default_model: one
"""


class Asked(threading.Thread):
    """A request that runs until its gate is opened, or until its client disconnects."""

    def __init__(self, at: GatewayProcess, mark: str, key: str = KEY, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.text = ""
        self.answer: httpx.Response | None = None
        self._at, self._leave = at, threading.Event()
        self._headers = {"authorization": f"Bearer {key}", "x-request-id": mark}
        script = [["role"], ["gate", mark], ["token", "x"], ["finish", "stop"], ["usage"], ["done"], ["end"]]
        self._body = {"messages": MESSAGES, "user": mark, "stream": True, "script": script, **fields}
        self.start()

    def run(self) -> None:
        with (
            httpx.Client(base_url=self._at.url, headers=self._headers, timeout=60) as client,
            client.stream("POST", CHAT, json=self._body) as answer,
        ):
            self.answer = answer
            with suppress(httpx.RemoteProtocolError):  # a stream that failed is cut
                for piece in answer.iter_text():
                    self.text += piece
                    if self._leave.is_set():
                        break

    def leave(self) -> None:
        self._leave.set()

    def wait(self) -> httpx.Response:
        self.join(30)
        assert self.answer is not None
        return self.answer


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def told() -> Iterator[FakeEngine]:
    """An engine that reports its slots."""
    with fake_engine(dialect="llamacpp") as engine:
        engine.set(slots=3)
        yield engine


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, engine: FakeEngine, told: FakeEngine) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("admission")
    (directory / "stack.yaml").write_text(CONFIG.format(url=engine.url, told=told.url))
    return {
        "STACK_CONFIG": str(directory / "stack.yaml"),
        "STACK_DATA_DIR": str(directory / "data"),
        "STACK_METRICS_BIND": f"127.0.0.1:{free_port()}",
        "STACK_HOLD": "0.3",
        "STACK_RESUME": "1",
        "STACK_QUEUE": "4",
        "STACK_QUEUE_TIMEOUT": "12",
        "STACK_API_KEYS": ",".join([KEY, SECOND, *KEYS]),
    }


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine, options: dict[str, str]) -> Iterator[GatewayProcess]:
    with running_gateway(Path(options["STACK_DATA_DIR"]).parent / "log", engine.url, **options) as gateway:
        port = int(options["STACK_METRICS_BIND"].rpartition(":")[2])
        wait_for(lambda: scrape(port).total("stack_upstream_workers", upstream="one") == 2)
        yield gateway


def depth(options: dict[str, str], name: str = "stack_queue_depth", **labels: str) -> float:
    port = int(options["STACK_METRICS_BIND"].rpartition(":")[2])
    return scrape(port).total(name, **({"upstream": "one"} | labels))


def positions(options: dict[str, str]) -> dict[str, int | None]:
    return {it["request_id"]: it["position"] for it in Command(**options).json("top", "--once")}


@contextmanager
def busy(at: GatewayProcess, engine: FakeEngine, mark: str, **fields: Any) -> Iterator[Asked]:
    """Keep the one slot in use until the end of the block."""
    first = Asked(at, mark, **fields)
    engine.wait_seen(mark, "running")
    try:
        yield first
    finally:
        engine.release(mark)
        first.wait()


def test_the_wait_for_a_slot_shows_everywhere(
    engine: FakeEngine, gateway: GatewayProcess, options: dict[str, str]
) -> None:
    with busy(gateway, engine, "first"):
        queued = [Asked(gateway, "second"), Asked(gateway, "third", key=SECOND)]
        wait_for(lambda: all(": ping" in it.text for it in queued))
        wait_for(lambda: depth(options) == 2)
        assert depth(options, "stack_slots_used") == depth(options, "stack_slots") == 1
        ranks = wait_for(lambda: it if len(it := positions(options)) == 3 else {})
        assert ranks.pop("first") is None
        assert set(ranks.values()) == {1, 2}
        assert not engine.seen("second")
        assert not engine.seen("third")
        engine.release("second")
        engine.release("third")
    for it in queued:
        answer = it.wait()
        assert text_of(events(it.text)) == "x"
        line = gateway.lines(it.mark)[-2]
        assert 250 <= int(answer.headers["x-stack-queue-ms"]) < line["queued_ms"], "when the head went out with a ping"
        *_, comment = it.text.partition("data: ")[0].splitlines()  # the whole wait, before the first event
        assert comment == f": queued {line['queued_ms']} ms"
    wait_for(lambda: depth(options) == depth(options, "stack_slots_used") == 0)
    assert depth(options, "stack_queue_wait_seconds_count") == 2
    rows = Rows(options)
    waits = wait_for(lambda: {r["request_id"]: r["queued_ms"] for r in rows.all()} if len(rows.all()) >= 3 else {})
    rows.close()
    assert waits == {"first": 0} | {it.mark: gateway.lines(it.mark)[-2]["queued_ms"] for it in queued}
    assert min(waits["second"], waits["third"]) >= 300


def test_a_client_that_leaves_frees_its_place(
    engine: FakeEngine, gateway: GatewayProcess, options: dict[str, str]
) -> None:
    with busy(gateway, engine, "holds"):
        leaving = Asked(gateway, "leaves")
        wait_for(lambda: ": ping" in leaving.text)
        leaving.leave()
        wait_for(lambda: depth(options) == 0)
        assert [line["status"] for line in gateway.lines("leaves")] == [499], "no engine was asked"
    assert not engine.seen("leaves")


def test_each_reason_for_a_rejection_has_its_status_and_code(
    engine: FakeEngine, gateway: GatewayProcess, options: dict[str, str]
) -> None:
    """Of four places a key may have as many as it leaves free. Beyond that it gets a 429, and a 503 if all
    are taken."""
    with busy(gateway, engine, "taken"):
        waiting = [Asked(gateway, f"waiting-{number}", key=KEYS[number // 2]) for number in range(2)]
        wait_for(lambda: depth(options) == 2)
        with gateway.client() as http:
            http.headers["authorization"] = f"Bearer {KEYS[0]}"
            refused = http.post(CHAT, json={"messages": MESSAGES})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_share_full")
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) == -(-int(refused.headers["retry-after-ms"]) // 1000)
            waiting += [Asked(gateway, f"waiting-{number}", key=KEYS[number]) for number in (2, 3)]
            wait_for(lambda: depth(options) == 4)
            http.headers["authorization"] = f"Bearer {KEYS[4]}"
            refused = http.post(CHAT, json={"messages": MESSAGES})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            embedding = http.post("/v1/embeddings", json={"input": "x", "model": "one"})
            assert embedding.status_code == 503, "they take slots too"
        for it in waiting:
            engine.release(it.mark)
    assert {it.wait().status_code for it in waiting} == {200}
    found = {reason: depth(options, "stack_queue_rejections_total", reason=reason) for reason in ("share", "full")}
    assert found == {"share": 1, "full": 2}


@pytest.fixture
def impatient(engine: FakeEngine, tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway before an engine with one slot, with a queue in which nobody waits for long."""
    with running_gateway(tmp_path / "log", engine.url, LLM_SLOTS="1", STACK_QUEUE_TIMEOUT="2") as gateway:
        yield gateway


def test_a_header_shortens_the_wait_and_never_lengthens_it(engine: FakeEngine, impatient: GatewayProcess) -> None:
    body = {"messages": MESSAGES}
    with busy(impatient, engine, "long"), impatient.client() as http:
        refused = http.post(CHAT, json=body, headers={"x-stack-queue-timeout": "0.3"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_timeout")
        assert 0.3 <= refused.elapsed.total_seconds() < 0.3 * 5, "nobody knows yet how fast the engine is"
        assert int(refused.headers["retry-after"]) >= 1
        longer = http.post(CHAT, json=body, headers={"x-stack-queue-timeout": "1000"})
        assert (longer.status_code, longer.json()["error"]["code"]) == (503, "queue_timeout")
        assert longer.elapsed.total_seconds() < 2 * 5
        wrong = http.post(CHAT, json=body, headers={"x-stack-queue-timeout": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-stack-queue-timeout")
    assert httpx.post(impatient.url + CHAT, json=body, headers=AUTH).headers["x-stack-queue-ms"] == "0"


def test_rejections_of_one_key_do_not_lengthen_another_keys_retry_after(
    engine: FakeEngine, gateway: GatewayProcess
) -> None:
    def refused(key: str, number: int) -> int:
        body = {"messages": MESSAGES, "model": "patient", "user": f"{number}"}
        answer = http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}", "x-stack-queue-timeout": "0"})
        assert answer.status_code == 503
        return int(answer.headers["retry-after"])

    with busy(gateway, engine, "patient", model="patient"), gateway.client() as http:
        own = [refused(KEYS[5], number) for number in range(150)]
        assert own[-1] > 100, "a second for each, as nobody knows how fast this engine is"
        assert refused(KEYS[6], 0) <= 10


def test_of_equal_engines_the_one_with_a_free_slot_is_asked(engine: FakeEngine, gateway: GatewayProcess) -> None:
    with busy(gateway, engine, "on-one"):
        for _ in range(8):
            with gateway.client() as http:
                answer = http.post(CHAT, json={"messages": MESSAGES, "model": "pair"})
            assert gateway.lines(answer.headers["x-request-id"])[-2]["engine"] == "spare"


def test_a_broken_answer_gets_the_next_slot_before_all_waiting_requests(
    engine: FakeEngine, gateway: GatewayProcess
) -> None:
    lost = [["role"], ["token", "x"], ["gate", "lost"], ["close"]]
    with busy(gateway, engine, "before"):
        waits = Asked(gateway, "waits")
        broken = Asked(gateway, "breaks", model="resumed", script=lost)
        wait_for(lambda: ": ping" in waits.text and '"x"' in broken.text)
        engine.release("lost")
        wait_for(lambda: any(it["msg"] == "resume" for it in gateway.log() if it.get("request_id") == "breaks"))
        engine.release("waits")
    broken.wait()
    waits.wait()
    order = [it["body"]["user"] for it in engine.seen() if it["body"].get("user") in ("waits", "breaks")]
    assert order == ["breaks", "breaks", "waits"]


def test_an_engines_reported_number_of_slots_is_used(
    told: FakeEngine, gateway: GatewayProcess, options: dict[str, str]
) -> None:
    wait_for(lambda: depth(options, "stack_slots", upstream="told") == 3)
    running = [Asked(gateway, f"told-{number}", model="told") for number in range(4)]
    wait_for(lambda: told.running() == 3)
    wait_for(lambda: depth(options, upstream="told") == 1)
    for it in running:
        told.release(it.mark)
    assert {it.wait().status_code for it in running} == {200}


@pytest.fixture(scope="module")
def hot(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway that knows its engine's pace."""
    options = settings(STACK_QUEUE_TIMEOUT="2", STACK_ADMIN_KEYS=ADMIN)
    with running_gateway(tmp_path_factory.mktemp("hot") / "log", engine.url, **options) as gateway:
        asyncio.run(own_rate(gateway.port, 1))
        yield gateway


@pytest.fixture(scope="module")
def single(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GatewayProcess, int]]:
    """A gateway before an engine with one slot, and the port of its metrics."""
    metrics = free_port()
    options = settings(LLM_SLOTS="1", STACK_ADMIN_KEYS=ADMIN, STACK_METRICS_BIND=f"127.0.0.1:{metrics}")
    with running_gateway(tmp_path_factory.mktemp("single") / "log", engine.url, **options) as gateway:
        yield gateway, metrics


def order_of_service(single: tuple[GatewayProcess, int], engine: FakeEngine, *waves: tuple[str, str, int]) -> list[str]:
    """Let requests wait for the one slot, in waves of (name, key, number of requests), each behind the one before.
    Return their names in the order in which they got the slot."""
    gateway, metrics = single
    mark = "order of " + " and ".join(name for name, _, _ in waves)

    async def served() -> list[str]:
        waiting: list[asyncio.Task[Any]] = []
        for name, key, count in waves:
            waiting += [asyncio.create_task(ask(gateway.port, key, 0, user=name)) for _ in range(count)]
            while await asyncio.to_thread(lambda: scrape(metrics).total("stack_queue_depth")) < len(waiting):
                assert not any(it.done() for it in waiting)
        engine.release(mark)
        assert {(await it).status for it in waiting} == {200}
        names = {name for name, _, _ in waves}
        return [user for it in engine.seen() if (user := it["body"].get("user")) in names]

    with busy(gateway, engine, mark, key=KEYS[0]):
        return asyncio.run(served())


def test_a_key_that_floods_waits_behind_itself(single: tuple[GatewayProcess, int], engine: FakeEngine) -> None:
    order = order_of_service(single, engine, ("flood", KEYS[1], 30), ("modest", KEYS[2], 4))
    served = [number for number, name in enumerate(order) if name == "modest"]
    assert len(served) == 4
    assert all(number <= 2 * turn + 1 for turn, number in enumerate(served)), order


def test_turns_go_by_the_keys_weights(single: tuple[GatewayProcess, int], engine: FakeEngine) -> None:
    keys = {}
    with httpx.Client(base_url=single[0].url, headers={"authorization": f"Bearer {ADMIN}"}) as admin:
        for weight in (1, 2, 4):
            made = admin.post("/admin/keys", json={"name": f"w{weight}", "priority": weight}).raise_for_status()
            keys[f"w{weight}"] = made.json()["secret"]
    order = order_of_service(single, engine, *((name, key, 14) for name, key in keys.items()))
    first = Counter(order[:14])
    assert all(abs(first[f"w{weight}"] - 2 * weight) <= 1 for weight in (1, 2, 4)), first
    assert Counter(order) == dict.fromkeys(keys, 14)


def test_a_client_that_obeys_retry_after_is_admitted(hot: GatewayProcess) -> None:
    returned, admitted = asyncio.run(obeyed(hot.port, KEYS, 60, enough=40))
    assert returned >= 40
    assert admitted >= 0.9 * returned


def test_slots_and_places_of_killed_workers_come_back(tmp_path: Path) -> None:
    _, failures = queue_kills(tmp_path, 6, seed=1)
    assert not failures
