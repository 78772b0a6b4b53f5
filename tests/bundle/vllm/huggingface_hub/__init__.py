"""A stand-in for the model hub's library: models are a few kilobytes called gigabytes. What a download does is in the
model's name: gated (asks for a token), missing, full, broken, held (until /tmp/go exists)."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

PARTS, PART = 5, 4096


class HfApi:
    def __init__(self, token=None):
        self._token = token

    def model_info(self, model, files_metadata=False):  # noqa: ARG002
        if os.environ.get("HF_HUB_OFFLINE"):
            raise ConnectionError("offline")
        if model.count("/") != 1:
            raise HFValidationError(f"Repo id must be in the form 'namespace/repo_name': '{model}'.")
        if "missing" in model:
            raise RepositoryNotFoundError("404 Client Error. Repository Not Found for url: https://hub.example/api")
        if "gated" in model and self._token != "hf_right":
            raise GatedRepoError("401 Client Error. Cannot access gated repo for url https://hub.example/api")
        files = [("config.json", None), ("model.safetensors", PARTS * PART), ("original/weights.pth", 10**9)]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files])


def snapshot_download(model, token=None, ignore_patterns=()):
    HfApi(token).model_info(model)
    assert "original/*" in ignore_patterns
    directory = Path(os.environ["HF_HOME"], "hub", "models--" + model.replace("/", "--"))
    (directory / "blobs").mkdir(parents=True, exist_ok=True)
    whole = directory / "blobs/1234"
    part = whole.with_suffix(".incomplete")
    had = part.stat().st_size // PART if part.exists() else 0
    print(f"stand-in hub: goes on after part {had}" if had else "stand-in hub: begins", flush=True)
    for number in range(had + 1, PARTS + 1):
        with part.open("ab") as file:
            file.write(bytes(PART))
        if number == 2 and "full" in model:
            raise OSError(errno.ENOSPC, "No space left on device")
        if number == 2 and "broken" in model:
            raise ConnectionError("Connection broken: IncompleteRead")
        while number >= 2 and "held" in model and not Path("/tmp/go").exists():
            time.sleep(0.1)
    part.rename(whole)
    (directory / "snapshots").mkdir(exist_ok=True)
    return str(directory / "snapshots")
