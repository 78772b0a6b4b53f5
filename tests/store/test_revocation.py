"""A key that is taken back: what becomes of its requests, on every worker, and which of its secrets work afterwards."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from random import Random
from typing import Any

import httpx
import pytest

from tests.support.keys import ADMIN, CHAT, admin
from tests.support.processes import (
    KEY,
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    running_gateway,
    wait_for,
)

WITHIN = 2.0  # seconds after which nothing runs for a key that was taken back, as the README says
CONFIG = """
engines:
  one: {{dialect: vllm, slots: 1, base_url: "{url}"}}
  many: {{dialect: vllm, slots: 64, base_url: "{url}"}}
models:
  one: {{targets: [{{engine: one, model: fake-model}}]}}
  many: {{targets: [{{engine: many, model: fake-model}}]}}
default_model: one
"""


class Asked(threading.Thread):
    """A request, and how it ended."""

    def __init__(
        self, at: GatewayProcess, key: str, mark: str, *, name: str = "", path: str = CHAT, **fields: Any
    ) -> None:
        super().__init__(daemon=True)
        self.status = 0
        self.text = ""
        self.ended = 0.0
        self.mark = mark
        self._path = path
        script = [["role"], ["token", "x"], ["gate", mark], ["finish", "stop"], ["usage"], ["done"], ["end"]]
        if path == CHAT:
            fields = {"messages": MESSAGES, "script": script} | fields
        else:
            fields |= {"input": f"script:{json.dumps(script)}"}
        self._body = {"user": mark, **fields}
        self._at, self._headers = at, {"authorization": f"Bearer {key}"} | ({"idempotency-key": name} if name else {})
        self.start()

    def run(self) -> None:
        with (
            httpx.Client(base_url=self._at.url, headers=self._headers, timeout=60, verify=NO_TLS) as client,
            suppress(httpx.RemoteProtocolError),  # a failed stream's end is cut
            client.stream("POST", self._path, json=self._body) as answer,
        ):
            self.status = answer.status_code
            for piece in answer.iter_text():
                self.text += piece
        self.ended = time.monotonic()

    def outcome(self) -> tuple[int, Any]:
        """Its status, and the code of its error or of its error event."""
        self.join(30)
        assert not self.is_alive(), "it still waits"
        if self.status != 200:
            return self.status, httpx.Response(self.status, text=self.text).json()["error"]["code"]
        errors = [it["error"]["code"] for it in events(self.text) if isinstance(it, dict) and "error" in it]
        return 200, errors[0] if errors else None


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str]
) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("revocation")
    (directory / "stack.yaml").write_text(CONFIG.format(url=engine.url))
    options = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_ADMIN_KEYS": ADMIN, "STACK_HOLD": "0.2"}
    with running_gateway(directory / "log", engine.url, **options, **lasting_settings) as gateway:
        yield gateway


@contextmanager
def busy(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> Iterator[None]:
    """Another key has the one slot until the block's end."""
    holder = Asked(gateway, KEY, mark, stream=True)
    engine.wait_seen(mark, "running")
    try:
        yield
    finally:
        engine.release(mark)
        holder.join(30)


def _expire(client: httpx.Client, key_id: str) -> float:
    moment = int(time.time()) + 2
    client.patch(f"/admin/keys/{key_id}", json={"expires_at": moment}).raise_for_status()
    return moment - time.time()


def _rotate(client: httpx.Client, key_id: str, grace: int) -> float:
    client.post(f"/admin/keys/{key_id}/rotate", json={"grace_seconds": grace}).raise_for_status()
    return float(grace)


# How a key is taken back; each says in how many seconds that holds.
TAKEN: dict[str, Callable[[httpx.Client, str], float]] = {
    "disabled": lambda client, key_id: _done(client.patch(f"/admin/keys/{key_id}", json={"disabled": True})),
    "deleted": lambda client, key_id: _done(client.delete(f"/admin/keys/{key_id}")),
    "expired": _expire,
    "rotated at once": lambda client, key_id: _rotate(client, key_id, 0),
    "rotated, after its grace": lambda client, key_id: _rotate(client, key_id, 1),
}


def _done(answer: httpx.Response) -> float:
    answer.raise_for_status()
    return 0.0


@pytest.mark.parametrize("how", TAKEN)
def test_all_requests_of_a_revoked_key_end(gateway: GatewayProcess, engine: FakeEngine, mark: str, how: str) -> None:
    with admin(gateway) as client, busy(gateway, engine, f"{mark}-other"):
        made = client.post("/admin/keys", json={"name": "x"}).json()
        key, key_id = made["secret"], made["key"]["id"]
        names = [*[""] * 5, f"{mark}-named"]
        runs = [Asked(gateway, key, f"{mark}-runs", name=it, model="many", stream=True) for it in names]
        blocks = [Asked(gateway, key, f"{mark}-runs", name=it, model="many") for it in ("", f"{mark}-block")]
        waits = [Asked(gateway, key, f"{mark}-waits", stream=True) for _ in range(6)]
        patient = [Asked(gateway, key, f"{mark}-waits") for _ in range(6)]
        wait_for(lambda: len(engine.seen(f"{mark}-runs")) == 8 and all(": ping" in it.text for it in waits))
        began = time.monotonic() + TAKEN[how](client, key_id)
        assert {it.outcome() for it in patient} == {(401, "invalid_api_key")}
        assert {it.outcome() for it in waits} == {(200, "invalid_api_key")}
        assert {it.outcome() for it in runs} == {(200, "invalid_api_key")}
        assert {it.outcome() for it in blocks} == {(401, "invalid_api_key")}
        assert max(it.ended for it in runs + blocks + waits + patient) - began < WITHIN * 5
    wait_for(lambda: {it["state"] for it in engine.seen(f"{mark}-runs")} == {"hung_up"})
    assert not engine.seen(f"{mark}-waits")
    assert [it["state"] for it in engine.seen(f"{mark}-other")] == ["done"]


def test_of_two_secrets_with_one_answer_the_valid_one_gets_it(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    """Only the secret that asked first was watched: the other one received after its end, or was ended with it."""
    with admin(gateway) as client:
        made = client.post("/admin/keys", json={"name": "x"}).json()
        ends = time.monotonic() + 3
        answer = client.post(f"/admin/keys/{made['key']['id']}/rotate", json={"grace_seconds": 3}).raise_for_status()
        secrets = {"old": made["secret"], "new": answer.json()["secret"]}
        asked: dict[str, list[Asked]] = {"old": [], "new": []}
        answers = [(first, path) for first in secrets for path in (CHAT, "/v1/responses")]
        for turn in (0, 1):
            for first, path in answers:
                which = first if turn == 0 else ({*secrets} - {first}).pop()
                name = f"{mark}-{first}-{path}"
                asked[which].append(
                    Asked(gateway, secrets[which], name, name=name, path=path, model="many", stream=True)
                )
            wait_for(lambda: all('"x"' in it.text for it in (*asked["old"], *asked["new"])))
        assert time.monotonic() < ends, "this machine is too slow for the test"
    for it in asked["old"]:
        it.join(30)
        assert "invalid_api_key" in it.text
        assert it.ended - ends < WITHIN * 5
    for it in asked["new"]:
        assert it.is_alive()
        engine.release(it.mark)
        it.join(30)
        assert "invalid_api_key" not in it.text
        assert "[DONE]" in it.text or "response.completed" in it.text


def test_a_model_that_is_taken_away_is_not_begun_and_what_runs_goes_on(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    with admin(gateway) as client:
        made = client.post("/admin/keys", json={"name": "x", "models": ["one", "many"]}).json()
        key, path = made["secret"], f"/admin/keys/{made['key']['id']}"
        with busy(gateway, engine, f"{mark}-other"):
            runs = Asked(gateway, key, f"{mark}-runs", model="many", stream=True)
            waits = [Asked(gateway, key, f"{mark}-waits") for _ in range(6)]
            engine.wait_seen(f"{mark}-runs", "running")
            client.patch(path, json={"models": ["elsewhere"]}).raise_for_status()
            assert {it.outcome() for it in waits} == {(404, "model_not_found")}
            engine.release(f"{mark}-runs")
            assert runs.outcome() == (200, None)
    assert not engine.seen(f"{mark}-waits")


def test_a_body_that_is_sent_while_its_key_is_taken_back_is_refused(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    with admin(gateway) as client:
        made = client.post("/admin/keys", json={"name": "x"}).json()
        disabled = threading.Event()

        def body() -> Iterator[bytes]:
            yield b'{"model":"many","messages":[{"role":"user","content":"x"}],'
            client.patch(f"/admin/keys/{made['key']['id']}", json={"disabled": True}).raise_for_status()
            wait_for(lambda: _status(gateway, made["secret"]) == {401})
            disabled.set()
            yield b'"user":"%s"}' % mark.encode()

        headers = {"authorization": f"Bearer {made['secret']}", "content-type": "application/json"}
        answer = httpx.post(gateway.url + CHAT, content=body(), headers=headers, timeout=60, verify=NO_TLS)
    assert disabled.is_set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not engine.seen(mark)


def _status(gateway: GatewayProcess, key: str) -> set[int]:
    """What both workers say: of ten connections each takes some."""
    headers = {"authorization": f"Bearer {key}"}
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(httpx.get, gateway.url + "/v1/models", headers=headers, verify=NO_TLS) for _ in range(10)]
        return {it.result().status_code for it in asked}


STEPS = ("disable", "enable", "rotate", "rotate at once", "delete")
WITH_AN_END = (
    ("expire",),
    ("expire", "extend"),
    ("rotate", "expire"),
    ("rotate", "expire", "extend"),
    ("expire", "rotate", "extend"),
    ("disable", "expire", "extend", "enable"),
    ("rotate", "disable", "expire", "extend", "enable"),
    ("disable", "rotate", "enable", "expire", "extend"),
)
LATEST = max(it.index("expire") for it in WITH_AN_END)


def _sequences() -> list[tuple[str, ...]]:
    """Every one of two steps, and some longer ones. Keys that expire begin later, so that they do so together."""
    some = Random(1)
    short = [it for it in product(STEPS, repeat=2) if it[0] != "delete"]
    long = [tuple(some.choices(STEPS, weights=(3, 3, 3, 1, 0), k=length)) for length in (3, 4, 5) for _ in range(8)]
    return short + long + [("wait",) * (LATEST - it.index("expire")) + it for it in WITH_AN_END]


class Life:
    """A key on its way through a sequence of changes, and which of its secrets should work.

    Its newest one does, while the key is there, enabled and not over; an older one for as long as its rotation said,
    unless the key was disabled then or has been since.
    """

    def __init__(self, client: httpx.Client) -> None:
        made = client.post("/admin/keys", json={"name": "x"}).raise_for_status().json()
        self._client, self._path = client, f"/admin/keys/{made['key']['id']}"
        self.secrets = [made["secret"]]
        self._older: list[str] = []
        self._enabled = self._there = True
        self._over = False

    def step(self, name: str) -> None:
        if name.startswith("rotate"):
            self._rotate(grace=name == "rotate")
        elif name == "delete":
            self._client.delete(self._path).raise_for_status()
            self._there = False
        elif name in ("expire", "extend"):
            ends = time.time() + (1 if name == "expire" else 86_400)
            self._client.patch(self._path, json={"expires_at": int(ends)}).raise_for_status()
            self._over = name == "expire"
        elif name != "wait":
            self._client.patch(self._path, json={"disabled": name == "disable"}).raise_for_status()
            self._enabled = name == "enable"
            self._older = self._older if self._enabled else []

    def _rotate(self, *, grace: bool) -> None:
        answer = self._client.post(f"{self._path}/rotate", json={"grace_seconds": 3600 if grace else 0})
        assert answer.status_code == (400 if self._over else 200)
        if not self._over:
            self._older = [*self._older, self.secrets[-1]] if grace and self._enabled else []
            self.secrets.append(answer.json()["secret"])

    def works(self) -> list[bool]:
        good = self._there and self._enabled and not self._over
        return [good and (it == self.secrets[-1] or it in self._older) for it in self.secrets]


def test_whatever_was_done_with_a_key_the_right_secrets_work(gateway: GatewayProcess) -> None:
    """Never one that somebody else may have had while its key was disabled."""
    sequences = _sequences()
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=60, verify=NO_TLS) as client:
        lives = [Life(client) for _ in sequences]
        for number in range(max(map(len, sequences))):
            for it, steps in zip(lives, sequences, strict=True):
                if number < len(steps):
                    it.step(steps[number])
            if number == LATEST:
                expired = time.time() + 1
                wait_for(lambda: time.time() > expired)  # noqa: B023  called here
        wrong: dict[tuple[str, ...], list[bool]] = {}

        def right() -> bool:
            nonlocal wrong
            with ThreadPoolExecutor(60) as pool:  # a refusal takes half a second
                asked = [[pool.submit(_works, client, key) for key in it.secrets] for it in lives]
                found = [[it.result() for it in answers] for answers in asked]
            wrong = {steps: it for steps, life, it in zip(sequences, lives, found, strict=True) if it != life.works()}
            return not wrong

        with suppress(AssertionError):
            wait_for(right)  # what was changed last is known within a second
        assert wrong == {}


def _works(client: httpx.Client, key: str) -> bool:
    answer = client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code in (200, 401)
    return answer.status_code == 200
