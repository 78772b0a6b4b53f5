#!/usr/bin/env python3
"""Wait until provision.py reports that the model is on the volume, and until no other vLLM loads. Then become
`vllm serve`. Arguments are passed on.

With --enable-sleep-mode, vLLM falls asleep when it has loaded (turn.py). LLM_MODELS then names all models that take
turns. All of them have to be on the volume first, because one that came later could not load while another is awake.

Without a parser, vLLM refuses every request with tools. TOOL_PARSER names a parser; "auto" takes the model's parser
from parsers.tsv, and "none" takes none. REASONING_PARSER names the parser that separates reasoning from the answer.
EXTRA_ARGS are further options, split as a shell does. They come last, so they override the others.
"""

import os
import shlex
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import turn
from provisioning import provisioned, weights

PARSERS = Path(__file__).with_name("parsers.tsv")


def main() -> None:
    model = os.environ["LLM_MODEL"]
    sleeps = "--enable-sleep-mode" in sys.argv
    for name in filter(None, (model, *os.environ.get("LLM_MODELS", "").split(",") * sleeps)):
        await_model(name)
    turn.take(sleeps=sleeps)
    # The directory is passed, and not the name, because the name would be looked up in the hub's cache, by rules that
    # change between versions.
    options = [f"--served-model-name={model}", "--host=0.0.0.0", "--port=8000", *parsing(model), *sys.argv[1:]]
    options += shlex.split(os.environ.get("EXTRA_ARGS", ""))
    if sleeps:
        options.append("--middleware=turn.Door")
        os.environ |= {"PYTHONPATH": str(PARSERS.parent), "VLLM_SERVER_DEV_MODE": "1"}
    os.execvp("vllm", ["vllm", "serve", str(weights(model)), *options])  # noqa: S606, S607 - where PATH has it


def await_model(name: str) -> None:
    """Return when the model is on the volume."""
    if not provisioned(name):
        print(f"waiting for the model {name}: see the log of 'provision'", flush=True)
    while not provisioned(name):
        time.sleep(1)


def parsing(model: str) -> list[str]:
    """Return the options for tools and reasoning, and log them."""
    tools, thinking = os.environ.get("TOOL_PARSER", "auto"), os.environ.get("REASONING_PARSER", "none")
    if tools == "auto":
        tools = parser(model)
    options = []
    if tools == "none":
        print(
            f"no tool parser for {model}: requests with tools are refused; set VLLM_TOOL_PARSER to a parser", flush=True
        )
    else:
        print(f"the tool parser for {model} is {tools}", flush=True)
        options += ["--enable-auto-tool-choice", f"--tool-call-parser={tools}"]
    if thinking != "none":
        options.append(f"--reasoning-parser={thinking}")
    return options


def parser(model: str) -> str:
    """Return the parser of the first pattern that matches the model's name, or "none"."""
    name = model.rpartition("/")[2].lower()
    lines = (line for line in PARSERS.read_text().splitlines() if not line.startswith("#"))
    rows = (line.split("\t") for line in lines)
    found = next((tools for pattern, tools in rows if fnmatchcase(name, pattern)), "-")
    return "none" if found == "-" else found


if __name__ == "__main__":
    main()
