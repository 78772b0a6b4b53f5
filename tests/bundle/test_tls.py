"""WITH=tls,chat: Caddy before the tiny stack and its chat window, with the tests' own authority and Caddy's own."""

import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import trustme
from playwright.sync_api import Error, Page, Route, expect

from tests.support import browser
from tests.support.clone import Tree, clone
from tests.support.console import Visit
from tests.support.containers import build, docker
from tests.support.keys import ADMIN
from tests.support.processes import free_port, wait_for
from tests.support.stack import LONG

NAME = "llm.test"
CHAT = "/v1/chat/completions"
# As Docker's client configuration can set it in every container. Nothing listens there.
PROXIED = """
services:
  gateway: { environment: &proxy { HTTP_PROXY: "http://127.0.0.1:9", http_proxy: "http://127.0.0.1:9" } }
  caddy: { environment: *proxy }
  chat: { environment: *proxy }
"""


@dataclass
class Served:
    """The stack behind Caddy, and a client's trust."""

    tree: Tree
    settings: dict[str, str]
    port: int
    trust: ssl.SSLContext
    said: str

    @property
    def chat(self) -> str:
        """Where the chat window is published."""
        return self.settings["CHAT_PUBLISH"]

    @property
    def chat_key(self) -> str:
        """The id of the chat window's key."""
        return re.findall(r"KEY=sk-stack-(\w+)-", (self.tree.path / ".secrets/chat").read_text())[0]

    @contextmanager
    def client(self, key: str = "dev-key", **options: Any) -> Iterator[httpx.Client]:
        """A client that finds the name at this machine."""
        headers = {"host": f"{NAME}:{self.port}", "x-api-key": key} | options.pop("headers", {})
        options = {"verify": self.trust, "http2": True, "timeout": 100} | options
        with httpx.Client(base_url=f"https://127.0.0.1:{self.port}", headers=headers, **options) as client:
            send = client.send
            client.send = lambda request, **more: send(_for(request), **more)  # type: ignore[method-assign]
            yield client

    def container(self, service: str) -> str:
        return f"{self.tree.project}-{service}-1"

    def inspect(self, service: str) -> Any:
        return json.loads(docker("inspect", self.container(service)))[0]


def _for(request: httpx.Request) -> httpx.Request:
    request.extensions.setdefault("sni_hostname", NAME)
    return request


@pytest.fixture(scope="module")
def caddy() -> str:
    build("caddy", "tests/bundle/caddy", context="requirements")
    build("chat", "tests/bundle/chat")
    return "stack-test-caddy"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, python_image: str, caddy: str) -> Iterator[Served]:
    """The files form: `make up` from a fresh clone made under umask 077. Every container has a proxy that does not
    answer, so a request that is sent to it fails."""
    tree = clone(tmp_path_factory.mktemp("tls") / "clone")
    (tree.path / "proxied.yaml").write_text(PROXIED)
    tree.dotenv.write_text("COMPOSE_FILE=compose.yaml:compose.tiny.yaml:proxied.yaml\n")
    authority = trustme.CA()
    issued = authority.issue_cert(NAME)
    issued.cert_chain_pems[0].write_to_path(tree.path / "cert.pem")
    issued.private_key_pem.write_to_path(tree.path / "key.pem")
    for file in ("cert.pem", "key.pem"):
        (tree.path / file).chmod(0o644)
    port = free_port()
    settings = {
        "ENGINE": "tiny", "WITH": "tls,chat", "CADDY_IMAGE": caddy, "PYTHON_IMAGE": python_image,
        "CHAT_IMAGE": "stack-test-chat",
        "CHAT_PUBLISH": f"127.0.0.1:{port}", "CHAT_ORIGIN": f"https://localhost:{port}",
        "STACK_PUBLISH": "127.0.0.1:0", "STACK_ADMIN_KEYS": ADMIN, "STACK_DRAIN_DELAY": "0", "STACK_GRACE": "1",
    }  # fmt: skip
    files = {"STACK_TLS_CERTIFICATE_FILE": "cert.pem", "STACK_TLS_KEY_FILE": "key.pem"}
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    try:
        yield up(tree, settings | {"STACK_TLS": "files", "STACK_TLS_NAME": NAME} | files, trust)
    finally:
        tree.remove_everything()


def up(tree: Tree, settings: dict[str, str], trust: ssl.SSLContext) -> Served:
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    port = tree.run("docker", "compose", "port", "caddy", "8443", **settings).stdout.rpartition(":")[2]
    return Served(tree, settings, int(port), trust, ran.stdout)


def long_stream(client: httpx.Client) -> Any:
    body = LONG | {"max_tokens": 3000, "user": uuid4().hex}
    return client.stream("POST", CHAT, json=body, headers={"x-stack-resume": "off"})


# ── With the tests' own authority ────────────────────────────────────────────────────────────────────────────────────


def logged(served: Served, request_id: str, event: str, outcome: str = "") -> bool:
    """Whether the gateway has written such a line about the request."""
    lines = (json.loads(it) for it in docker("logs", served.container("gateway")).splitlines() if request_id in it)
    return any(it["msg"] == event and it.get("outcome", "") == outcome for it in lines)


def test_a_stream_arrives_token_by_token_over_http_2(served: Served) -> None:
    """The stream would take minutes. So each token comes before the next one is made."""
    with served.client() as client, long_stream(client) as answer:
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert "alt-svc" not in answer.headers  # the port for HTTP/3 is not published
        pieces = answer.iter_text()
        text = ""
        while text.count('"content":"') < 5:
            piece = next(pieces)
            assert piece.count('"content":"') < 3, piece
            text += piece
        request_id = answer.headers["x-request-id"]
    wait_for(lambda: logged(served, request_id, "chat_finished_stream", "client_left"), deadline=60)


def test_a_client_that_leaves_a_blocking_answer_stops_it(served: Served) -> None:
    request_id, url = f"left-{uuid4().hex}", f"https://{NAME}:{served.port}{CHAT}"
    words = ["curl", "--silent", "--insecure", "--resolve", f"{NAME}:{served.port}:127.0.0.1", url]
    words += ["--header", "authorization: Bearer dev-key", "--header", f"x-request-id: {request_id}", "--json"]
    with subprocess.Popen([*words, json.dumps(LONG | {"stream": False, "max_tokens": 3000})]) as client:
        try:
            wait_for(lambda: logged(served, request_id, "chat_started"), deadline=60)
        finally:
            client.kill()
    wait_for(lambda: logged(served, request_id, "chat_finished", "client_left"), deadline=60)


@pytest.mark.parametrize("http2", [True, False])
def test_a_stream_that_the_gateway_breaks_off_is_an_error_at_the_client(served: Served, http2: bool) -> None:
    """Its key is disabled. The cut comes after the error event, and is not a clean end. Caddy logs the cut, without the
    key."""
    admin = {"authorization": f"Bearer {ADMIN}"}
    with served.client() as client:
        made = client.post("/admin/keys", json={"name": "cut"}, headers=admin).raise_for_status().json()
    text = ""
    with served.client(made["secret"], http2=http2) as client, served.client() as other, long_stream(client) as answer:
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        pieces = answer.iter_text()
        while '"content":"' not in text:
            text += next(pieces)
        path = f"/admin/keys/{made['key']['id']}"
        other.patch(path, json={"disabled": True}, headers=admin).raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012
            for piece in pieces:
                text += piece
    assert json.loads(text.rpartition("data: ")[2])["error"]["code"] == "invalid_api_key"
    log = wait_for(lambda: told if "incomplete" in (told := caddy_log(served)) else "")
    assert made["secret"] not in log


def caddy_log(served: Served) -> str:
    done = subprocess.run(["docker", "logs", served.container("caddy")], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_another_authority_another_name_and_plain_http_are_refused(served: Served) -> None:
    untrusted = pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED")
    with served.client(verify=ssl.create_default_context()) as client, untrusted:
        client.get("/health")
    with served.client() as client:
        with pytest.raises(httpx.ConnectError):
            client.get("/health", extensions={"sni_hostname": "other.test"})
        answer = client.get("/health", headers={"host": "other.test"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_host")
    for address in (f"127.0.0.1:{served.port}", served.chat):
        plain = httpx.get(f"http://{address}/health", headers={"host": NAME})
        assert (plain.status_code, plain.text) == (400, "Client sent an HTTP request to an HTTPS server.\n")


def test_only_caddy_is_published_and_it_has_no_rights(served: Served) -> None:
    assert not any(served.inspect(it)["HostConfig"]["PortBindings"] for it in ("gateway", "chat"))
    published = served.inspect("caddy")["HostConfig"]["PortBindings"]
    assert {it: [to["HostIp"] for to in where] for it, where in published.items()} == {
        "8443/tcp": ["127.0.0.1"],
        "8444/tcp": ["127.0.0.1"],
    }
    status = docker("exec", served.container("caddy"), "sh", "-c", "cat /proc/[0-9]*/status; true")
    assert set(re.findall(r"^CapEff:\t(\w+)", status, re.MULTILINE)) == {"0" * 16}
    assert set(re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)) == {"10003"}
    listening = docker("exec", served.container("caddy"), "cat", "/proc/net/tcp", "/proc/net/tcp6")
    ports = {int(it[1], 16) for it in re.findall(r": (\w+):(\w{4}) 0+:0000 0A", listening)}
    assert 2019 not in ports  # Caddy's admin API
    assert {8080, 8443} <= ports
    wait_for(lambda: served.inspect("caddy")["State"]["Health"]["Status"] == "healthy", deadline=100)


def test_certificate_files_have_no_root_certificate_of_caddys(served: Served) -> None:
    ran = served.tree.run("scripts/tls-root", **served.settings)
    assert (ran.returncode, "STACK_TLS=local" in ran.stdout) == (1, True), ran.stdout


def sign_in(client: httpx.Client, key: str, claimed: str) -> httpx.Response:
    """Sign in at the console as a browser does, and claim to be at that address."""
    visit = Visit(f"{client.base_url.scheme}://{client.headers['host']}")
    visit.http = client
    form = {"form_token": visit.token("/console/sign-in"), "key": key}
    return visit.post("/console/sign-in", form, **{"x-forwarded-for": claimed})


SIGN_IN = """
import httpx, re
with httpx.Client(base_url="https://caddy:8443", verify=False, headers={"host": "NAME"}) as client:
    def send(method, path, **more):
        return client.request(method, path, extensions={"sni_hostname": "NAME"}, **more)
    token = re.search('name="form_token" value="([0-9a-f]+)"', send("GET", "/console/sign-in").text)[1]
    form = {"form_token": token, "key": "wrong"}
    print(send("POST", "/console/sign-in", data=form, headers={"origin": "https://NAME"}).status_code)
"""


def test_a_visitors_address_is_caddys_word_and_nobody_elses(served: Served) -> None:
    """The console bounds the wrong keys of an address. A forged header is no other address, through Caddy or past it.
    Another container is one."""
    with served.client() as client:
        cookies = sign_in(client, ADMIN, "198.51.100.1").headers.get_list("set-cookie")
        (cookie,) = (it for it in cookies if it.startswith("stack_console=") and "Max-Age=0" not in it)
        assert "Secure" in cookie.split("; ")
        client.cookies.clear()
        assert sign_in(client, "wrong", "198.51.100.1").status_code == 401
        assert any(sign_in(client, "wrong", f"198.51.100.{it}").status_code == 429 for it in range(40))
    gateway = served.inspect("gateway")["NetworkSettings"]["Networks"][f"{served.tree.project}_edge"]["IPAddress"]
    with httpx.Client(base_url=f"http://{gateway}:9000", headers={"host": NAME}) as past:
        assert any(sign_in(past, "wrong", f"198.51.100.{it}").status_code == 429 for it in range(40))
    other = docker("exec", served.container("gateway"), "python", "-c", SIGN_IN.replace("NAME", NAME))
    assert other == "401"


def test_the_chat_window_has_a_port_and_so_an_origin_of_its_own(served: Served) -> None:
    with served.client() as client:
        found = client.get(f"https://{served.chat}/")
        assert client.get("/").status_code == 404
    assert "<title>A chat window</title>" in found.text
    assert found.headers["strict-transport-security"] == "max-age=31536000"


def test_while_the_gateway_is_away_the_error_says_so(served: Served) -> None:
    docker("stop", served.container("gateway"))
    try:
        with served.client() as client:
            answer = client.get("/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (502, "5")
        assert answer.json()["error"]["code"] == "gateway_unavailable"
    finally:
        docker("start", served.container("gateway"))


# ── With Caddy's own ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def local(served: Served) -> Served:
    """The local form, which takes the place of the files form."""
    key = served.chat_key
    local = up(served.tree, served.settings | {"STACK_TLS": "local", "STACK_TLS_NAME": "localhost"}, served.trust)
    assert local.chat_key == key, "the chat window keeps its key"
    ran = local.tree.run("make", "--silent", "tls-root", **local.settings)
    assert ran.returncode == 0, ran.stdout
    local.trust = ssl.create_default_context(cafile=str(local.tree.path / "tls-root.crt"))
    return local


def test_the_root_certificate_of_caddys_own_authority_is_exported_and_trusted(local: Served) -> None:
    """And the line that `make up` prints works as it stands, and `make doctor` knows the certificate."""
    url = f"https://localhost:{local.port}"
    assert f"base URL  {url}/v1" in local.said
    (line,) = re.findall(r"^    (curl .*\n.*\n.*)$", local.said, re.MULTILINE)
    assert "\ndata: [DONE]\n" in local.tree.run("bash", "-euc", line).stdout
    answer = httpx.get(url + "/health", verify=local.trust)
    assert answer.status_code == 200
    said = local.tree.run("scripts/doctor", **local.settings).stdout
    assert "    ok: certificate: the certificate for localhost ends in 1" in said, said
    assert "    ok: ready: " in said, said  # the gateway, asked without the proxy
    assert "    ok: chat: " in said, said
    published = f"only caddy at 127.0.0.1:{local.port}; the chat window by TLS at {local.chat}"
    assert f"    ok: published: {published}\n" in said, said
    assert "strict-transport-security" not in answer.headers  # it would hold for every port of localhost
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url + "/health")


def enter(person: Page, name: str, how: str) -> str:
    """Sign up or in at the chat window, and return the person's id."""
    browser.visit(person, "/")
    fill_in(person, name, how)
    expect(person.get_by_role("status")).to_have_text(re.compile(r"^(admin|user) "))
    (cookie,) = person.context.cookies()
    assert (cookie["name"], cookie["secure"], cookie["httpOnly"]) == ("token", True, True)
    return person.get_by_role("status").inner_text().split()[1]


def fill_in(person: Page, name: str, button: str) -> None:
    person.get_by_label("Email").fill(f"{name}@people.example")
    person.get_by_label("Password").fill("secret")
    person.get_by_role("button", name=button).click()


def send(person: Page, tokens: int) -> None:
    """Ask for an answer of that many tokens, which is always the same one."""

    def goes_on(route: Route) -> None:
        more = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        route.continue_(post_data=route.request.post_data_json | more)

    person.route("**/api/chat/completions", goes_on)
    person.get_by_label("Message").fill(LONG["messages"][0]["content"])
    person.get_by_role("button", name="Send").click()


def test_two_people_chat_in_a_browser_and_have_usage_rows_of_their_own(local: Served, tmp_path: Path) -> None:
    """The browser trusts Caddy's root certificate. The first answer would take minutes, so what grows is no replay."""
    url = f"https://{local.chat.replace('127.0.0.1', 'localhost')}"
    assert f"Chat        {url} " in local.said
    refused = pytest.raises(Error, match="ERR_CERT_AUTHORITY_INVALID")
    with browser.chromium() as chromium, browser.page(chromium, url) as stranger, refused:
        browser.visit(stranger, "/")
    browser.trust(local.tree.path / "tls-root.crt", tmp_path)
    with (
        browser.chromium(tmp_path) as chromium,
        browser.page(chromium, url) as ann,
        browser.page(chromium, url) as bob,
    ):
        enter(ann, "ann", "Sign up")
        fill_in(ann, "bob", "Add user")
        expect(ann.get_by_role("status")).to_contain_text("user ")
        bobs_id = enter(bob, "bob", "Sign in")
        send(ann, 3000)
        expect(ann.locator("#answer")).not_to_be_empty(timeout=2 * browser.PATIENCE)
        send(bob, 2)
        expect(bob.get_by_role("status")).to_have_text("finished")
        for _ in range(2):
            so_far = ann.locator("#answer").inner_text()
            expect(ann.locator("#answer"), ann.get_by_role("status").inner_text()).not_to_have_text(so_far)
        ann.get_by_role("button", name="Stop").click()
        ran = local.tree.run("scripts/stack", "keys", "users", local.chat_key, "--find", bobs_id, **local.settings)
        rows = wait_for(lambda: found if len(found := tokens_by_user(local)) == 2 else None, deadline=60)
    assert rows.pop(ran.stdout.strip()) == 2
    assert 2 < rows.popitem()[1] < 3000


def tokens_by_user(local: Served) -> dict[str, int]:
    url = f"https://localhost:{local.port}/admin/usage?by=user&key={local.chat_key}"
    answer = httpx.get(url, headers={"authorization": f"Bearer {ADMIN}"}, verify=local.trust).raise_for_status()
    return {it["user"]: it["tokens_out"] for it in answer.json()["data"]}


# ── What cannot run here ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("form", "valid"), [("acme", True), ("nonsense", False)])
def test_caddy_accepts_the_configuration_for_a_public_name(served: Served, form: str, valid: bool) -> None:
    image = served.inspect("caddy")["Image"]
    words = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        f"--env=STACK_TLS={form}",
        "--env=STACK_TLS_NAME=llm.example.org",
    ]
    check = ["--entrypoint=caddy", image, "validate", "--adapter=caddyfile", "--config=/etc/caddy/Caddyfile"]
    ran = subprocess.run([*words, *check], capture_output=True, text=True, check=False)
    assert (ran.returncode == 0) == valid, ran.stderr


def test_a_caddy_that_ends_broken_streams_cleanly_is_refused(tmp_path: Path, caddy: str) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {caddy}\nRUN printf '#!/bin/sh\\necho v2.6.2\\n' >/usr/bin/caddy\n")
    tag = f"stack-test-{uuid4().hex[:8]}"
    docker("build", "--quiet", "--tag", tag, str(tmp_path))
    try:
        words = ["docker", "build", "--build-arg", f"CADDY_IMAGE={tag}", str(Path(__file__).parents[2] / "tls")]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ran.returncode != 0
        assert "Caddy v2.6.2 is too old: use 2.8 or newer (CADDY_IMAGE)." in ran.stdout + ran.stderr
    finally:
        docker("rmi", "--force", tag)
