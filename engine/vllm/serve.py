#!/usr/bin/env python3
"""Waits until provision.py says that the model is on the volume, then becomes `vllm serve`, arguments passed on."""

import os
import sys
import time
from pathlib import Path

PROVISIONED = Path("/models/provisioned")  # holds the model's name once it is there


def main() -> None:
    model = os.environ["LLM_MODEL"]
    if not provisioned(model):
        print(f"waiting for the model {model}: see the log of 'provision'")
    while not provisioned(model):
        time.sleep(1)
    os.execvp("vllm", ["vllm", "serve", model, "--host=0.0.0.0", "--port=8000", *sys.argv[1:]])  # noqa: S606, S607


def provisioned(model: str) -> bool:
    return PROVISIONED.exists() and PROVISIONED.read_text().strip() == model


if __name__ == "__main__":
    main()
