"""The page of a request tells its wait in the queue, its fallback, and the engine that continued its answer."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from html import unescape
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.console import Visit, console_gateway, visiting
from tests.support.keys import CHAT, admin
from tests.support.processes import (
    AUTH,
    JSON,
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    wait_for,
)

PIECES = ["Well", ",", " she", " says", "."]
CONFIG = """
engines:
  first: {{dialect: llamacpp, slots: 1, base_url: "{a}"}}
  second: {{dialect: llamacpp, slots: 8, base_url: "{b}"}}
  gone: {{dialect: llamacpp, slots: 4, base_url: "http://127.0.0.1:{gone}"}}
models:
  away: {{targets: [{{engine: gone, model: fake-model}}]}}
  one: {{targets: [{{engine: first, model: fake-model}}]}}
  pair: {{targets: [{{engine: first, model: fake-model}}], fallbacks: [{{engine: second, model: fake-model}}]}}
  fall: {{targets: [{{engine: first, model: fake-model}}], fallbacks: [{{engine: second, model: "other/model:1b"}}]}}
default_model: one
breaker: {{failures: 1000}}
retries: {{budget: 1}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway's data directory."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def two(engine: FakeEngine, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with an engine that has one slot, and another one."""
    directory = tmp_path_factory.mktemp("two")
    with fake_engine() as other:
        (directory / "stack.yaml").write_text(CONFIG.format(a=engine.url, b=other.url, gone=free_port()))
        settings = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_RESUME": "3", "STACK_DATA_DIR": str(data)}
        with console_gateway(directory / "log", engine.url, **settings) as gateway:
            yield gateway


@pytest.fixture
def visit(two: GatewayProcess) -> Iterator[Visit]:
    with visiting(two) as visit:
        yield visit


def send(
    gateway: GatewayProcess, request_id: str, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    headers = AUTH | {"x-request-id": request_id} | (headers or {})
    body = {"model": "one", "messages": MESSAGES, "stream": True} | fields
    return httpx.post(gateway.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)


def steps(visit: Visit, request_id: str) -> str:
    """What the page says happened, once the request is over."""
    page = wait_for(lambda: (it := visit.get(f"/console/requests/{request_id}").text) and "ended:" in it and it)
    assert page
    listed = page[page.index('<ol class="steps">') : page.index("</ol>")]
    return " ".join(re.sub(r"<[^>]+>", " ", listed).split())


def test_the_wait_in_the_queue(two: GatewayProcess, visit: Visit, engine: FakeEngine, mark: str) -> None:
    script = [["role"], ["gate", mark], ["token", "x"], ["finish", "stop"], ["usage"], ["done"], ["end"]]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(send, two, f"{mark}-1", user=mark, script=script)
        engine.wait_seen(mark)
        second = pool.submit(send, two, f"{mark}-2")

        def waits() -> dict[str, Any]:
            told: dict[str, Any] = visit.get("/console/now.json").json()
            return told if told["waiting"] == 1 else {}

        told = wait_for(waits)
        assert [(it["id"], it["position"]) for it in told["running"]] == [(f"{mark}-1", None), (f"{mark}-2", 1)]
        assert [(it["name"], it["slots"], it["used"], it["waiting"]) for it in told["engines"]] == [
            ("first", 1, 1, 1),
            ("second", 8, 0, 0),
            ("gone", 4, 0, 0),
        ]
        assert "position 1 in the queue" in visit.get(f"/console/requests/{mark}-2").text
        engine.release(mark)
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert re.search(r"sent to the engine first after \S+ m?s in the queue", steps(visit, f"{mark}-2"))


def test_the_wait_for_an_engine_that_is_down(two: GatewayProcess, visit: Visit, mark: str) -> None:
    body = json.dumps({"model": "away", "messages": MESSAGES, "stream": True})
    with closing(HTTPConnection("127.0.0.1", httpx.URL(two.url).port)) as connection:
        connection.request("POST", CHAT, body, AUTH | JSON | {"x-request-id": mark})

        def told() -> list[Any]:
            it = visit.get("/console/now.json").json()
            return [it["answered"], it["waiting"], *((row["id"], row["waits"]) for row in it["running"])]

        wait_for(lambda: told() == [0, 1, (mark, "for an engine that is down")])
        assert "waits for an engine that is down" in visit.get(f"/console/requests/{mark}").text
    steps(visit, mark)


def test_a_fallback(two: GatewayProcess, visit: Visit, mark: str) -> None:
    scripts = {"fake-model": [["reset"]], "other/model:1b": [["answer", {"dialect": "llamacpp", "pieces": PIECES}]]}
    assert send(two, mark, model="fall", script_for=scripts).status_code == 200
    told = steps(visit, mark)
    assert re.search(r"sent to the engine first .* sent to another engine first → second after engine_\w+", told)
    assert re.search(r"sent to the engine second .* first token .* ended: finished", told)


def test_the_engines_that_continued_an_answer(two: GatewayProcess, visit: Visit, mark: str) -> None:
    answer = {"dialect": "llamacpp", "pieces": PIECES, "cuts": [3]}
    got = send(two, mark, model="pair", user=mark, script=[["answer", answer]])
    assert got.headers["x-request-id"] == mark
    assert "[DONE]" in got.text
    told = steps(visit, mark)
    assert "broke off, and another engine is to continue it first → second after engine_broken_stream" in told
    assert re.search(r"sent to the engine second .* ended: finished", told)
    page = visit.get(f"/console/requests/{mark}").text
    assert re.findall(r"<dt>(Attempts|Resumes)</dt><dd>(\d+)</dd>", page) == [
        ("Attempts", "3"),
        ("Resumes", "2"),
    ]  # each engine breaks off once


def test_bodies_are_captured_of_a_chosen_key_alone_and_never_on_disk(
    two: GatewayProcess, visit: Visit, data: Path
) -> None:
    def ask(key: str, words: str) -> str:
        body = {"model": "one", "messages": [{"role": "user", "content": words}], "stream": True}
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(two.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)
        assert answer.status_code == 200
        return answer.headers["x-request-id"]

    def page(request_id: str) -> str:
        steps(visit, request_id)
        return visit.get(f"/console/requests/{request_id}").text

    with admin(two) as api:
        chosen, other = (api.post("/admin/keys", json={"name": name}).json() for name in ("chosen", "other"))
    where = f"/console/keys/{chosen['key']['id']}"
    assert "Canary" not in page(ask(chosen["secret"], "Canary before <b>"))
    assert visit.send(where, f"{where}/capture", capture="yes").status_code == 303
    assert "are captured for" in visit.get(where).text
    captured = ask(chosen["secret"], "Canary during <b>")
    text = page(captured)
    assert "Canary during &lt;b&gt;" in text
    assert "The request, as the gateway understood it" in text
    assert "data: {" in unescape(text)
    assert "Canary" not in page(ask(other["secret"], "Canary of another"))
    with visiting(two, chosen["secret"]) as owner:
        assert owner.get(f"/console/requests/{captured}").status_code == 403
        assert owner.post(f"{where}/capture", {"form_token": owner.token("/console/own")}).status_code == 403
    for file in [two.log_path, *(it for it in data.rglob("*") if it.is_file())]:
        assert b"Canary" not in file.read_bytes(), file
    visit.send(where, f"{where}/capture", capture="no")
    assert "Canary" not in page(captured)
    assert "Canary" not in page(ask(chosen["secret"], "Canary after"))


def test_a_page_shows_no_captured_body_of_another_key_with_the_same_request_id(
    two: GatewayProcess, visit: Visit, mark: str
) -> None:
    with admin(two) as api:
        made = {name: api.post("/admin/keys", json={"name": name}).json() for name in ("captured key", "plain key")}
    where = f"/console/keys/{made['captured key']['key']['id']}"
    visit.send(where, f"{where}/capture", capture="yes")

    def page(name: str, words: str) -> str:
        """The page of the key's request, once it has these words."""
        messages = [{"role": "user", "content": f"Canary of the {name}"}]
        headers = {"authorization": f"Bearer {made[name]['secret']}"}
        assert send(two, mark, headers, messages=messages).status_code == 200
        found = wait_for(lambda: words in (it := visit.get(f"/console/requests/{mark}").text) and it)
        assert found
        return found

    page("captured key", "Canary of the captured key")
    assert "Canary" not in page("plain key", ">plain key<")
    visit.send(where, f"{where}/capture", capture="no")


def test_a_captured_stream_has_its_middle(two: GatewayProcess, visit: Visit, engine: FakeEngine, mark: str) -> None:
    with admin(two) as api:
        key = api.post("/admin/keys", json={"name": "middle"}).json()
    where = f"/console/keys/{key['key']['id']}"
    visit.send(where, f"{where}/capture", capture="yes")
    words = ["Beginning", "Middle", "End"]
    script = [["role"], *(step for it in words for step in (["token", it], ["gate", mark + it]))]
    body = {"model": "one", "messages": MESSAGES, "stream": True, "user": mark}
    body["script"] = [*script, ["finish", "stop"], ["done"], ["end"]]
    headers = {"authorization": f"Bearer {key['secret']}", "x-request-id": mark}
    with httpx.stream("POST", two.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS) as answer:
        for line in answer.iter_lines():
            for it in words:
                if it in line:
                    engine.release(mark + it)
    steps(visit, mark)
    captured = visit.get(f"/console/requests/{mark}").text.partition("What the client got")[2]
    assert [it for it in words if it in captured] == words


def test_a_request_that_runs_when_a_capture_is_stopped_leaves_no_body(
    two: GatewayProcess, visit: Visit, engine: FakeEngine, mark: str
) -> None:
    with admin(two) as api:
        stopped, other = (api.post("/admin/keys", json={"name": name}).json() for name in ("stopped", "other"))
    pages = [f"/console/keys/{it['key']['id']}" for it in (stopped, other)]
    for where in pages:
        visit.send(where, f"{where}/capture", capture="yes")
    script = [["role"], ["token", "Canary answer"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
    words = [{"role": "user", "content": "Canary prompt"}]
    auth = {"authorization": f"Bearer {stopped['secret']}"}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, two, mark, headers=auth, messages=words, user=mark, script=script)
        engine.wait_seen(mark)
        said = visit.get(visit.send(pages[0], f"{pages[0]}/capture", capture="no").headers["location"]).text
        assert "This key&#39;s requests are no longer captured, and all captured bodies are forgotten." in said
        visit.send(pages[0], f"{pages[0]}/capture", capture="yes")
        engine.release(mark)
        assert running.result().status_code == 200
    steps(visit, mark)
    assert "Canary" not in visit.get(f"/console/requests/{mark}").text
    assert "are captured for" in visit.get(pages[1]).text


def test_the_steps_of_a_request_are_told_while_the_store_is_away(
    two: GatewayProcess, visit: Visit, data: Path, mark: str
) -> None:
    assert send(two, mark).status_code == 200
    steps(visit, mark)
    stores = list(data.glob("stack.db*"))
    for file in stores:
        file.rename(file.with_name(f"away-{file.name}"))
    try:
        page = wait_for(lambda: it if "cannot be read" in (it := visit.get(f"/console/requests/{mark}")).text else None)
        assert page
        assert (page.status_code, "ended:" in page.text) == (200, True)
    finally:
        for file in stores:
            file.with_name(f"away-{file.name}").rename(file)
