"""The provisioners with LLM_MODELS, as plain processes in front of stand-ins: each model has its own progress, one that
cannot be fetched does not keep the others away, and models are listed and removed."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.provisioners import Provisioner, ollama_provisioner, running_hub, vllm_provisioner


@pytest.mark.parametrize(
    ("engine", "models", "missing", "reason"),
    [
        ("ollama", ["some:1", "missing:1", "other:1"], "missing:1", "Ollama's library has no such model"),
        ("vllm", ["org/some", "missing/model", "org/model"], "missing/model", "the hub has no such model"),
    ],
)
def test_all_models_are_fetched_but_the_one_that_cannot_be(
    engine: str, models: list[str], missing: str, reason: str, tmp_path: Path
) -> None:
    with running_hub() as hub:
        provisioner = ollama_provisioner(tmp_path) if engine == "ollama" else vllm_provisioner(tmp_path, hub)
        fetches_lists_and_removes(provisioner, models, missing, reason)


def fetches_lists_and_removes(provisioner: Provisioner, models: list[str], missing: str, reason: str) -> None:
    ran = provisioner.run("not-asked-for", LLM_MODELS=", ".join(models))
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1].startswith(f"The model {missing} could not be fetched: {reason}")
    for model in models:
        assert model == missing or f"\n{model}: " in "\n" + ran.stdout
    told: list[dict[str, Any]] = provisioner.report["models"]
    assert [(it["model"], it["state"]) for it in told] == [
        (it, "failed" if it == missing else "ready") for it in models
    ]
    there = [it for it in models if it != missing]
    assert (provisioner.home / "provisioned").read_text().splitlines() == there

    again = provisioner.run("not-asked-for", LLM_MODELS=",".join(there))
    assert again.stdout == "".join(f"{it}: already here\n" for it in there)
    listed = dict(line.split("\t") for line in provisioner.run("any", "--list").stdout.splitlines())
    assert set(there) <= set(listed)
    assert all(int(size) > 0 for name, size in listed.items() if name in there)

    removed = provisioner.run("any", "--remove", there[0])
    assert (removed.returncode, removed.stdout) == (0, f"{there[0]}: removed\n")
    assert there[0] not in provisioner.run("any", "--list").stdout
    assert (provisioner.home / "provisioned").read_text().splitlines() == there[1:]
    assert provisioner.run("any", "--remove", there[0]).stdout == f"{there[0]} is not on the volume\n"
    assert "GB" in provisioner.run(there[0]).stdout  # it is fetched again
    assert (provisioner.home / "provisioned").read_text().splitlines() == [there[1], there[0]]
