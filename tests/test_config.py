"""config/stack.example.yaml is valid and shows every field there is."""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from gateway import config
from gateway.settings import Settings, SettingsError
from tests.support.processes import ROOT

EXAMPLE = ROOT / "config/stack.example.yaml"


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_the_example_shows_every_field() -> None:
    shown = keys(yaml.safe_load(EXAMPLE.read_text()))
    models = [it for it in vars(config).values() if isinstance(it, type) and issubclass(it, BaseModel)]
    fields = {name for model in models if model.__module__ == config.__name__ for name in model.model_fields}
    assert len(fields) > 20
    assert fields - {"api_key"} <= shown


def test_the_example_is_valid(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_API_KEYS_FILE", str(tmp_path / "none"))
    key = tmp_path / "gpu-a.key"
    key.write_text("engine-key\n")
    copy = tmp_path / "stack.yaml"
    copy.write_text(EXAMPLE.read_text().replace("/etc/stack/gpu-a.key", str(key)))
    loaded = config.load(Settings(stack_config=copy))
    gpu = loaded.engines["gpu-a"]
    assert gpu.api_key is not None
    assert gpu.api_key.get_secret_value() == "engine-key"
    assert "engine-key" not in repr(loaded)


def test_the_file_of_make_up_names_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_API_KEYS_FILE", str(tmp_path / "none"))
    (tmp_path / "models.yaml").write_text(
        "models:\n- { model: a, gpu: one }\n- { model: b, engine: second, gpu: one }\n- { model: c, engine: third }\n"
    )
    loaded = config.load(Settings(stack_config=tmp_path / "stack.yaml", llm_backend="vllm"))
    assert {name: it.gpu for name, it in loaded.engines.items()} == {"engine": "one", "second": "one", "third": None}
    with pytest.raises(SettingsError, match=r"models\.yaml: engines\.engine: 'gpu' .* ollama cannot\. Run 'make up'"):
        config.load(Settings(stack_config=tmp_path / "stack.yaml", llm_backend="ollama"))


def test_a_directory_in_place_of_stack_yaml_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_API_KEYS_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"is not a file\. Put a stack\.yaml there"):
        config.load(Settings(stack_config=tmp_path))
