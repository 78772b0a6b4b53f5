#!/usr/bin/env python3
"""Fetches LLM_MODEL into the volume the engine serves from. Exit status 0, or 1 and a sentence.

huggingface_hub, which vLLM's image carries, knows the hub's addresses, errors and redirects. To keep what an
interrupted download has is ours: newer versions of the library (2.4 does) begin every unfinished file anew. With
--present, says how many bytes an earlier run left.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from provisioning import WRITE_EVERY, Report, provision, provisioned, weights

TOKEN = Path(os.environ.get("HF_TOKEN_PATH", "/run/secrets/hf_token"))
ELSEWHERE = ["original/*", "metal/*"]  # the same weights once more, in forms vLLM does not read
AT_ONCE = 4  # files


def main() -> int:
    """Bring the model onto the volume. Returns the exit status."""
    model = os.environ["LLM_MODEL"]
    if sys.argv[1:] == ["--present"]:
        print("all" if provisioned(model) else here(model))
        return 0
    disable_progress_bars()  # a bar is no line in a log
    return provision(model, fetch, meaning)


def meaning(complaint: Exception) -> tuple[str, bool]:
    """A sentence for a person, and whether another attempt may help."""
    if isinstance(complaint, GatedRepoError):
        return (
            "its owner asks who you are: request access on its page and put the file of a token into HF_TOKEN_FILE, "
            "or set LLM_MODEL to one that needs none, such as Qwen/Qwen3-8B"
        ), False
    if isinstance(complaint, RepositoryNotFoundError | HFValidationError):
        return "the hub has no such model: correct LLM_MODEL", False
    if getattr(getattr(complaint, "response", None), "status_code", None) == 401:
        return "the hub does not accept the token in the file of HF_TOKEN_FILE: put a valid one there", False
    if getattr(complaint, "filename", None) == str(TOKEN):
        return f"the file of HF_TOKEN_FILE can't be read by uid {os.getuid()}: chmod it", False
    return "the download broke off: check this machine's way to the model hub", True


def fetch(report: Report) -> None:
    """One attempt. Raises what the hub's library raises, and OSError."""
    token = TOKEN.read_text().strip() or None
    every = HfApi(token=token).model_info(report.model, files_metadata=True).siblings or []
    files = [file for file in every if not any(fnmatch(file.rfilename, form) for form in ELSEWHERE)]
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}  # of a packed answer there are no ranges
    with telling(report, sum(file.size or 0 for file in files)), ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda file: bring(report.model, file, headers), files):
            pass


def bring(model: str, file: Any, headers: dict[str, str]) -> None:
    """One file, from where an earlier run was interrupted. What is here is named by its content."""
    blob = blobs(model) / (file.lfs.sha256 if file.lfs else file.blob_id)
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        part = blob.with_suffix(".part")
        with part.open("ab") as out:
            if out.tell() < file.size:
                url = hf_hub_url(model, file.rfilename)
                http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size)
        if file.lfs and digest(part) != file.lfs.sha256:
            part.unlink()
            raise OSError(f"{file.rfilename} came with other content than the hub says")
        part.rename(blob)
    name = weights(model) / file.rfilename
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    name.symlink_to(blob)


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def telling(report: Report, total: int) -> Iterator[None]:
    """Meanwhile, says how far it is."""
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
    """The bytes of the model on the volume, whole files and parts."""
    size = 0
    for file in blobs(model).glob("*"):
        with suppress(FileNotFoundError):  # it has just been given its final name
            size += file.stat().st_blocks * 512
    return size


def blobs(model: str) -> Path:
    return weights(model).with_name("blobs")


if __name__ == "__main__":
    sys.exit(main())
