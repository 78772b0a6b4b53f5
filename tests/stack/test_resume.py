"""Docker kills the real engine in the midst of greedy answers, and they become what they would have been without: what
docs/when-an-engine-dies.md says of it.

A second gateway, from the stack's image, with two engines on the stack's private network. One of them dies; it can be
slowed down, so that it does so where a test wants it to. Each has one thread: its tokens are the same however busy the
machine is.
"""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

import httpx
import pytest
from docker.models.containers import Container

from tests.support.faces import text_of as text_of_face
from tests.support.mixed_answers import MixedAnswer
from tests.support.processes import AUTH, KEY, events, text_of, wait_for
from tests.support.stack import Stack

CHAT = "/v1/chat/completions"
CLIENTS = 10
TOKENS = 16
# At each of its tokens the model is sure.
COUNT = ["Count from 1 to 6.", "1, 2, 3, 4, 5, 6", "Count from 1 to 6."]
# So it is here, where it answers with many a 🎉, each of them three tokens.
PARTY = ["Party!", "Hurray! " + "🎉" * 12, "Party!", "Hurray! " + "🎉" * 12, "Party!"]
STORY = ["Write a story about a dragon."]
CONFIG = """
engines:
  mortal: {dialect: llamacpp, base_url: "http://mortal:8080/v1"}
  standby: {dialect: llamacpp, base_url: "http://standby:8080/v1"}
  few: {dialect: llamacpp, slots: 4, base_url: "http://mortal:8080/v1"}
models:
  few: {targets: [{engine: few, model: SmolLM2-135M-Instruct}]}
  pair:
    targets: [{engine: mortal, model: SmolLM2-135M-Instruct}]
    fallbacks: [{engine: standby, model: SmolLM2-135M-Instruct}]
  alone: {targets: [{engine: mortal, model: SmolLM2-135M-Instruct}]}
  standby: {targets: [{engine: standby, model: SmolLM2-135M-Instruct}]}
default_model: pair
"""
# Until the engine has made so many tokens of an answer.
MADE = """
import json, urllib.request
while True:
    slots = json.load(urllib.request.urlopen("http://mortal:8080/slots"))
    if any(slot["next_token"][0]["n_decoded"] >= {} for slot in slots if slot["is_processing"]):
        break
"""


class Stream(threading.Thread):
    """A greedy answer, as far as its client has got it."""

    def __init__(self, url: str, **said: Any) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.body = request(stream=True, stream_options={"include_usage": True}, **said)
        self.raw = ""
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url + CHAT, json=self.body, headers=AUTH, timeout=120) as answer:
            for piece in answer.iter_text():
                self.raw += piece

    @property
    def chunks(self) -> list[Any]:
        return events(self.raw.rpartition("\n\n")[0])

    @property
    def pieces(self) -> int:
        return self.raw.count('"content":"')

    @property
    def resumes(self) -> list[str]:
        return [line for line in self.raw.splitlines() if line.startswith(": resumed")]

    def before_the_seam(self) -> int:
        """How many pieces the engine that died had made."""
        return self.raw.partition(": resumed")[0].count('"content":"')

    def wait(self) -> str:
        """Its text, once it is whole: one id, one role, one end, and usage of all."""
        self.join(120)
        *chunks, usage, done = self.chunks
        assert done == "[DONE]", self.raw
        assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1
        choices = [chunk["choices"][0] for chunk in chunks]
        assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1), self.raw
        assert [it["finish_reason"] for it in choices] == [None] * (len(choices) - 1) + ["length"]
        assert usage["usage"]["total_tokens"] == sum(
            usage["usage"][it] for it in ("prompt_tokens", "completion_tokens")
        )
        return text_of(chunks)


def request(*, turns: list[str] = COUNT, **said: Any) -> dict[str, Any]:
    messages = [
        {"role": role, "content": turn} for role, turn in zip(cycle(["user", "assistant"]), turns, strict=False)
    ]
    return {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | said


@dataclass
class Scene:
    """A gateway, and the engine that dies."""

    url: str
    gateway: Container
    mortal: Container

    def ask(self, **said: Any) -> Stream:
        return Stream(self.url, **said)

    def slow(self, share: float) -> None:
        """Give the engine this share of a core."""
        self.mortal.update(cpu_period=100_000, cpu_quota=int(share * 100_000))

    def wait_made(self, tokens: int) -> None:
        """Until the engine has made so many tokens of an answer."""
        status, output = self.gateway.exec_run(["python", "-c", MADE.format(tokens)])
        assert status == 0, output.decode()

    def kill_after(self, pieces: int, streams: list[Stream], *, share: float = 1) -> None:
        """`docker kill`, once each client has so many pieces of its answer. `share` is the engine's part of a core for
        the last of them, and five times that for those before: on a quick machine a token takes a tenth of what Docker
        takes to change that."""
        self.slow(min(1.0, 5 * share))
        wait_for(lambda: all(it.pieces >= pieces - 3 for it in streams), deadline=100)
        self.slow(share)
        wait_for(lambda: all(it.pieces >= pieces for it in streams), deadline=100)
        self.mortal.kill()

    def start(self) -> None:
        self.slow(1)
        self.mortal.start()


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    config = tmp_path_factory.mktemp("resume")
    config.chmod(0o755)
    (config / "stack.yaml").write_text(CONFIG)
    backend = stack.docker.networks.get(f"{stack.project}_backend")
    with ExitStack() as closing:

        def container(service: str, **options: Any) -> Container:
            made = stack.docker.containers.create(stack.container(service).image, **options)
            closing.callback(made.remove, force=True)
            return made

        engines = {
            name: container(
                "engine",
                environment={"LLAMA_ARG_N_PARALLEL": "16"},
                cpuset_cpus=core,
                network=backend.name,
                networking_config={backend.name: stack.docker.api.create_endpoint_config(aliases=[name])},
            )
            for name, core in (("mortal", "0"), ("standby", str((os.cpu_count() or 1) - 1)))
        }
        gateway = container(
            "gateway",
            environment={"STACK_API_KEYS": KEY, "STACK_WORKERS": "1", "STACK_QUEUE_TIMEOUT": "250"},
            network=f"{stack.project}_edge",
            ports={"9000/tcp": ("127.0.0.1", None)},
            volumes=[f"{config}:/etc/stack:ro"],
        )
        backend.connect(gateway)
        for each in (*engines.values(), gateway):
            each.start()
        gateway.reload()
        port = gateway.attrs["NetworkSettings"]["Ports"]["9000/tcp"][0]["HostPort"]
        yield Scene(f"http://127.0.0.1:{port}", gateway, engines["mortal"])


def ready(scene: Scene) -> None:
    """Start the engine that died, and wait until the gateway knows that both run."""
    scene.start()

    def well() -> bool:
        try:
            asked = [
                httpx.post(scene.url + CHAT, json=request(model=model, max_tokens=1), headers=AUTH)
                for model in ("alone", "standby")
            ]
        except httpx.TransportError:
            return False
        return all(it.status_code == 200 for it in asked)

    wait_for(well, deadline=150)  # a minute was too short on a busy machine


@pytest.fixture
def scene(pair: Scene) -> Scene:
    """Both engines run, and the gateway knows it."""
    ready(pair)
    return pair


@pytest.fixture(scope="module")
def whole(pair: Scene) -> str:
    """What comes where nobody dies."""
    ready(pair)
    return pair.ask().wait()


def test_ten_answers_outlive_their_engine(scene: Scene, whole: str) -> None:
    """Another, standing by, goes on."""
    streams = [scene.ask() for _ in range(CLIENTS)]
    scene.kill_after(TOKENS // 2, streams)
    assert [it.wait() for it in streams] == [whole] * CLIENTS
    assert sum(it.resumes == [": resumed 1"] for it in streams) > CLIENTS // 2  # others were at their end


def test_ten_answers_outlive_two_deaths_of_their_only_engine(scene: Scene, whole: str) -> None:
    """Each time it goes on once it runs again."""
    streams = [scene.ask(model="alone") for _ in range(CLIENTS)]
    for pieces in (TOKENS // 4, TOKENS // 2):
        scene.kill_after(pieces, streams)
        scene.start()
    assert [it.wait() for it in streams] == [whole] * CLIENTS
    assert sum(it.resumes == [": resumed 1", ": resumed 2"] for it in streams) > CLIENTS // 2


def test_ten_answers_on_four_slots_outlive_their_only_engine(scene: Scene, whole: str) -> None:
    """Six of them wait for a slot when it is killed, and three seconds more before it is started again. Three of these
    are streams."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        scene.slow(0.2)
        streams = [scene.ask(model="few") for _ in range(4)]
        wait_for(lambda: all(it.pieces >= 1 for it in streams), deadline=100)
        body, url = request(model="few"), scene.url + CHAT
        waiting = [pool.submit(httpx.post, url, json=body, headers=AUTH, timeout=120) for _ in range(3)]
        streams += [scene.ask(model="few") for _ in range(3)]
        scene.mortal.kill()
        threading.Event().wait(3)  # how long it stays down
        assert not any(it.pieces for it in streams[4:])
        scene.start()
        assert [it.wait() for it in streams] == [whole] * len(streams)
        answers = [it.result() for it in waiting]
        assert [it.json()["choices"][0]["message"]["content"] for it in answers] == [whole] * len(answers)


def test_twenty_answers_of_every_kind_outlive_their_only_engine(scene: Scene) -> None:
    """JSON, forced tool calls and several choices, on four slots."""
    scene.slow(0.7)
    answers = [MixedAnswer(scene.url, number) for number in range(20)]
    with ThreadPoolExecutor(len(answers)) as pool:
        running = [pool.submit(it.run) for it in answers]
        wait_for(lambda: sum(it.at_work for it in answers) == 4, deadline=200)  # none of them may be the reason
        scene.mortal.kill()
        scene.start()
        for it in running:
            it.result()
    for answer in answers:
        answer.check()
    assert sum(": resumed 1" in it.raw for it in answers) >= 2


@pytest.mark.parametrize(("model", "pieces"), [("pair", 1), ("alone", TOKENS - 1)])
def test_killed_after_the_first_token_and_before_the_last(scene: Scene, whole: str, pieces: int, model: str) -> None:
    """On a busy machine the engine may send another token before it dies: then once more."""
    for _ in range(5):
        stream = scene.ask(model=model)
        scene.kill_after(pieces, [stream], share=0.01)
        if model == "alone":
            scene.start()
        assert stream.wait() == whole
        if stream.before_the_seam() == pieces:
            return
        ready(scene)
    pytest.fail("the engine was never killed there")


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "responses": ("/v1/responses", {"input": COUNT[0], "max_output_tokens": TOKENS}, "response.incomplete"),
    "messages": (
        "/v1/messages",
        {"messages": [{"role": "user", "content": COUNT[0]}], "max_tokens": TOKENS},
        "message_stop",
    ),
}


@pytest.mark.parametrize(("api", "model"), [("responses", "pair"), ("messages", "alone")])
def test_streams_of_the_other_apis_outlive_their_engine(scene: Scene, api: str, model: str) -> None:
    path, asked, last = OTHERS[api]
    body = asked | {"model": model, "temperature": 0, "stream": True}

    ids: list[str] = []

    def answer(at: int) -> list[dict[str, Any]]:
        """Its events. The engine is killed after the event with that number."""
        told: list[dict[str, Any]] = []
        with httpx.stream("POST", scene.url + path, json=body, headers=AUTH, timeout=120) as response:
            ids.append(response.headers["x-request-id"])
            for line in response.iter_lines():
                told += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
                if line.startswith("data: ") and len(told) == at:
                    scene.mortal.kill()
                    if model == "alone":
                        scene.start()
        return told

    whole = answer(-1)
    scene.slow(0.1)
    resumed = answer(12)
    assert [it[-1]["type"] for it in (whole, resumed)] == [last, last]
    assert text_of_face(resumed) == text_of_face(whole) != ""
    if api == "responses":
        assert [it["sequence_number"] for it in resumed] == list(range(len(resumed)))
        assert {it["output_index"] for it in resumed if "output_index" in it} == {0}
        assert [it["type"] for it in resumed].count("response.output_item.added") == 1
    else:
        assert {it["index"] for it in resumed if "index" in it} == {0}
        assert [it["type"] for it in resumed].count("content_block_start") == 1

    def finished() -> dict[str, Any]:
        log = scene.gateway.logs().decode().splitlines()
        lines = [json.loads(it) for it in log if ids[-1] in it and '"outcome"' in it]
        return lines[0] if lines else {}

    told = wait_for(finished)
    assert (told["api"], told["resumes"], told["outcome"]) == (api, 1, "finished")


def test_killed_inside_a_character(scene: Scene) -> None:
    """The client has nothing of it then: llama.cpp keeps it back until it is whole. The gateway takes it for one
    token, so some more are made in the end."""
    uncut = scene.ask(turns=PARTY)
    whole = uncut.wait()
    before = whole.partition("🎉")[0]
    pieces = uncut.raw.partition("🎉")[0].count('"content":"') - 1
    assert before
    scene.slow(0.01)
    stream = scene.ask(turns=PARTY)
    scene.wait_made(pieces + 1)
    scene.mortal.kill()
    assert stream.wait().startswith(whole)
    assert stream.before_the_seam() == pieces


def test_a_blocking_answer_is_continued_too(scene: Scene, whole: str) -> None:
    """Its engine is asked for a stream."""
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, scene.url + CHAT, json=request(), headers=AUTH, timeout=100)
        scene.slow(0.1)
        scene.wait_made(TOKENS // 2)
        scene.mortal.kill()
        answer = asked.result()
    assert answer.json()["choices"][0]["message"]["content"] == whole
    assert answer.json()["usage"]["completion_tokens"] == TOKENS
    assert answer.headers["x-stack-resumes"] == "1"


def test_only_where_two_words_are_about_equally_likely_the_answer_may_differ(scene: Scene) -> None:
    """An engine that reads the text so far at once gets other numbers, in their last digits, than one that made it word
    by word. Where two words are about equally likely the other one may come then, and all that follows from it."""
    body = request(turns=STORY, model="standby", logprobs=True, top_logprobs=5)
    answer = httpx.post(scene.url + CHAT, json=body, headers=AUTH, timeout=100).json()
    tokens = answer["choices"][0]["logprobs"]["content"]
    whole = "".join(token["token"] for token in tokens)
    streams = [scene.ask(turns=STORY) for _ in range(3)]
    scene.kill_after(TOKENS // 2, streams)
    for text in {it.wait() for it in streams} - {whole}:
        ends = accumulate(len(token["token"]) for token in tokens)
        waver = next(token for token, end in zip(tokens, ends, strict=True) if not text.startswith(whole[:end]))
        best, *others = waver["top_logprobs"]
        assert best["logprob"] - others[0]["logprob"] < 1, (whole, text)
