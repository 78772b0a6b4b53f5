"""Limits through the front door, over four workers, in either database; over two gateways with PostgreSQL."""

import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest

from tests.support.command import Command
from tests.support.containers import Postgres, build, container, docker, removing
from tests.support.keys import ADMIN, admin
from tests.support.processes import (
    KEY,
    MESSAGES,
    NO_TLS,
    ROOT,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    running_gateway,
    wait_for,
)
from tests.support.soak import Case, Client

CHAT = "/v1/chat/completions"
SETTINGS = {"STACK_ADMIN_KEYS": ADMIN, "STACK_WORKERS": "4", "STACK_CORS_ORIGINS": "https://chat.example"}


@dataclass
class Replica:
    """A gateway in a container of its own."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            return httpx.get(self.url + "/livez", verify=NO_TLS).status_code == 200
        except httpx.TransportError:
            return False


Gateway = GatewayProcess | Replica


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    """One of our own: how many it answers at a time is counted."""
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By how many seconds the gateway's time of day is off: tests/support/fakes/clock.py."""
    file = tmp_path_factory.mktemp("clock") / "clock"
    file.write_text(f"{0:8}")
    return file


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str], clock: Path
) -> Iterator[GatewayProcess]:
    under = (sys.executable, "tests/support/fakes/clock.py", str(clock))
    log = tmp_path_factory.mktemp("gateway") / "log"
    with running_gateway(log, engine.url, under=under, **SETTINGS, **lasting_settings) as gateway:
        yield gateway


def make_key(gateway: Gateway, **limits: int) -> tuple[str, str]:
    """Its id and its secret."""
    with admin(gateway) as client:
        made = client.post("/admin/keys", json={"name": "limited", "limits": limits}).raise_for_status().json()
    return made["key"]["id"], made["secret"]


def client(gateway: Gateway, key: str) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}, timeout=60, verify=NO_TLS)


def ask(gateway: Gateway, key: str, path: str = CHAT, **fields: Any) -> httpx.Response:
    with client(gateway, key) as http:
        return http.post(path, json={"messages": MESSAGES, **fields})


def flood(gateways: Sequence[Gateway], key: str, count: int, **fields: Any) -> tuple[Counter[int], float]:
    """So many requests over a hundred connections, spread over the gateways; how many got which status, and the seconds
    it took."""
    case, left_to_send = Case(1, 200, "finished", fields), iter(range(count))

    async def caller(number: int) -> list[int]:
        http = Client(gateways[number % len(gateways)].port, key)
        try:
            return [(await http.ask(case, f"flood-{it}"))[0] for it in left_to_send]
        finally:
            await http.close()

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(caller(number) for number in range(100)))

    began = time.monotonic()
    statuses = asyncio.run(all_of_them())
    return Counter(it for one in statuses for it in one), time.monotonic() - began


def at_once(gateways: Sequence[Gateway], key: str, count: int, engine: FakeEngine) -> Counter[int]:
    """So many requests at the same time: who is let in is held until the others know. How many got which status."""
    case = Case(1, 200, "finished", {"script": [["gate", key], ["json", [200, {"choices": []}]]]})
    clients = [Client(gateways[number % len(gateways)].port, key) for number in range(count)]

    async def all_of_them() -> list[tuple[int, bytes]]:
        asked = [asyncio.create_task(it.ask(case, f"at-once-{number}")) for number, it in enumerate(clients)]
        async with asyncio.timeout(60):
            while sum(it.done() for it in asked) + engine.running() < count:  # noqa: ASYNC110  the engine is elsewhere
                await asyncio.sleep(0.05)
            engine.release(key)
            answers = await asyncio.gather(*asked)
        for it in clients:
            await it.close()
        return answers

    return Counter(status for status, _ in asyncio.run(all_of_them()))


def left(answer: httpx.Response, what: str) -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{what}"])


def test_a_thousand_requests_at_once_get_the_hundred_of_the_limit(gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, requests_per_minute=100)
    statuses, seconds = flood([gateway], key, 1000)
    assert set(statuses) == {200, 429}
    assert 100 <= statuses[200] <= 100 + seconds * 100 / 60


def test_the_engine_never_sees_more_at_a_time_than_the_key_may(engine: FakeEngine, gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, concurrent=5)
    script = [["pause", 1], ["json", [200, {"choices": []}]]]
    engine.peak()
    statuses, _ = flood([gateway], key, 300, script=script)
    assert engine.peak() == 5
    assert statuses[200] >= 5
    assert set(statuses) == {200, 429}
    assert ask(gateway, key).status_code == 200


def test_answers_have_the_rate_limit_headers(gateway: GatewayProcess) -> None:
    key_id, key = make_key(gateway, requests_per_minute=10, tokens_per_minute=600)
    answer = ask(gateway, key)
    assert answer.headers["x-ratelimit-limit-requests"] == "10"
    assert answer.headers["x-ratelimit-limit-tokens"] == "600"
    assert left(answer, "requests") == 9
    assert answer.headers["x-ratelimit-reset-requests"].startswith(("5.9", "6s"))
    assert 585 <= left(answer, "tokens") <= 595, "the ten that it took, not the estimate"
    stream = ask(gateway, key, stream=True, max_tokens=40)
    assert left(stream, "requests") == 8
    assert 400 <= left(stream, "tokens") <= 590, "its answer is not over yet"
    with client(gateway, key) as http:
        answer = http.post(CHAT, json={"messages": MESSAGES}, headers={"origin": "https://chat.example"})
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert {"x-ratelimit-remaining-requests", "retry-after", "retry-after-ms"} <= exposed
    # Who is refused is told the same, and when to come back.
    with admin(gateway) as http:
        http.patch(f"/admin/keys/{key_id}", json={"limits": {"requests_per_minute": 1}}).raise_for_status()
    refused = wait_for(lambda: it if (it := ask(gateway, key)).status_code == 429 else None, deadline=5)
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert left(refused, "requests") == 0
    milliseconds = int(refused.headers["retry-after-ms"])
    assert 0 < milliseconds <= 60_050
    assert int(refused.headers["retry-after"]) == -(-milliseconds // 1000)
    assert "x-should-retry" not in refused.headers


def test_a_request_whose_body_was_read_stays_charged_and_nothing_else(
    gateway: GatewayProcess, request: pytest.FixtureRequest
) -> None:
    """With PostgreSQL it is charged on its host alone, whose memory decides; the header is the database's."""
    here = "2" if "postgres" in request.node.name else "0"
    _, key = make_key(gateway, requests_per_minute=4, concurrent=1)
    assert left(ask(gateway, key), "requests") == 3
    with client(gateway, key) as http:
        assert http.post(CHAT, json={"messages": 3}).status_code == 400
        assert http.post(CHAT, json={"messages": MESSAGES, "model": "nobody-has-this"}).status_code == 404
        assert [http.get("/v1/models").status_code for _ in range(5)] == [200] * 5
        assert http.post("/v1/embeddings", json={"input": "one"}).headers["x-ratelimit-remaining-requests"] == here
        refused = [http.post("/v1/embeddings", json={"input": "one"}) for _ in range(3)]
    assert [it.status_code for it in refused] == [429] * 3
    assert 0 < int(refused[-1].headers["retry-after-ms"]) <= 15_050, "who is refused is charged nothing"


def test_openais_client_retries_after_retry_after(gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, requests_per_minute=60)
    statuses, _ = flood([gateway], key, 90)
    assert statuses[429]
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=2) as patient:
        answer = patient.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": "Hello"}])
    assert answer.choices[0].message.content == "one two three"
    _, key = make_key(gateway, requests_per_minute=1)
    assert ask(gateway, key).status_code == 200
    with (
        openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) as hasty,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        hasty.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.code == "rate_limit_exceeded"


def test_a_debt_delays_the_next_request(gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, tokens_per_minute=60)
    usage = {"prompt_tokens": 7, "completion_tokens": 173, "total_tokens": 180}
    answer = ask(gateway, key, max_tokens=1, script=[["json", [200, {"choices": [], "usage": usage}]]])
    assert answer.status_code == 200
    refused = ask(gateway, key, max_tokens=1)
    assert refused.status_code == 429
    assert 115 <= int(refused.headers["retry-after"]) <= 180


def test_a_client_that_disconnects_is_charged_for_what_it_received(engine: FakeEngine, gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, tokens_per_minute=6000, concurrent=1)
    script = [["role"], ["tokens", [50, 1]], ["hang"]]
    body = {"messages": MESSAGES, "stream": True, "script": script, "user": "leaves"}
    with client(gateway, key) as http, http.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        while "x" not in next(lines):
            pass
    engine.wait_seen("leaves", "hung_up")
    stands = wait_for(lambda: it if (it := ask(gateway, key)).status_code == 200 else None)
    # Fifty pieces, what its prompt was estimated to be, and the ten of this request; 100 flow back in a second.
    assert 5800 <= left(stands, "tokens") <= 5999


def test_the_limits_of_keys_without_their_own_change_within_a_second(
    gateway: GatewayProcess, lasting_settings: dict[str, str]
) -> None:
    key_id, key = make_key(gateway, tokens_per_day=10**6)
    stack = Command(**lasting_settings)
    try:
        assert stack.json("limits", "--requests-per-minute", "7", "--concurrent", "50")["own"] == {
            "requests_per_minute": 7,
            "concurrent": 50,
        }
        for secret in (key, KEY):  # whether it is stored or of STACK_API_KEYS
            answer = wait_for(lambda it=secret: _limited(ask(gateway, it)), deadline=5)  # type: ignore[misc]
            assert answer.headers["x-ratelimit-limit-requests"] == "7"
        told = wait_for(lambda: it if (it := stack.json("limits", key_id))["used"]["tokens_per_day"] else None)
        assert (told["in_force"]["requests_per_minute"], told["own"]) == (7, {"tokens_per_day": 10**6})
        assert told["used"]["tokens_per_day"] == told["used"]["tokens_per_month"]
        with admin(gateway) as http:
            assert http.get("/admin/limits").json()["stored"]["concurrent"] == 50
            wrong = http.patch("/admin/limits", json={"concurrent": 0})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "concurrent")
            changed = http.patch("/admin/limits", json={"requests_per_minute": None, "concurrent": None}).json()
            assert set(changed["stored"].values()) == set(changed["in_force"].values()) == {None}
    finally:
        stack("limits", "--requests-per-minute", "default", "--concurrent", "default")
    wait_for(lambda: not _limited(ask(gateway, key)), deadline=5)


def _limited(answer: httpx.Response) -> httpx.Response | None:
    return answer if "x-ratelimit-limit-requests" in answer.headers else None


def test_a_jump_of_the_clock_changes_no_minute_limit(gateway: GatewayProcess, clock: Path) -> None:
    _, key = make_key(gateway, requests_per_minute=1)
    assert ask(gateway, key).status_code == 200
    try:
        for jump in (3600, -7200, 40 * 86_400, 0):
            with clock.open("r+") as file:
                file.write(f"{jump:8}")
            refused = ask(gateway, key)
            assert (refused.status_code, left(refused, "requests")) == (429, 0)
            assert 0 < int(refused.headers["retry-after"]) <= 61  # 60.05 s, rounded up
    finally:
        with clock.open("r+") as file:
            file.write(f"{0:8}")


def test_a_clock_that_was_days_ahead_takes_no_later_day_from_a_quota(gateway: GatewayProcess, clock: Path) -> None:
    _, key = make_key(gateway, tokens_per_day=25)

    def at(days: int) -> int:
        with clock.open("r+") as file:
            file.write(f"{days * 86_400:8}")
        return ask(gateway, key).status_code

    try:
        assert [at(days) for days in (9, 0, 0)] == [200] * 3
        assert [at(0) for _ in range(2)][-1] == 429
        wait_for(lambda: at(1) == 200)  # a worker repeats its last refusal for a moment
    finally:
        with clock.open("r+") as file:
            file.write(f"{0:8}")


def test_a_quota_is_spent_and_stays_so(gateway: GatewayProcess, engine: FakeEngine, tmp_path: Path) -> None:
    del engine, tmp_path
    _, key = make_key(gateway, tokens_per_day=25)
    assert [ask(gateway, key).status_code for _ in range(3)] == [200] * 3
    spent = ask(gateway, key)
    assert spent.status_code == 429
    error = spent.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert spent.headers["x-should-retry"] == "false"
    answers: list[httpx.Response] = []
    with (
        httpx.Client(event_hooks={"response": [answers.append]}) as http,
        openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, http_client=http) as user,
        pytest.raises(openai.RateLimitError, match="tokens per day"),
    ):
        user.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": "Hello"}])
    assert len(answers) == 1, "it does not come again"


def test_running_requests_may_leave_a_part_of_a_quota(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    """It may need less than was set aside for it: whoever comes meanwhile is told to come back."""
    _, key = make_key(gateway, tokens_per_day=200)
    with ThreadPoolExecutor() as pool:
        long = [{"role": "user", "content": "x" * 20_000}]
        script = [["gate", mark], ["json", [200, {"choices": [], "usage": {"prompt_tokens": 9}}]]]
        asked = pool.submit(ask, gateway, key, messages=long, user=mark, script=script)
        engine.wait_seen(mark)
        refused = ask(gateway, key)
        engine.release(mark)
        assert asked.result().status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "retry-after" in refused.headers
    assert "x-should-retry" not in refused.headers
    assert ask(gateway, key).status_code == 200


def test_a_client_that_disconnects_before_the_answer_is_charged_for_its_prompt(gateway: GatewayProcess) -> None:
    _, key = make_key(gateway, tokens_per_day=100)
    long = [{"role": "user", "content": "x" * 20_000}]
    with client(gateway, key) as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json={"messages": long, "script": [["hang"]]}, timeout=0.5)
    spent = wait_for(lambda: answer if (answer := ask(gateway, key)).headers.get("x-should-retry") else None)
    assert spent.json()["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize("status", [400, 429, 500])
def test_an_engines_errors_have_the_rate_limit_headers(gateway: GatewayProcess, status: int) -> None:
    _, key = make_key(gateway, requests_per_minute=10, tokens_per_minute=1000)
    failed = ask(gateway, key, script=[["json", [status, {"error": {"message": "m"}}]]])
    assert failed.status_code >= 400
    assert left(failed, "requests") == 9
    assert left(failed, "tokens") == 1000, "it took none"


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_quota_lasts_over_restarts(
    engine: FakeEngine, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), **SETTINGS}
    if database == "postgres":
        settings["STACK_STORE_URL"] = request.getfixturevalue("postgres").empty_database()
    with running_gateway(tmp_path / "log", engine.url, **settings) as first:
        _, key = make_key(first, tokens_per_month=25)
        assert [ask(first, key).status_code for _ in range(2)] == [200] * 2
        first.process.send_signal(signal.SIGHUP)  # new workers, the same memory
        assert ask(first, key).status_code == 200
        assert ask(first, key).status_code == 429
    with running_gateway(tmp_path / "log-2", engine.url, **settings) as second:
        assert ask(second, key).json()["error"]["code"] == "insufficient_quota"


@pytest.fixture
def replicas(postgres: Postgres) -> Iterator[tuple[list[Replica], FakeEngine]]:
    """Two gateways, each in a container of the real image, of one database and before one engine."""
    image = build("gateway")
    settings = SETTINGS | {
        "STACK_WORKERS": "2",
        "STACK_PUBLISH": "127.0.0.1:9000",
        "STACK_STORE_URL": postgres.empty_database().replace(f"127.0.0.1:{postgres.port}", "database:5432"),
        "LLM_BACKEND": "vllm",
        "LLM_BASE_URL": "http://engine:8000",
        "LLM_MODEL": "fake-model",
    }
    env = [f"--env={name}={value}" for name, value in settings.items()]
    net = f"stack-test-{uuid4().hex[:8]}"
    both, port = [Replica(free_port()) for _ in range(2)], free_port()
    with ExitStack() as stack:
        stack.enter_context(removing("network", "rm", net))
        docker("network", "create", net)
        docker("network", "connect", "--alias", "database", net, postgres.container)
        stack.callback(docker, "network", "disconnect", net, postgres.container)
        stack.enter_context(removing("rm", "--force", f"{net}-engine"))
        run = f"docker run --rm --name {net}-engine --network {net} --network-alias engine -p 127.0.0.1:{port}:8000"
        python = [*run.split(), f"--volume={ROOT}/tests:/opt/gateway/tests:ro", "--entrypoint=python", image]
        engine = stack.enter_context(fake_engine(port, under=python))
        for it in both:
            words = [f"--network={net}", f"--publish=127.0.0.1:{it.port}:9000", *env, image]
            stack.enter_context(container(f"{net}-{it.port}", *words))
        for it in both:
            wait_for(it.answers, deadline=150)
        yield both, engine


def test_hundreds_of_requests_through_two_containers_get_the_hundred_of_the_limit(
    replicas: tuple[list[Replica], FakeEngine],
) -> None:
    both, engine = replicas
    _, key = make_key(both[0], concurrent=100)
    assert at_once(both, key, 400, engine) == {200: 100, 429: 300}
    _, key = make_key(both[0], requests_per_minute=100)
    statuses, seconds = flood(both, key, 400)
    assert set(statuses) == {200, 429}
    assert 100 <= statuses[200] <= 100 + seconds * 100 / 60
    _, key = make_key(both[0], tokens_per_day=25)
    assert Counter(ask(both[number % 2], key).status_code for number in range(10)) == {200: 3, 429: 7}


def test_known_keys_outlive_the_database(engine: FakeEngine, tmp_path: Path, postgres: Postgres) -> None:
    settings = SETTINGS | {"STACK_STORE_URL": postgres.new_database(), "STACK_WORKERS": "2"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        key_id, key = make_key(gateway, requests_per_minute=100, tokens_per_day=1500)
        known, _ = flood([gateway], key, 20, max_tokens=1)  # to both workers
        assert set(known) == {200}
        postgres.stop()
        try:
            statuses, seconds = flood([gateway], key, 400, max_tokens=1)
            assert set(statuses) == {200, 429}
            assert 80 <= statuses[200] <= 100 + seconds * 100 / 60, "one host's memory is exact, and knew of the 20"
        finally:
            postgres.start()
        told = "the limits' database is reachable again"
        wait_for(lambda: sum(it["msg"] == told for it in gateway.log()) == 2)  # both workers say so
        with admin(gateway) as http:
            http.patch(f"/admin/keys/{key_id}", json={"limits": {"requests_per_minute": 10**6}}).raise_for_status()
        answers: list[httpx.Response] = []

        def spent() -> bool:
            answers.append(ask(gateway, key))
            return answers[-1].status_code == 429 and answers[-1].json()["error"]["code"] == "insufficient_quota"

        wait_for(spent, deadline=60)
        more = sum(it.status_code == 200 for it in answers)
        assert 150 <= 20 + statuses[200] + more <= 151, "what was used meanwhile counts"
