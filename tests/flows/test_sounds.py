"""Sounds made texts, and texts made sounds: relayed where an engine can, a 404 where none can, counted by length."""

import io
import os
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.face_setting import Setting
from tests.support.faces import script
from tests.support.fakes.forms import described
from tests.support.parameters import SOUND, form
from tests.support.processes import (
    KEY,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    post,
    running_gateway,
    scrape,
    wait_for,
    was_cut,
)

TEXTS, SPEECH = "/v1/audio/transcriptions", "/v1/audio/speech"
ADMIN = "sk-admin-0123456789abcdef"


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def transcribe(
    http: httpx.Client, model: str, file: tuple[str, bytes, str] | None = SOUND, headers: Any = None, **said: Any
) -> httpx.Response:
    content, kinds = form({"model": model} | said, file)
    return post(http, TEXTS, content=content, headers=kinds | (headers or {}))


def recorded(seconds: float) -> tuple[str, bytes, str]:
    """A WAV file of that length."""
    data = io.BytesIO()
    with wave.open(data, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(int(seconds * 8000) * 2))
    return "a.wav", data.getvalue(), "audio/wav"


def finished(gateway: GatewayProcess, answer: httpx.Response) -> dict[str, Any]:
    (line,) = (it for it in gateway.lines(answer.headers["x-request-id"]) if "outcome" in it)
    return line


# -- texts of sounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "seconds"), [("vllm", 2.0), ("ollama", 1.5)])
def test_a_sound_goes_to_an_engine_that_hears_as_it_came(
    http: httpx.Client, before_all: GatewayProcess, fakes: dict[str, FakeEngine], engine: str, seconds: float
) -> None:
    """vLLM tells how long it is. Ollama does not, and the head of the file does."""
    fakes[engine].set()
    name, data, kind = recorded(1.5)
    answer = transcribe(http, engine, (name, data, kind), language="en", prompt="Numbers: 1, 2", temperature=0.5)
    assert (answer.status_code, answer.json()["text"]) == (200, "one two three")
    assert answer.headers["content-type"] == "application/json"
    (seen,) = fakes[engine].asked(TEXTS)
    assert seen["body"]["file"] == described(name, kind, data)
    assert (seen["body"]["model"], seen["body"]["language"], seen["body"]["prompt"]) == (
        "fake-model",
        "en",
        "Numbers: 1, 2",
    )
    line = finished(before_all, answer)
    assert (line["msg"], line["outcome"], line["seconds"]) == ("transcription_finished", "finished", seconds)
    assert line["tokens_out"] == 0


def test_plain_text_is_made_of_the_engines_json(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    answer = transcribe(http, "vllm", response_format="text")
    assert (answer.text, answer.headers["content-type"]) == ("one two three\n", "text/plain; charset=utf-8")
    (seen,) = fakes["vllm"].asked(TEXTS)
    assert seen["body"]["response_format"] == "json"


@pytest.mark.parametrize(("path", "engine"), [(TEXTS, "llamacpp"), (SPEECH, "ollama"), (SPEECH, "llamacpp")])
def test_without_an_engine_that_can_it_is_a_404_and_no_engine_is_asked(
    http: httpx.Client, fakes: dict[str, FakeEngine], path: str, engine: str
) -> None:
    fakes[engine].set()
    answer = transcribe(http, engine) if path == TEXTS else http.post(path, json={"model": engine, "input": "Hi"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "unsupported")
    assert path in error["message"]
    assert fakes[engine].asked(path) == []


def test_of_a_models_engines_one_that_can_is_asked(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    answer = http.post(SPEECH, json={"model": "ollama-then-vllm", "input": "Hi", "voice": "alloy"})
    assert answer.status_code == 200
    assert len(fakes["vllm"].asked(SPEECH)) == 1


def test_an_engine_without_the_endpoint_says_so_itself(faced: Setting) -> None:
    """vLLM has speech only with an extension."""
    answer = transcribe(faced.client, "fake-model", prompt=script(["json", [404, {"detail": "Not Found"}]]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")


WRONG: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no file": ({"content": b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nx\r\n--b--'}, 400, "file"),
    "a text for a file": ({"file": ("", b"x", ""), "content": b'--b\r\ncontent-disposition: form-data; name="file"\r\n'
                           b"\r\nx\r\n--b--\r\n"}, 400, "file"),
    "a stream": ({"stream": "true"}, 400, "stream"),
    "subtitles": ({"response_format": "srt"}, 400, "response_format"),
    "an unknown model": ({"model": "nope"}, 404, "model"),
    "a field that steers the engine": ({"vllm_xargs": "x"}, 400, "vllm_xargs"),
    "other capitals": ({"Model": "x"}, 400, "Model"),
    "no end": ({"content": b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nx'}, 400, None),
    "no part": ({"content": b"x"}, 400, None),
    "no name": ({"content": b"--b\r\nx: y\r\n\r\nx\r\n--b--\r\n"}, 400, None),
    "a name twice": ({"content": b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nx\r\n' * 2 + b"--b--"},
                     400, "model"),
    "too many parts": ({"content": b"".join(b'--b\r\ncontent-disposition: form-data; name="x%d"\r\n\r\nx\r\n' % it
                                            for it in range(99)) + b"--b--"}, 400, None),
    "a body beyond the limit": ({"file": ("a.wav", bytes(200_000), "audio/wav")}, 413, None),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_form_is_named(faced: Setting, case: str) -> None:
    said, status, param = WRONG[case]
    if "content" in said:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = faced.client.post(TEXTS, content=said["content"], headers=headers)
    else:
        fields = {"model": "fake-model", "file": SOUND} | said
        answer = transcribe(faced.client, fields.pop("model"), fields.pop("file"), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


FILES: dict[str, bytes] = {
    ".NET": b"form-data; name=file; filename=a.mp3; filename*=utf-8''a.mp3",
    "quoted": b'form-data; name="file"; filename="a.mp3"',
    "white space": b'form-data ;\tname = "file" ; filename = a.mp3',
    "no white space": b"form-data;name=file;filename=a.mp3",
    "an extended name only": b"form-data; name=\"file\"; filename*=utf-8''a.mp3",
    "a name that looks like a parameter": b'form-data; filename="; name=x; a.mp3"; name="file"',
}


@pytest.mark.parametrize("written", FILES)
def test_a_form_is_read_however_a_client_writes_its_parameters(faced: Setting, written: str, mark: str) -> None:
    content = b"--b\r\nContent-Disposition: form-data; name=prompt\r\n\r\n%b\r\n" % mark.encode()
    content += b"--b\r\ncontent-disposition: %b\r\n\r\n\xff\x00\r\n--b--\r\n" % FILES[written]
    headers = {"content-type": 'multipart/form-data;\tboundary="b"'}
    assert faced.client.post(TEXTS, content=content, headers=headers).status_code == 200
    (body,) = (it["body"] for it in faced.one.seen() if it["body"].get("prompt") == mark)
    name = "_name_x_a.mp3" if "looks" in written else "a.mp3"
    assert body["file"] == described(name, "application/octet-stream", b"\xff\x00")


def test_json_is_no_form_and_a_form_no_json(faced: Setting) -> None:
    content, kinds = form({"model": "fake-model"})
    assert faced.client.post(TEXTS, json={"model": "fake-model"}).status_code == 415
    assert faced.client.post(TEXTS, content=content, headers={"content-type": "multipart/form-data"}).status_code == 415
    assert faced.client.post("/v1/embeddings", content=content, headers=kinds).status_code == 415


def test_a_form_without_a_model_is_for_the_default_model(faced: Setting) -> None:
    content, kinds = form({"language": "en"})
    answer = faced.client.post(TEXTS, content=content, headers=kinds)
    assert (answer.status_code, answer.json()["usage"]["seconds"]) == (200, 3)


def test_a_repeated_form_is_answered_once_whatever_its_boundary(faced: Setting, mark: str) -> None:
    """A client that repeats a request writes the form anew."""
    headers = {"idempotency-key": mark}
    first, second = (transcribe(faced.client, "fake-model", headers=headers, language=mark) for _ in range(2))
    other = transcribe(faced.client, "fake-model", headers=headers, language="de")
    assert (first.status_code, second.headers["idempotent-replayed"], other.status_code) == (200, "true", 409)
    assert sum(it["body"].get("language") == mark for it in faced.one.seen()) == 1


def test_a_large_file_is_held_twice_and_counted_as_such(faced: Setting, tmp_path: Path) -> None:
    """As it came, and as the engine gets it."""
    settings = {"STACK_WORKERS": "1", "STACK_BODY_BUDGET_BYTES": "30000000", "LLM_BACKEND": "vllm"}
    with running_gateway(tmp_path / "log", faced.one.url, **settings) as gateway, gateway.client() as http:
        assert transcribe(http, "fake-model").status_code == 200
        (worker,) = gateway.workers()
        before = peak(worker)
        large = ("a.wav", os.urandom(14_000_000), "audio/wav")
        assert transcribe(http, "fake-model", large).status_code == 200
        assert peak(worker) - before < 3 * 14_000_000
        refused = transcribe(http, "fake-model", ("a.wav", bytes(16_000_000), "audio/wav"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert faced.one.seen()[-1]["body"]["file"] == described(large[0], large[2], large[1])


def peak(pid: int) -> int:
    """The most bytes of memory that a process had so far."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


# -- sounds of texts --------------------------------------------------------------------------------------------------


def speak(http: httpx.Client, *steps: list[Any], **more: Any) -> httpx.Response:
    return post(http, SPEECH, json={"model": "fake-model", "input": script(*steps), "voice": "alloy"}, **more)


HEAD: list[Any] = ["head", [200, {"content-type": "audio/mpeg"}]]


def test_a_sound_comes_in_pieces_with_its_type(faced: Setting, mark: str) -> None:
    said = script(HEAD, ["text", "one"], ["gate", mark], ["text", " two"], ["end"])
    body = {"model": "fake-model", "input": said, "voice": "alloy"}
    with faced.client.stream("POST", SPEECH, json=body) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"one"  # while the engine has the rest
        faced.one.release(mark)
        assert b"".join(pieces) == b" two"
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/mpeg")
    line = finished(faced.gateway, answer)
    assert (line["msg"], line["outcome"], line["characters"]) == ("speech_finished", "finished", len(said))


@pytest.mark.parametrize("end", [["close"], ["reset"]])
def test_a_sound_that_breaks_off_is_a_broken_connection(faced: Setting, end: list[Any]) -> None:
    answer = speak(faced.client, HEAD, ["text", "one"], ["pause", 0], end)
    assert (answer.status_code, was_cut(answer), answer.content) == (200, True, b"one")
    line = finished(faced.gateway, answer)
    assert (line["outcome"], "characters" in line) == ("engine_broken_stream", False)


def test_a_sound_with_an_idempotency_key_is_repeated_whole_and_cut_if_it_broke_off(faced: Setting, mark: str) -> None:
    steps = [HEAD, ["text", "one"], ["text", " two"], ["end"]]
    first, second = (speak(faced.client, *steps, headers={"idempotency-key": mark}) for _ in range(2))
    assert first.content == second.content == b"one two"
    assert (second.headers["idempotent-replayed"], second.headers["content-type"]) == ("true", "audio/mpeg")
    assert not was_cut(second)
    broken = speak(
        faced.client, HEAD, ["text", "one"], ["pause", 0], ["close"], headers={"idempotency-key": mark + "b"}
    )
    assert (broken.status_code, was_cut(broken), broken.content) == (200, True, b"one")


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([["json", [500, {"error": {"message": "CUDA"}}]]], 502),
        ([["json", [200, {"error": "x"}]]], 502),
        ([["head", [200, {"content-type": "text/html"}]], ["text", "x"], ["end"]], 502),
        ([HEAD, ["end"]], 502),
        ([["json", [400, {"error": {"message": "Unknown voice", "param": "voice"}}]]], 400),
    ],
)
def test_an_error_before_the_sound_keeps_its_status(faced: Setting, steps: list[Any], status: int) -> None:
    answer = speak(faced.client, *steps)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("said", [None, "", ["a"], 3])
def test_a_text_to_speak_is_one_text(faced: Setting, said: Any) -> None:
    answer = faced.client.post(SPEECH, json={"model": "fake-model", "input": said})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


# -- both -------------------------------------------------------------------------------------------------------------


def test_the_openai_package_hears_and_speaks(faced: Setting, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=faced.gateway.url + "/v1", api_key=KEY, max_retries=0) as client:
        told = client.audio.transcriptions.create(model="fake-model", file=("a.wav", b"RIFF"), language="en")
        text = client.audio.transcriptions.create(model="fake-model", file=b"RIFF", response_format="text")
        target = tmp_path / "said.mp3"
        with client.audio.speech.with_streaming_response.create(
            model="fake-model", voice="alloy", input="Good morning."
        ) as answer:
            answer.stream_to_file(target)
        with pytest.raises(openai.BadRequestError) as error:
            client.audio.speech.create(model="fake-model", voice="alloy", input="")
    assert (told.text, str(text)) == ("one two three", "one two three\n")
    assert target.read_bytes() == b"one two three"
    assert error.value.param == "input"


def test_usage_and_metrics_count_seconds_and_characters_and_no_tokens(tmp_path: Path) -> None:
    port = free_port()
    settings = {"STACK_METRICS_BIND": f"127.0.0.1:{port}", "STACK_ADMIN_KEYS": ADMIN, "LLM_BACKEND": "vllm"}
    settings |= {"STACK_LIMIT_TOKENS_PER_DAY": "1"}  # sounds take none
    with (
        fake_engine() as engine,
        running_gateway(tmp_path / "log", engine.url, **settings) as gateway,
        gateway.client() as http,
    ):
        for _ in range(2):
            assert transcribe(http, "fake-model").status_code == 200
            assert http.post(SPEECH, json={"input": "Grüße", "voice": "alloy"}).status_code == 200
        found = usage(gateway)
        samples = scrape(port)
    assert (found["transcriptions"]["audio_ms"], found["transcriptions"]["characters"]) == (6000, 0)
    assert (found["speech"]["audio_ms"], found["speech"]["characters"]) == (0, 10)
    assert {it["tokens_in"] + it["tokens_out"] for it in found.values()} == {0}
    assert samples.by("stack_audio_seconds_total", "api") == {"transcriptions": 6.0}
    assert samples.by("stack_spoken_characters_total", "api") == {"speech": 10.0}


def usage(gateway: GatewayProcess) -> dict[str, dict[str, Any]]:
    """The usage by API, once all four requests are in it."""

    def look() -> dict[str, dict[str, Any]]:
        headers = {"authorization": f"Bearer {ADMIN}"}
        told = httpx.get(gateway.url + "/admin/usage?by=api", headers=headers, verify=NO_TLS).json()["data"]
        return {it["api"]: it for it in told} if sum(it["requests"] for it in told) == 4 else {}

    return wait_for(look, deadline=10)
