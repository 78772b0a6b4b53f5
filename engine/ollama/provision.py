#!/usr/bin/env python3
"""Fetches LLM_MODEL into the volume the engine serves from. Exit status 0, or 1 and a sentence.

Ollama downloads, checks and resumes; this drives its API. With --present, says how many bytes an earlier run left.
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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from provisioning import FULL_DISK, SILENCE, Report, provision, provisioned

API = "http://" + os.environ.get("OLLAMA_HOST", "127.0.0.1:11434")
BLOBS = Path.home() / ".ollama/models/blobs"

# What Ollama's messages mean. The first that fits counts; the bool says whether another attempt may help.
MEANINGS = (
    ("no space left", FULL_DISK, False),
    ("file does not exist", "Ollama's library has no such model: correct LLM_MODEL", False),
    ("invalid model name", "this is no name of an Ollama model: correct LLM_MODEL", False),
    ("newer version of Ollama", "it needs a newer Ollama: set OLLAMA_IMAGE to one", False),
    ("pull model manifest: 40", "its library does not hand it out: correct LLM_MODEL", False),
    ("ollama serve", "Ollama did not start: 'docker compose logs provision' says why; put that right", False),
    ("", "the download broke off: check this machine's way to Ollama's library", True),
)


class PullError(Exception):
    """One attempt failed; the message is Ollama's, or the connection's."""


def main() -> int:
    """Bring the model onto the volume. Returns the exit status."""
    model = os.environ["LLM_MODEL"]
    if sys.argv[1:] == ["--present"]:
        print("all" if provisioned(model) else sum(file.stat().st_blocks * 512 for file in BLOBS.glob("*-partial")))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that serving() ends in order
    return provision(model, fetch, meaning)


def meaning(complaint: Exception) -> tuple[str, bool]:
    """A sentence for a person, and whether another attempt may help."""
    return next((sentence, again) for part, sentence, again in MEANINGS if part in str(complaint))


def fetch(report: Report) -> None:
    """One attempt. Raises PullError."""
    with serving():
        if report.model in present():
            report.say("already here")
        else:
            pull(report)


@contextmanager
def serving() -> Iterator[None]:
    """A server of Ollama's, for as long as it takes."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(["ollama", "serve"], stderr=said) as server:  # noqa: S607
        try:
            wait_for(server, said)
            yield
        except BaseException:
            # Ollama notes how far each part of a download is when the caller hangs up, which is now, not when it is
            # stopped: without this second most of what is here would be fetched once more.
            time.sleep(1)
            raise
        finally:
            server.terminate()


def call(path: str, body: dict[str, Any] | None = None, seconds: float = 30) -> http.client.HTTPResponse:
    """Ask Ollama. Raises OSError (of which URLError and HTTPError are kinds)."""
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(API + path, data), timeout=seconds)  # noqa: S310 - always http


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


def present() -> set[str]:
    """The models on the volume, with and without the tag that may be left out."""
    with call("/api/tags") as answer:
        names = {entry["name"] for entry in json.load(answer)["models"]}
    return names | {name.removesuffix(":latest") for name in names}


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
                elif (
                    time.monotonic() - advanced > SILENCE
                ):  # where nothing comes in, Ollama says the same over and over
                    raise PullError(f"not a byte in {SILENCE:.0f} s")
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
