"""Fetches the model into the volume the engine serves from, saying how far it is. Exit status 0, or 1 and a sentence.

huggingface_hub, which vLLM's image carries, downloads, checks and resumes.
"""

import errno
import os
import sys
import threading
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

PROVISIONED = Path("/models/provisioned")  # holds the model's name once it is there; the engine waits for it
TOKEN = Path("/run/secrets/hf_token")
ELSEWHERE = ["original/*"]  # the same weights once more, in a form vLLM does not read
PROGRESS_EVERY = 10  # seconds


def main() -> int:
    """Bring LLM_MODEL onto the volume. Returns the exit status."""
    model = os.environ["LLM_MODEL"]
    if PROVISIONED.exists() and PROVISIONED.read_text().strip() == model:
        print(f"{model}: already here")
        return 0
    try:
        fetch(model, TOKEN.read_text().strip() or None)
    except GatedRepoError:
        print(
            f"{model}: its owner asks who you are: request access on its page and put the file of a token into "
            "HF_TOKEN_FILE, or set LLM_MODEL to one that needs none, such as Qwen/Qwen3-8B; then run 'make up' again"
        )
    except (RepositoryNotFoundError, HFValidationError):
        print(f"{model}: the hub has no such model: correct LLM_MODEL, then run 'make up' again")
    except Exception as exc:  # noqa: BLE001 - the hub's library lets its HTTP client's own exceptions through
        reason = "it can't be downloaded: check this machine's way to the model hub"
        if getattr(exc, "errno", None) == errno.ENOSPC:
            reason = "the disk is full: make room where Docker keeps its volumes"
        print(f"{model}: {reason}, then run 'make up' again, which goes on where it stopped ({exc})")
    else:
        temporary = PROVISIONED.with_suffix(".new")
        temporary.write_text(model + "\n")
        temporary.replace(PROVISIONED)
        return 0
    return 1


def fetch(model: str, token: str | None) -> None:
    disable_progress_bars()  # a bar is no line in a log
    files = HfApi(token=token).model_info(model, files_metadata=True).siblings or []
    total = sum(file.size or 0 for file in files if not file.rfilename.startswith("original/"))
    done = threading.Event()
    threading.Thread(target=tell, args=(model, total, done), daemon=True).start()
    try:
        snapshot_download(model, token=token, ignore_patterns=ELSEWHERE)
    finally:
        done.set()


def tell(model: str, total: int, done: threading.Event) -> None:
    blobs = Path(os.environ["HF_HOME"], "hub", "models--" + model.replace("/", "--"), "blobs")
    while not done.wait(PROGRESS_EVERY):
        here = sum(file.stat().st_size for file in blobs.glob("*"))
        print(f"{model}: {here / 1e9:.2f} of {total / 1e9:.2f} GB ({min(99, 100 * here // max(total, 1))}%)")


if __name__ == "__main__":
    sys.exit(main())
