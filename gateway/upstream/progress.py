"""Progress: turn the provisioner's last report about the model into the error that callers get while it is being
fetched."""

import time
from pathlib import Path
from typing import Any

import orjson

from gateway import files
from gateway.errors import EngineOverloaded, EngineTimeout, EngineUnavailable, ModelLoading, StackError
from gateway.settings import Settings

_STATES = ("fetching", "ready", "failed")  # as engine/provisioning.py writes them
MAX_FILE = 64 * 1024  # bytes
SILENCE = 60.0  # seconds; a running provisioner writes more often (engine/provisioning.py)


class Progress:
    """Read the provisioner's report whenever the engine is unavailable. A missing or damaged file says nothing."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.stack_progress_file
        self._model = settings.llm_model

    def explain(self, error: StackError, *models: str) -> StackError:
        """Return the reason for an error about these models of engines: the configured model is still being fetched, or
        could not be fetched. Without such a reason, return the error itself."""
        absent = isinstance(error, EngineUnavailable | EngineTimeout) and not isinstance(error, EngineOverloaded)
        return (absent and self._model in models and self._reason()) or error

    def fetched(self) -> tuple[str, float, bool] | None:
        """Return the model that is fetched, the share of it that is there (0 to 1), and whether the download failed.
        None: nothing is known."""
        report, age = _read(self._file)
        state, completed, total = (report.get(name) for name in ("state", "completed", "total"))
        if report.get("model") != self._model or state not in _STATES:
            return None
        share = 1.0 if state == "ready" else 0.0
        if state == "fetching" and isinstance(completed, int) and isinstance(total, int) and total > 0:
            share = min(1.0, completed / total)
        return self._model, share, state == "failed" or (state == "fetching" and age > SILENCE)

    def _reason(self) -> StackError | None:
        report, age = _read(self._file)
        if report.get("model") != self._model:
            return None  # the report is about a model that was configured earlier
        if report.get("state") == "failed":
            return EngineUnavailable(f"{report.get('message')}", code="model_unavailable")
        if report.get("state") != "fetching":
            return None
        far = _how_far(report.get("completed"), report.get("total"))
        if age > SILENCE:
            return EngineUnavailable(
                f"The download of the model {self._model} stopped{far and ' at ' + far}. Run 'make up' again, "
                "which continues it.",
                code="model_unavailable",
            )
        return ModelLoading(f"The model {self._model} is being fetched{far and ': ' + far}.")


def _read(path: Path) -> tuple[dict[str, Any], float]:
    """Return the report and its age in seconds. The file's time and the gateway's clock are those of one machine,
    because the file is on a volume of its Docker."""
    try:
        report = orjson.loads(files.read(path, MAX_FILE))
        age = time.time() - path.stat().st_mtime
    except (OSError, orjson.JSONDecodeError):
        return {}, 0.0
    return (report, age) if isinstance(report, dict) else ({}, 0.0)


def _how_far(completed: Any, total: Any) -> str:
    if not isinstance(completed, int) or not isinstance(total, int) or total <= 0:
        return ""
    return f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({min(100, 100 * completed // total)}%)"
