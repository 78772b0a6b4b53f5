#!/usr/bin/env python3
"""Waits until provision.py says that the model is on the volume, then becomes `vllm serve`, arguments passed on."""

import os
import sys
import time

from provisioning import provisioned, weights


def main() -> None:
    model = os.environ["LLM_MODEL"]
    if not provisioned(model):
        print(f"waiting for the model {model}: see the log of 'provision'")
    while not provisioned(model):
        time.sleep(1)
    # The directory, not the name: a name would be looked up in the hub's cache, by rules that change between versions.
    options = [f"--served-model-name={model}", "--host=0.0.0.0", "--port=8000", *sys.argv[1:]]
    os.execvp("vllm", ["vllm", "serve", str(weights(model)), *options])  # noqa: S606, S607 - where PATH has it


if __name__ == "__main__":
    main()
