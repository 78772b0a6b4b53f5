#!/usr/bin/env python3
"""Fetches LLM_MODEL into the volume the engine serves from. Exit status 0, or 1 and a sentence.

Ollama downloads, checks and resumes; this drives its API. With --present, says how many bytes an earlier run left.
"""

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provisioning import Report, provisioned

API = "http://" + os.environ.get("OLLAMA_HOST", "127.0.0.1:11434")
BLOBS = Path.home() / ".ollama/models/blobs"
ATTEMPTS = 5
SILENCE = float(os.environ.get("PROVISION_SILENCE", "600"))  # seconds without a line from Ollama: a new attempt

# What Ollama's messages mean. The first that fits counts; the bool says whether another attempt may help.
MEANINGS = (
    ("no space left", "the disk is full: make room where Docker keeps its volumes", False),
    ("file does not exist", "Ollama's library has no such model: correct LLM_MODEL", False),
    ("invalid model name", "this is no name of an Ollama model: correct LLM_MODEL", False),
    ("", "the download broke off; check this machine's way to Ollama's library", True),
)


class PullError(Exception):
    """One attempt failed; the message is Ollama's, or the connection's."""


def main() -> int:
    """Bring the model onto the volume. Returns the exit status."""
    model = os.environ["LLM_MODEL"]
    if sys.argv[1:] == ["--present"]:
        print("all" if provisioned(model) else sum(file.stat().st_blocks * 512 for file in BLOBS.glob("*-partial")))
        return 0
    report = Report(model)
    server = subprocess.Popen(["ollama", "serve"], stderr=subprocess.DEVNULL)  # noqa: S607 - where PATH has it
    try:
        wait_for(server)
        if model in present():
            report.say("already here")
        else:
            pull_with_patience(model, report)
    except PullError as exc:
        return report.failed(meaning(str(exc))[0], exc)
    finally:
        server.terminate()
        server.wait(10)
    return report.ready()


def call(path: str, body: dict[str, Any] | None = None, seconds: float = 30) -> http.client.HTTPResponse:
    """Ask Ollama. Raises OSError (of which URLError and HTTPError are kinds)."""
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(API + path, data), timeout=seconds)  # noqa: S310 - always http


def wait_for(server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return call("/api/version", seconds=5).close()
        except OSError as exc:
            if server.poll() is not None or time.monotonic() > deadline:
                raise PullError(f"'ollama serve' does not answer: {exc}") from exc
            time.sleep(0.2)


def present() -> set[str]:
    """The models on the volume, with and without the tag that may be left out."""
    with call("/api/tags") as answer:
        names = {entry["name"] for entry in json.load(answer)["models"]}
    return names | {name.removesuffix(":latest") for name in names}


def pull_with_patience(model: str, report: Report) -> None:
    for attempt in range(1, ATTEMPTS):
        try:
            return pull(model, report)
        except PullError as exc:
            if not meaning(str(exc))[1]:
                raise
            report.interrupted(f"interrupted ({exc}); going on in {2**attempt} s")
            time.sleep(2**attempt)
    return pull(model, report)


def pull(model: str, report: Report) -> None:
    """Follow one pull to its end. Raises PullError."""
    layers: dict[str, tuple[int, int]] = {}
    for event in events(model):
        if "error" in event:
            raise PullError(event["error"])
        if "digest" in event:
            layers[event["digest"]] = (event.get("completed", 0), event.get("total", 0))
            report.fetching(*(sum(column) for column in zip(*layers.values(), strict=True)))
            continue
        report.say(event.get("status", ""))
        if event.get("status") == "success":
            return
    raise PullError("the download ended without success")


def events(model: str) -> Iterator[dict[str, Any]]:
    try:
        with call("/api/pull", {"model": model}, SILENCE) as answer:
            for line in answer:
                yield json.loads(line)
    except urllib.error.HTTPError as exc:
        raise PullError(exc.read().decode(errors="replace").strip()) from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise PullError(str(exc)) from exc


def meaning(complaint: str) -> tuple[str, bool]:
    """A sentence for a person, and whether another attempt may help."""
    return next((sentence, again) for part, sentence, again in MEANINGS if part in complaint)


if __name__ == "__main__":
    sys.exit(main())
