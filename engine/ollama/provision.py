#!/usr/bin/env python3
"""Fetch the models of LLM_MODELS, or LLM_MODEL, into the volume from which the engine serves. Exits 0, or 1 with a
message.

Ollama downloads, checks and resumes, and this program drives its API. With --present, it prints how many bytes of the
first model an earlier run has left. With --list, it prints the models on the volume and their bytes. With --remove, it
deletes the models that follow.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from provisioning import FULL_DISK, SILENCE, Report, complete, forget, provision, provisioned, wanted

API = "http://" + os.environ.get("OLLAMA_HOST", "127.0.0.1:11434")
OWN = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # asks this container's Ollama, and no proxy
BLOBS = Path.home() / ".ollama/models/blobs"

# The meaning of Ollama's messages. The first match counts, and the bool says whether another attempt may help.
MEANINGS = (
    ("no space left", FULL_DISK, False),
    ("file does not exist", "Ollama's library has no such model: correct LLM_MODEL", False),
    ("invalid model name", "this is not a name of an Ollama model: correct LLM_MODEL", False),
    ("newer version of Ollama", "the model needs a newer Ollama: set OLLAMA_IMAGE to a newer version", False),
    ("pull model manifest: 40", "Ollama's library refuses this model: correct LLM_MODEL", False),
    (
        "digest mismatch",
        "the download differs from what the library announced: look for a proxy that changes downloads",
        True,
    ),
    ("ollama serve", "Ollama did not start: see 'docker compose logs provision', and fix the cause", False),
    ("", "the download broke off: check this machine's connection to Ollama's library", True),
)


class PullError(Exception):
    """Say that one attempt failed. The message is Ollama's, or the connection's."""


def main() -> int:
    """Do what the arguments say. Returns the exit status."""
    match sys.argv[1:]:
        case ["--present"]:
            print("all" if provisioned(wanted()[0]) else kept())
            return 0
        case ["--list"]:
            with serving():
                print(*(f"{name}\t{size}" for name, size in sorted(sizes().items())), sep="\n")
            return 0
        case ["--remove", *models]:
            return remove(models)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that serving() ends in order
    return provision(fetch, meaning)


def kept() -> int:
    """Return the number of bytes that Ollama will not fetch again, by its notes about the parts of downloads. If Ollama
    is killed, it makes no notes, and fetches the running parts again, whatever is on the disk."""
    size = 0
    for note in BLOBS.glob("*-partial-*"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            size += json.loads(note.read_text())["Completed"]
    return size


def meaning(complaint: Exception) -> tuple[str, bool]:
    """Return a message for a person, and whether another attempt may help."""
    return next((sentence, again) for part, sentence, again in MEANINGS if part in str(complaint))


def fetch(report: Report) -> None:
    """Make one attempt. Raises PullError."""
    with serving():
        if canonical(report.model) in map(canonical, sizes()):
            report.say("already here")
        else:
            pull(report)


@contextmanager
def serving() -> Iterator[None]:
    """Run a server of Ollama's during the block."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(["ollama", "serve"], stderr=said) as server:  # noqa: S607
        try:
            wait_for(server, said)
            yield
        except BaseException:
            # Ollama notes the progress of each part when the caller disconnects, which is now, and not when it is
            # stopped. Without this second, most of the download would be fetched again.
            time.sleep(1)
            raise
        finally:
            server.terminate()


def call(
    path: str, body: dict[str, Any] | None = None, seconds: float = 30, method: str | None = None
) -> http.client.HTTPResponse:
    """Ask Ollama. Raises OSError (of which URLError and HTTPError are kinds)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(API + path, data, method=method)  # noqa: S310 - always http
    answer: http.client.HTTPResponse = OWN.open(request, timeout=seconds)
    return answer


def wait_for(server: "subprocess.Popen[bytes]", said: IO[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return call("/api/version", seconds=5).close()
        except OSError as exc:
            if server.poll() is not None or time.monotonic() > deadline:
                said.seek(0)
                raise PullError(f"ollama serve: {exc}; {said.read().decode(errors='replace')[-500:]}") from exc
            time.sleep(0.2)


def sizes() -> dict[str, int]:
    """Return the bytes of each model on the volume."""
    with call("/api/tags") as answer:
        return {entry["name"]: entry.get("size", 0) for entry in json.load(answer)["models"]}


def remove(models: list[str]) -> int:
    """Delete models from the volume. Bytes that other models share stay. Returns the exit status."""
    with serving():
        there = {canonical(name): name for name in sizes()}
        if absent := [name for name in models if canonical(name) not in there]:
            print(f"{absent[0]} is not on the volume")
            return 1
        for name in models:
            # Its mark goes first: a model without one is looked for again, and a mark without a model is believed.
            forget([it for it in complete() if canonical(it) == canonical(name)])
            call("/api/delete", {"model": there[canonical(name)]}, method="DELETE").close()
            print(f"{name}: removed", flush=True)
    return 0


def canonical(name: str) -> str:
    """Return the canonical form of a name: Ollama ignores case, and adds `latest`."""
    name = name.lower()
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def pull(report: Report) -> None:
    """Follow one pull to its end. Raises PullError."""
    layers: dict[str, tuple[int, int]] = {}
    advanced = time.monotonic()
    with closing(events(report.model)) as pulled:
        for event in pulled:
            if "error" in event:
                raise PullError(event["error"])
            if "digest" in event:
                layers[event["digest"]] = (event.get("completed", 0), event.get("total", 0))
                completed, total = (sum(column) for column in zip(*layers.values(), strict=True))
                if completed != report.completed:
                    advanced = time.monotonic()
                elif time.monotonic() - advanced > SILENCE:  # without progress, Ollama repeats the same message
                    raise PullError(f"no byte arrived in {SILENCE:.0f} s")
                report.fetching(completed, total)
                continue
            report.say(event.get("status", ""))
            if event.get("status") == "success":
                return
    raise PullError("the download ended without success")


def events(model: str) -> Generator[dict[str, Any]]:
    try:
        with call("/api/pull", {"model": model}, SILENCE) as answer:
            for line in answer:
                yield json.loads(line)
    except urllib.error.HTTPError as exc:
        raise PullError(exc.read().decode(errors="replace").strip()) from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise PullError(str(exc)) from exc


if __name__ == "__main__":
    sys.exit(main())
