"""Users of one key, whom its front end names in a signed header: their turns, limits, usage and responses are apart."""

import asyncio
import base64
import csv
import hmac
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts
from gateway.limits.postgres import PostgresBook
from gateway.limits.users import enter
from tests.support.command import Command
from tests.support.containers import Postgres
from tests.support.front_end import HEADER, FrontEnd, token
from tests.support.keys import ADMIN, CHAT, admin, ask
from tests.support.processes import (
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    free_port,
    running_gateway,
    scrape,
    wait_for,
)
from tests.support.rows import Rows

REST = [["token", "x"], ["finish", "stop"], ["usage"], ["done"], ["end"]]


@pytest.fixture(scope="module")
def metrics() -> int:
    """The port of the metrics."""
    return free_port()


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str], metrics: int
) -> Iterator[GatewayProcess]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    settings = {"STACK_ADMIN_KEYS": ADMIN, "LLM_SLOTS": "1", "STACK_WORKERS": "1", "STACK_RESPONSES_DAYS": "1"}
    settings |= {"STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
    with running_gateway(log, engine.url, **settings, **lasting_settings) as gateway:
        yield gateway


def make(gateway: GatewayProcess, **fields: Any) -> tuple[str, FrontEnd]:
    """Return the id of a new key that tells its users apart, and its front end."""
    with admin(gateway) as client:
        answer = client.post("/admin/keys", json={"name": "chat", "users": True, **fields})
        assert answer.status_code == 201, answer.text
        made = answer.json()
    return made["key"]["id"], FrontEnd(gateway, made["secret"], made["signing_secret"])


@contextmanager
def busy(engine: FakeEngine, front_end: FrontEnd, mark: str) -> Iterator[ThreadPoolExecutor]:
    """Keep the one slot in use until the end of the block."""
    with ThreadPoolExecutor() as pool:
        script = [["role"], ["gate", mark], *REST]
        held = pool.submit(front_end.ask, "ann", user=mark, script=script, stream=True)
        engine.wait_seen(mark, "running")
        try:
            yield pool
        finally:
            engine.release(mark)
        assert held.result().status_code == 200


def test_each_user_has_usage_rows_of_its_own_and_nobody_learns_a_name(
    gateway: GatewayProcess, stack: Command, lasting_settings: dict[str, str]
) -> None:
    key, front_end = make(gateway)
    for name in ("ann", "bob", "ann"):
        assert front_end.ask(name, x_request_id=f"{key}-{name}").status_code == 200
    ann, bob = (stack.json("keys", "users", key, "--find", name)["user"] for name in ("ann", "bob"))

    def usage() -> dict[str, int]:
        return {it["user"]: it["requests"] for it in stack.json("usage", "--key", key, "--by", "user")}

    wait_for(lambda: usage() == {ann: 2, bob: 1})
    assert [it["requests"] for it in stack.json("usage", "--user", bob, "--by", "key,user,model")] == [1]
    table = list(csv.DictReader(io.StringIO(stack("usage", "--key", key, "--by", "user", "--csv"))))
    assert {it["user"]: it["requests"] for it in table} == {ann: "2", bob: "1"}
    with admin(gateway) as client:
        of_bob = client.get("/admin/usage", params={"by": "user", "user": bob}).json()["data"]
        assert [(it["user"], it["requests"]) for it in of_bob] == [(bob, 1)]
    with closing(Rows(lasting_settings)) as rows:
        assert rows.of(f"{key}-bob")["user_id"] == bob
    finished = [it for it in gateway.lines(f"{key}-bob") if "finished" in it["msg"]]
    assert [(it["key"], it["user"]) for it in finished] == [(key, bob)]
    log = gateway.log_path.read_text()
    assert not any(it in log for it in ("Name of", "people.example", front_end.signing))


def test_the_signing_secret_is_shown_once_and_can_be_replaced(gateway: GatewayProcess, stack: Command) -> None:
    key, front_end = make(gateway)
    signing = front_end.signing
    assert front_end.ask("ann").status_code == 200
    with admin(gateway) as client:
        shown = client.get(f"/admin/keys/{key}").text + client.get("/admin/keys").text
        again = client.patch(f"/admin/keys/{key}", json={"priority": 2}).text
        assert signing not in shown + again + stack("keys", "show", key) + stack("keys", "list", "--json")
        assert client.get(f"/admin/keys/{key}").json()["users"] is True
        newer = client.post(f"/admin/keys/{key}/users").json()["signing_secret"]
    wait_for(lambda: front_end.ask("ann").status_code == 401)
    front_end.signing = newer
    assert front_end.ask("ann").status_code == 200
    front_end.signing = stack.json("keys", "users", key)["signing_secret"]
    wait_for(lambda: front_end.ask("ann").status_code == 200)
    assert "does not tell its users apart" in stack("keys", "users", key, "--off")
    wait_for(lambda: front_end.call("POST", CHAT, {}, json={"messages": MESSAGES}).status_code == 200)
    text = stack("keys", "create", "another", "--users")
    assert "sign-stack-" in text


def b64(value: Any) -> str:
    return (
        base64.urlsafe_b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).decode().strip("=")
    )


def forged(header: Any, claims: Any, secret: str, digest: str = "sha256") -> str:
    text = f"{b64(header)}.{b64(claims)}"
    return f"{text}.{b64(hmac.digest(secret.encode(), text.encode(), digest))}"


def wrong(secret: str) -> dict[str, dict[str, str]]:
    """Heads that prove no user, by what is wrong with them."""
    now = int(time.time())
    good = {"sub": "ann", "iat": now, "exp": now + 300}
    plain = ("id", "email", "name", "role")
    tokens = {
        "another secret": token("sign-stack-" + "0" * 43, "ann"),
        "no signature": forged({"alg": "none"}, good, secret).rpartition(".")[0] + ".",
        "the algorithm none": forged({"alg": "none"}, good, secret),
        "an algorithm of key pairs": forged({"alg": "RS256"}, good, secret),
        "another algorithm": forged({"alg": "HS512"}, good, secret, "sha512"),
        "an unknown condition": forged({"alg": "HS256", "crit": ["x"], "x": 1}, good, secret),
        "expired": token(secret, "ann", iat=now - 400, exp=now - 100),
        "from the future": token(secret, "ann", iat=now + 600, exp=now + 900),
        "no expiry": forged({"alg": "HS256"}, {"sub": "ann"}, secret),
        "an infinite expiry": forged({"alg": "HS256"}, {"sub": "ann", "exp": float("inf")}, secret),
        "no name": forged({"alg": "HS256"}, {"exp": now + 300}, secret),
        "a number as name": forged({"alg": "HS256"}, good | {"sub": 1}, secret),
        "an empty name": token(secret, ""),
        "a long name": token(secret, "n" * 256),
        "a list as claims": forged({"alg": "HS256"}, [good], secret),
        "too long": token(secret, "ann", groups=["g" * 4096]),
        "nested deeply": f"{b64(b'[' * 2900)}.e30.",
        "no token": "ann",
        "nothing": "",
    }
    return {name: {HEADER: it} for name, it in tokens.items()} | {
        "plain headers": {f"x-openwebui-user-{it}": "ann" for it in plain},
    }


def test_what_proves_no_user_is_refused_with_a_sentence(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    _, front_end = make(gateway)
    for what, head in wrong(front_end.signing).items():
        answer = front_end.call("POST", CHAT, head, json={"messages": MESSAGES, "user": mark})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (401, "invalid_user", "invalid_request_error"), (
            what
        )
        assert "X-OpenWebUI-User-Jwt" in error["message"], what
        assert front_end.signing not in answer.text
    assert engine.seen(mark) == []
    late = {HEADER: token(front_end.signing, "ann", exp=int(time.time()) - 20)}
    assert front_end.call("POST", CHAT, late, json={"messages": MESSAGES}).status_code == 200, "clocks differ a little"
    assert front_end.call("GET", "/v1/models", {}).status_code == 200, "front ends list models for nobody"


def test_a_key_without_users_believes_no_header(gateway: GatewayProcess, stack: Command) -> None:
    made = stack.json("keys", "create", "plain")
    front_end = FrontEnd(gateway, made["secret"], "s" * 43)
    wait_for(lambda: front_end.ask("ann").status_code == 200)
    wait_for(lambda: [it["user"] for it in stack.json("usage", "--key", made["key"]["id"], "--by", "user")] == [None])


def test_each_user_has_the_limits_of_a_user_and_all_have_the_keys(gateway: GatewayProcess, stack: Command) -> None:
    of_key, of_each = {"requests_per_minute": 4, "tokens_per_minute": 99999}, {"requests_per_minute": 2}
    key, front_end = make(gateway, limits=of_key, user_limits=of_each)
    answers = [front_end.ask("ann") for _ in range(3)]
    assert [it.status_code for it in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2", "the user's"
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "99999", "the key's"
    assert answers[2].json()["error"]["message"].startswith("This user of the key is limited to 2 requests per minute")
    answers = [front_end.ask(name) for name in ("bob", "bob", "eve")]
    assert [it.status_code for it in answers] == [200, 200, 429], "ann's refused request cost the key nothing"
    assert answers[2].json()["error"]["message"].startswith("This key is limited to 4 requests per minute")
    stack("limits", key, "--each-user", "--concurrent", "3")
    assert stack.json("limits", key, "--each-user")["own"] == of_each | {"concurrent": 3}
    assert stack.json("limits", key)["own"] == of_key


def test_an_answer_waits_for_no_report_that_nobody_owes(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of a user waits until the database knows what both accounts took, and then for nothing more."""
    monkeypatch.setattr("gateway.limits.postgres.WAIT", 600.0)
    key = Key("key", user="ann", limits=Limits(tokens_per_day=1000), user_limits=Limits(tokens_per_day=1000))
    url = postgres.new_database()

    async def settle_three() -> None:
        async with PostgresBook(url, Accounts(), 0) as book, asyncio.timeout(60):
            for number in (1, 2, 3):
                lease = await enter(book, key)
                await lease.set_aside(Estimate(size=0, prompt=30))
                lease.settle(20)
                await lease.known()
                with psycopg.connect(url) as connection:
                    found = connection.execute("SELECT key_id, day_tokens FROM accounts").fetchall()
                assert dict(found) == {"key": 20 * number, "key/ann": 20 * number}
                await lease.known()

    asyncio.run(settle_three())


def test_a_request_that_the_key_refuses_costs_its_user_nothing(gateway: GatewayProcess, engine: FakeEngine) -> None:
    key, front_end = make(gateway, limits={"concurrent": 1}, user_limits={"requests_per_minute": 1})
    with busy(engine, front_end, key):
        refused = [front_end.ask("bob") for _ in range(2)]
    assert all("This key is limited to 1 concurrent" in it.text for it in refused)
    assert front_end.ask("bob").status_code == 200
    assert front_end.ask("bob").status_code == 429


def test_a_users_quota_is_counted_from_the_usage(
    gateway: GatewayProcess, stack: Command, lasting_settings: dict[str, str]
) -> None:
    key, front_end = make(gateway, user_limits={"tokens_per_month": 500})
    ann = stack.json("keys", "users", key, "--find", "ann")["user"]
    row = {"id": key, "key_id": key, "user_id": ann, "at": int(time.time() * 1000) - 1, "tokens_in": 500}
    with closing(Rows(lasting_settings)) as rows:
        rows.book.add([row])
        assert (rows.book.spent(key, 0, 1 << 50), rows.book.spent(f"{key}/{ann}", 0, 1 << 50)) == (500, 500)
        assert rows.book.spent(f"{key}/other", 0, 1 << 50) == 0
    spent = front_end.ask("ann").json()["error"]
    assert (spent["code"], spent["message"][:43]) == (
        "insufficient_quota",
        "This user of the key has used its quota of ",
    )
    assert front_end.ask("bob").status_code == 200


def test_users_take_turns_within_their_keys_share(
    gateway: GatewayProcess, stack: Command, engine: FakeEngine, metrics: int
) -> None:
    """The engine has one slot, and `seen` is in the order in which it got the requests."""
    (key, front_end), other = make(gateway), stack.json("keys", "create", "other")["secret"]
    marks = [f"{key}-{it}" for it in ("a1", "a2", "b1", "o1", "o2")]
    with busy(engine, front_end, key) as pool:
        for number, mark in enumerate(marks, 1):
            if "-o" in mark:
                pool.submit(ask, gateway, other, user=mark)
            else:
                pool.submit(front_end.ask, "ann" if "-a" in mark else "bob", user=mark)
            wait_for(lambda number=number: scrape(metrics).total("stack_queue_depth") == number)  # type: ignore[misc]
    seen = [it for it in engine.seen() if it["body"].get("user") in marks]
    assert [it["body"]["user"].rpartition("-")[2] for it in seen] == ["o1", "b1", "o2", "a1", "a2"]
    assert not any(HEADER in it["headers"] for it in seen), "engines learn of no user"


def test_a_user_sees_no_response_and_no_answer_of_another_user(gateway: GatewayProcess) -> None:
    _, front_end = make(gateway)
    made = front_end.ask("ann", "/v1/responses", input="Hello", model="fake-model")
    assert made.status_code == 200, made.text
    path = f"/v1/responses/{made.json()['id']}"
    ann, bob = ({HEADER: token(front_end.signing, name)} for name in ("ann", "bob"))
    assert front_end.call("GET", path, ann).status_code == 200
    assert front_end.call("GET", path, bob).status_code == 404
    assert front_end.call("GET", path, {}).status_code == 401
    assert front_end.call("DELETE", path, bob).status_code == 404
    follows = {"input": "And?", "model": "fake-model", "previous_response_id": made.json()["id"]}
    assert front_end.ask("bob", "/v1/responses", **follows).status_code == 400
    assert front_end.ask("ann", "/v1/responses", **follows).status_code == 200
    assert front_end.call("DELETE", path, ann).status_code == 200
    first, second, again = (
        front_end.call("POST", CHAT, head | {"idempotency-key": "one"}, json={"messages": MESSAGES})
        for head in (ann, bob, ann)
    )
    assert [it.headers.get("idempotent-replayed") for it in (first, second, again)] == [None, None, "true"]
