""".env.example is complete, and names nothing that does not exist."""

import re

from gateway.settings import Settings
from tests.support.clone import merged
from tests.support.processes import ROOT

TEXT = (ROOT / ".env.example").read_text()
NAMES = re.findall(r"^#([A-Z][A-Z0-9_]*)=", TEXT, re.MULTILINE)
OF_THE_SCRIPTS = {"COMPOSE_FILE", "COMPOSE_PROJECT_NAME", "VLLM_GPU_SHARES", "VLLM_SLEEP"}


def used_in_compose_files() -> set[str]:
    """Every ${NAME}, and every name that is passed on from the shell because it has no value."""
    used: set[str] = set()
    for file in ROOT.glob("compose*.yaml"):
        text = file.read_text()
        used |= set(re.findall(r"\$\{([A-Z0-9_]+)", text)) | set(re.findall(r"^ +([A-Z0-9_]+):$", text, re.MULTILINE))
    return used


def test_env_example_names_every_setting_exactly_once() -> None:
    fields = {name.upper() for name in Settings.model_fields}
    assert sorted(NAMES) == sorted(fields | used_in_compose_files() | OF_THE_SCRIPTS)


def test_env_example_copied_to_dotenv_changes_nothing() -> None:
    assert not re.findall(r"^[^#\n].*$", TEXT, re.MULTILINE)


def test_every_setting_is_explained() -> None:
    """A comment stands above each group of names."""
    for block in re.split(r"\n\n+", TEXT):
        if re.search(r"^#[A-Z]", block, re.MULTILINE):
            assert block.startswith("# "), block


def test_env_example_states_the_real_defaults() -> None:
    stated = dict(re.findall(r"^#([A-Z][A-Z0-9_]*)=(.*)$", TEXT, re.MULTILINE))
    used = {}
    for file in ROOT.glob("compose*.yaml"):
        for name, default in re.findall(r"\$\{([A-Z0-9_]+):-([^${}]*)\}", file.read_text()):
            used.setdefault(name, set()).add(default)
    for name, defaults in used.items():
        # The model and its aliases differ between engines; the example shows Ollama's, the first. Any file for the
        # webhook, even /dev/null, makes Alertmanager send alerts.
        assert stated[name] in defaults or name in ("STACK_MODEL_ALIASES", "STACK_ALERT_WEBHOOK_FILE"), name
    assert used["STACK_ALERT_WEBHOOK_FILE"] == {"/dev/null"} != {stated["STACK_ALERT_WEBHOOK_FILE"]}

    passed_on = merged("ollama")["services"]["gateway"]["environment"]
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        if passed_on.get(name.upper(), "") is None and isinstance(default, int | float | str):
            value = stated[name.upper()]
            assert (type(default)(value) if not isinstance(default, bool) else value == "true") == default, name
