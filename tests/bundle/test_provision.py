"""The provisioners as plain processes in front of stand-ins: silences, drops, refusals, a full disk, a stop, a second
run. vLLM's is run with the hub's own library."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import PROXIED
from tests.support.provisioners import Provisioner, ollama_provisioner, running_hub, vllm_provisioner

GATED = (
    "the model needs its owner's permission: request a token on its page and set HF_TOKEN_FILE to its file, "
    "or set LLM_MODEL to a model that needs no token, such as Qwen/Qwen3-8B"
)
MISSING = "the hub has no such model: correct LLM_MODEL"
FULL = "the disk is full: free some space where Docker keeps its volumes"


@pytest.fixture
def ollama(tmp_path: Path) -> Provisioner:
    return ollama_provisioner(tmp_path)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with running_hub() as url:
        yield url


@pytest.fixture
def vllm(tmp_path: Path, hub: str) -> Provisioner:
    return vllm_provisioner(tmp_path, hub)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory, hub: str) -> Path:
    """A model's files, fetched without an interruption."""
    provisioner = vllm_provisioner(tmp_path_factory.mktemp("fetched"), hub)
    ran = provisioner.run("org/model")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "interrupted" not in ran.stdout
    return provisioner.home / "weights/org--model/files"


@pytest.mark.parametrize("model", ["dropped:1", "refused:1", "silent:1"])
def test_ollama_a_download_that_breaks_off_goes_on_where_it_stopped(ollama: Provisioner, model: str) -> None:
    ran = ollama.run(model)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == [f"{model}: pulling manifest", f"{model}: 1.00 of 5.00 GB (20%)"]
    (interruption,) = (index for index, line in enumerate(lines) if f"{model}: interrupted (" in line)
    assert lines[interruption].endswith("continuing in 0.1 s")
    assert lines[interruption + 1 :][:2] == [f"{model}: pulling manifest", f"{model}: 3.00 of 5.00 GB (60%)"]
    assert ollama.ended_well(model)


def test_ollama_a_silent_library_is_asked_again(ollama: Provisioner) -> None:
    ran = ollama.run("mute:1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "mute:1: interrupted (timed out); continuing in 0.1 s" in ran.stdout.splitlines()


def test_ollama_a_download_that_is_stopped_goes_on_where_it_was(ollama: Provisioner) -> None:
    """Ollama notes how far it is only when its caller hangs up, so it may not be killed together with its caller."""
    assert ollama.run_and_stop("held:1", "1.00 of 5.00 GB") == 143
    assert "held:1: 3.00 of 5.00 GB (60%)" in ollama.run("held:1").stdout.splitlines()
    assert ollama.ended_well("held:1")


def test_ollama_the_provisioners_own_ollama_is_asked_without_a_proxy(ollama: Provisioner) -> None:
    ran = ollama.run("some:1", **PROXIED)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ollama.ended_well("some:1")


@pytest.mark.parametrize(("first", "then"), [("some", "some:latest"), ("some:latest", "some"), ("some:1", "SOME:1")])
def test_ollama_a_model_under_another_of_its_names_is_not_fetched_again(
    ollama: Provisioner, first: str, then: str
) -> None:
    assert "GB" in ollama.run(first).stdout
    assert ollama.run(then).stdout == f"{then}: already here\n"
    assert ollama.ended_well(then)


def test_ollama_bytes_without_a_note_after_a_kill_are_not_counted(ollama: Provisioner) -> None:
    ollama.run_and_stop("held:1", "1.00 of 5.00 GB")
    for note in ollama.home.glob(".ollama/models/blobs/*-partial-0"):
        note.unlink()
    assert list(ollama.home.glob(".ollama/models/blobs/*-partial"))
    assert ollama.run("held:1", "--present").stdout == "0\n"


def test_ollama_a_second_run_fetches_nothing(ollama: Provisioner) -> None:
    assert "GB" in ollama.run("some:1").stdout
    assert ollama.run("some:1").stdout == "some:1: already here\n"
    assert "GB" in ollama.run("other:1").stdout
    assert ollama.run("some:1").stdout == "some:1: already here\n"
    assert ollama.ended_well("some:1")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing:1", "Ollama's library has no such model: correct LLM_MODEL"),
        ("newer:1", "the model needs a newer Ollama: set OLLAMA_IMAGE to a newer version"),
        ("private/some:1", "Ollama's library refuses this model: correct LLM_MODEL"),
        ("offline:1", "the download broke off: check this machine's connection to Ollama's library"),
    ],
)
def test_ollama_a_failure_ends_with_a_message(ollama: Provisioner, model: str, reason: str) -> None:
    ran = ollama.run(model)
    assert ollama.failed(ran, model, reason)
    assert ("interrupted" in ran.stdout) == (model == "offline:1")  # where patience does not help, there is none
    assert not (ollama.home / "provisioned").exists()


def test_ollama_a_download_with_wrong_content_is_not_repeated_for_ever(ollama: Provisioner) -> None:
    """Each round brings all of it, and is told of a little more or less of it than the one before."""
    ran = ollama.run("altered:1", PROVISION_ATTEMPTS="3")
    assert ollama.failed(
        ran,
        "altered:1",
        "the download differs from what the library announced: look for a proxy that changes downloads",
    )
    assert ran.stdout.count("interrupted (digest mismatch") == 3


def test_ollama_that_does_not_start(ollama: Provisioner, tmp_path: Path) -> None:
    (tmp_path / ".ollama").write_text("no directory")
    ran = ollama.run("some:1")
    assert ollama.failed(ran, "some:1", "Ollama did not start: see 'docker compose logs provision', and fix the cause")
    assert "FileExistsError" in ran.stdout


def test_ollama_says_how_much_is_here_already(ollama: Provisioner) -> None:
    assert ollama.run("held:1", "--present").stdout == "0\n"
    ollama.run_and_stop("held:1", "1.00 of 5.00 GB")
    assert ollama.run("held:1", "--present").stdout == "8192\n"
    ollama.run("some:1")
    assert ollama.run("some:1", "--present").stdout == "all\n"


def test_vllm_fetches_once(vllm: Provisioner) -> None:
    ran = vllm.run("org/model")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert vllm.ended_well("org/model")
    files = vllm.home / "weights/org--model/files"
    assert json.loads((files / "config.json").read_text())
    assert (files / "nested/model.safetensors").stat().st_size == 50 << 20
    assert vllm.run("org/model", HF_ENDPOINT="http://127.0.0.1:9").stdout == "org/model: already here\n"
    assert vllm.run("org/model", "--present").stdout == "all\n"


def test_vllm_weights_in_forms_that_it_does_not_read_are_left_out(fetched: Path) -> None:
    assert {str(it.relative_to(fetched)) for it in fetched.rglob("*") if it.is_file()} == {
        "config.json", "tokenizer.model", "linear/pytorch_model.bin",
        "nested/model.safetensors", "nested/custom.py", "same/model.safetensors", "same/tokenizer.model",
    }  # fmt: skip


def test_vllm_files_with_the_same_content_are_fetched_once(fetched: Path) -> None:
    assert (fetched / "same/model.safetensors").samefile(fetched / "nested/model.safetensors")
    assert (fetched / "same/model.safetensors").stat().st_size == 50 << 20
    assert (fetched / "same/tokenizer.model").read_bytes() == b"small"


def test_vllm_a_damaged_file_is_fetched_again(vllm: Provisioner) -> None:
    assert vllm.run("org/model").returncode == 0
    files = vllm.home / "weights/org--model/files"
    (files / "tokenizer.model").write_bytes(b"smallsmall")  # as two threads left it that wrote it at the same time
    (files / "config.json").write_bytes(b"too long".ljust(99))
    assert vllm.run("org/model").returncode == 0
    assert vllm.ended_well("org/model")
    assert (files / "tokenizer.model").read_bytes() == b"small"
    assert json.loads((files / "config.json").read_text())


def test_vllm_a_download_that_breaks_off_goes_on_where_it_stopped(vllm: Provisioner) -> None:
    """Within one run: the hub's library sees to it."""
    assert vllm.run("org/dropped", PROVISION_ATTEMPTS="1").returncode == 0
    assert vllm.ended_well("org/dropped")


def test_vllm_a_download_that_is_stopped_goes_on_where_it_was(vllm: Provisioner) -> None:
    """From one run to the next: this is ours."""
    assert vllm.run_and_stop("org/held", "0.02 of 0.05 GB (40%)") == -signal.SIGTERM
    assert int(vllm.run("org/held", "--present").stdout) >= 20 << 20
    assert vllm.run_and_stop("org/held", "0.04 of 0.05 GB (80%)") == -signal.SIGTERM
    ran = vllm.run("org/held")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert vllm.ended_well("org/held")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing/model", MISSING),
        ("llama3.1:8b", MISSING),
        ("org/wrong", "the download broke off: check this machine's connection to the model hub"),
        ("org/gated", GATED),
    ],
)
def test_vllm_a_failure_ends_with_a_message(vllm: Provisioner, model: str, reason: str) -> None:
    assert vllm.failed(vllm.run(model), model, reason)


def test_vllm_an_unreachable_hub_is_reported(vllm: Provisioner) -> None:
    ran = vllm.run("org/some", HF_ENDPOINT="http://127.0.0.1:9")
    assert vllm.failed(ran, "org/some", "the download broke off: check this machine's connection to the model hub")
    assert "org/some: interrupted (" in ran.stdout


def test_vllm_a_token_opens_a_gated_model(vllm: Provisioner, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_right\n")
    assert vllm.run("org/gated", HF_TOKEN_PATH=str(token)).returncode == 0

    token.write_text("hf_wrong\n")
    wrong = vllm.run("org/other", HF_TOKEN_PATH=str(token))
    reason = "the hub does not accept the token in the file that HF_TOKEN_FILE names: put a valid token there"
    assert vllm.failed(wrong, "org/other", reason)
    assert "hf_wrong" not in wrong.stdout

    missing = vllm.run("org/other", HF_TOKEN_PATH=str(tmp_path / "nothing"))
    reason = f"uid {os.getuid()} cannot read the file that HF_TOKEN_FILE names: change its mode with chmod"
    assert vllm.failed(missing, "org/other", reason)


@pytest.mark.parametrize(("engine", "size", "model"), [("ollama", "16k", "some:1"), ("vllm", "30m", "org/some")])
def test_a_full_disk_ends_with_a_message(
    engine: str, size: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The one on which the sentence is written, too."""
    provisioner: Provisioner = request.getfixturevalue(engine)
    ran = provisioner.run_on_a_disk_of(size, model, HF_HOME=str(tmp_path))
    sentence = f"The model {model} could not be fetched: {FULL}, then run 'make up' again."
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1].startswith(sentence + " ("), ran.stdout
    assert json.loads(ran.stderr.splitlines()[-1]) == {"model": model, "state": "failed", "message": sentence}
