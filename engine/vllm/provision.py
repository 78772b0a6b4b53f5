#!/usr/bin/env python3
"""Fetch the models of LLM_MODELS, or LLM_MODEL, into the volume from which the engine serves. Exits 0, or 1 with a
message.

huggingface_hub, which vLLM's image contains, knows the hub's addresses, errors and redirects. This program itself keeps
the bytes of an interrupted download, because newer versions of the library (2.4, for example) begin every unfinished
file again. With --present, it prints how many bytes of the first model an earlier run has left. With --list, it prints
the models on the volume and their bytes. With --remove, it deletes the models that follow.
"""

import hashlib
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from provisioning import WRITE_EVERY, Report, complete, forget, provision, provisioned, wanted, weights

TOKEN = Path(os.environ.get("HF_TOKEN_PATH", "/run/secrets/hf_token"))
# The same weights in forms that vLLM does not read: in directories for other programs, and beside READ.
# consolidated*.safetensors are not among them, because newer versions of vLLM prefer them to model*.safetensors.
ELSEWHERE = ["original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*"]
READ = "model*.safetensors"
BESIDE = ["pytorch_model*.bin", "*.pth", "*.msgpack", "*.h5", "*.gguf"]
AT_ONCE = 4  # files that are fetched at the same time


def main() -> int:
    """Do what the arguments say. Returns the exit status."""
    match sys.argv[1:]:
        case ["--present"]:
            print("all" if provisioned(wanted()[0]) else here(wanted()[0]))
            return 0
        case ["--list"]:
            print(*(f"{name}\t{here(name)}" for name in on_the_volume()), sep="\n")
            return 0
        case ["--remove", *models]:
            return remove(models)
    disable_progress_bars()  # a progress bar does not belong in a log
    for name in complete():
        drop_damaged(name)
    return provision(fetch, meaning)


def meaning(complaint: Exception) -> tuple[str, bool]:
    """Return a message for a person, and whether another attempt may help."""
    if isinstance(complaint, GatedRepoError):
        return (
            "the model needs its owner's permission: request a token on its page and set HF_TOKEN_FILE to its file, "
            "or set LLM_MODEL to a model that needs no token, such as Qwen/Qwen3-8B"
        ), False
    if isinstance(complaint, RepositoryNotFoundError | HFValidationError):
        return "the hub has no such model: correct LLM_MODEL", False
    if getattr(getattr(complaint, "response", None), "status_code", None) == 401:
        return "the hub does not accept the token in the file that HF_TOKEN_FILE names: put a valid token there", False
    if getattr(complaint, "filename", None) == str(TOKEN):
        return f"uid {os.getuid()} cannot read the file that HF_TOKEN_FILE names: change its mode with chmod", False
    return "the download broke off: check this machine's connection to the model hub", True


def fetch(report: Report) -> None:
    """Make one attempt. Raises what the hub's library raises, and OSError."""
    token = TOKEN.read_text().strip() or None
    files = needed(HfApi(token=token).model_info(report.model, files_metadata=True).siblings or [])
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}  # of a packed answer there are no ranges
    # Files with the same content are one blob, which is fetched once.
    once = {announced(file): file for file in files}
    blobs(report.model).mkdir(parents=True, exist_ok=True)
    with telling(report, sum(file.size or 0 for file in once.values())), ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda file: bring(report.model, file, headers), once.values()):
            pass
    for file in files:
        name = weights(report.model) / file.rfilename
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        name.symlink_to(blobs(report.model) / announced(file))


def announced(file: Any) -> str:
    """Return the digest of a file's content, by which the file is named on the volume."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def needed(files: list[Any]) -> list[Any]:
    """Return the files without weights in forms that vLLM does not read."""
    paths = [(file, PurePosixPath(file.rfilename)) for file in files]
    ready = {path.parent for _, path in paths if fnmatch(path.name, READ)}
    return [
        file
        for file, path in paths
        if not any(fnmatch(file.rfilename, form) for form in ELSEWHERE)
        and not (path.parent in ready and any(fnmatch(path.name, form) for form in BESIDE))
    ]


def bring(model: str, file: Any, headers: dict[str, str]) -> None:
    """Fetch the content of one file, from where an earlier run was interrupted."""
    blob = blobs(model) / announced(file)
    if blob.exists() and blob.stat().st_size == file.size:
        return
    part = blob.with_suffix(".part")
    with part.open("ab") as out:
        if out.tell() < file.size:
            url = hf_hub_url(model, file.rfilename)
            http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size)
    if digest(part) != blob.name:
        part.unlink()
        raise OSError(f"{file.rfilename} arrived with different content than the hub announced")
    part.replace(blob)


def digest(blob: Path) -> str:
    """Return the digest that the hub would announce: SHA-256, or Git's for a file that is not in LFS."""
    with blob.open("rb") as content:
        if len(blob.stem) == 64:  # the digits of SHA-256
            return hashlib.file_digest(content, "sha256").hexdigest()
        data = content.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def drop_damaged(model: str) -> None:
    """Delete the blobs whose content is not what their name says, so that they are fetched again. Only blobs of several
    files are read: in an earlier version, two threads wrote to such a blob."""
    files = Counter(it.resolve() for it in weights(model).rglob("*") if it.is_file())
    for blob in [it for it, number in files.items() if number > 1 and digest(it) != it.name]:
        forget([model])
        blob.unlink()


@contextmanager
def telling(report: Report, total: int) -> Iterator[None]:
    """Report the progress during the block."""
    done = threading.Event()

    def tell() -> None:
        over = False
        while not over:
            over = done.wait(WRITE_EVERY)
            report.fetching(min(here(report.model), total), total)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def here(model: str) -> int:
    """Return the number of the model's bytes on the volume, in complete files and in parts."""
    size = 0
    for file in blobs(model).glob("*"):
        with suppress(FileNotFoundError):  # the file has just got its final name
            size += file.stat().st_blocks * 512
    return size


def on_the_volume() -> list[str]:
    """Return the names of the models of which there is anything."""
    directories = weights("any").parents[1].glob("*")
    return sorted(it.name.replace("--", "/", 1) for it in directories)


def remove(models: list[str]) -> int:
    """Delete models from the volume. Returns the exit status."""
    there = on_the_volume()
    if absent := [name for name in models if name not in there]:
        print(f"{absent[0]} is not on the volume")
        return 1
    for name in models:
        # Its mark goes first: a model without one is looked for again, and a mark without a model is believed.
        forget([name])
        shutil.rmtree(weights(name).parent)
        print(f"{name}: removed", flush=True)
    return 0


def blobs(model: str) -> Path:
    return weights(model).with_name("blobs")


if __name__ == "__main__":
    sys.exit(main())
