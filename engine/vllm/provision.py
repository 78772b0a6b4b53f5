#!/usr/bin/env python3
"""Fetches LLM_MODEL into the volume the engine serves from. Exit status 0, or 1 and a sentence.

huggingface_hub, which vLLM's image carries, downloads, checks and resumes. With --present, says how many bytes an
earlier run left.
"""

import errno
import os
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from provisioning import WRITE_EVERY, Report, provisioned

TOKEN = Path(os.environ.get("HF_TOKEN_PATH", "/run/secrets/hf_token"))
ELSEWHERE = ["original/*", "metal/*"]  # the same weights once more, in forms vLLM does not read


def main() -> int:
    """Bring the model onto the volume. Returns the exit status."""
    model = os.environ["LLM_MODEL"]
    if sys.argv[1:] == ["--present"]:
        print("all" if provisioned(model) else here(model))
        return 0
    report = Report(model)
    if provisioned(model):
        report.say("already here")
        return report.ready()
    try:
        token = TOKEN.read_text().strip() or None
    except OSError as exc:
        return report.failed(f"the file of HF_TOKEN_FILE can't be read by uid {os.getuid()}: chmod it", exc)
    try:
        fetch(model, token, report)
    except GatedRepoError as exc:
        return report.failed(
            "its owner asks who you are: request access on its page and put the file of a token into HF_TOKEN_FILE, "
            "or set LLM_MODEL to one that needs none, such as Qwen/Qwen3-8B",
            exc,
        )
    except (RepositoryNotFoundError, HFValidationError) as exc:
        return report.failed("the hub has no such model: correct LLM_MODEL", exc)
    except Exception as exc:  # noqa: BLE001 - the hub's library lets its HTTP client's own exceptions through
        if getattr(exc, "errno", None) == errno.ENOSPC:
            return report.failed("the disk is full: make room where Docker keeps its volumes", exc)
        return report.failed("the download broke off; check this machine's way to the model hub", exc)
    return report.ready()


def fetch(model: str, token: str | None, report: Report) -> None:
    disable_progress_bars()  # a bar is no line in a log
    files = HfApi(token=token).model_info(model, files_metadata=True).siblings or []
    total = sum(file.size or 0 for file in files if not any(fnmatch(file.rfilename, form) for form in ELSEWHERE))
    done = threading.Event()
    threading.Thread(target=tell, args=(report, total, done), daemon=True).start()
    try:
        snapshot_download(model, token=token, ignore_patterns=ELSEWHERE)
    finally:
        done.set()


def tell(report: Report, total: int, done: threading.Event) -> None:
    while not done.wait(WRITE_EVERY):
        report.fetching(min(here(report.model), total), total)


def here(model: str) -> int:
    """The bytes of the model on the volume, whole files and parts."""
    blobs = Path(os.environ["HF_HOME"], "hub", "models--" + model.replace("/", "--"), "blobs")
    return sum(file.stat().st_blocks * 512 for file in blobs.glob("*"))


if __name__ == "__main__":
    sys.exit(main())
