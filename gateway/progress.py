"""Progress: what the provisioner last wrote about the model it fetches, as the error that callers get meanwhile."""

import time
from pathlib import Path
from typing import Any

import orjson

from gateway.errors import EngineOverloaded, EngineTimeout, EngineUnavailable, ModelLoading, StackError
from gateway.settings import Settings

SILENCE = 60.0  # seconds; a provisioner that lives shows it more often (engine/provisioning.py)


class Progress:
    """The provisioner's report, read anew whenever the engine is not there. No file, or no sound one: nothing known."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.stack_progress_file
        self._model = settings.llm_model

    def explain(self, error: StackError, *models: str) -> StackError:
        """The reason behind an error about these models of engines': that ours is still being fetched, or could not be.
        Else the error itself."""
        absent = isinstance(error, EngineUnavailable | EngineTimeout) and not isinstance(error, EngineOverloaded)
        return (absent and self._model in models and self._reason()) or error

    def _reason(self) -> StackError | None:
        report, age = _read(self._file)
        if report.get("model") != self._model:
            return None  # of a model that was wanted earlier
        if report.get("state") == "failed":
            return EngineUnavailable(f"{report.get('message')}", code="model_unavailable")
        if report.get("state") != "fetching":
            return None
        far = _how_far(report.get("completed"), report.get("total"))
        if age > SILENCE:
            return EngineUnavailable(
                f"The fetching of the model {self._model} stopped{far and ' at ' + far}: run 'make up' again, "
                "which goes on from there.",
                code="model_unavailable",
            )
        return ModelLoading(f"The model {self._model} is being fetched{far and ': ' + far}.")


def _read(path: Path) -> tuple[dict[str, Any], float]:
    """The report and its age in seconds. Both clocks are this machine's: the file is on a volume of its Docker."""
    try:
        report = orjson.loads(path.read_bytes())
        age = time.time() - path.stat().st_mtime
    except (OSError, orjson.JSONDecodeError):
        return {}, 0.0
    return (report, age) if isinstance(report, dict) else ({}, 0.0)


def _how_far(completed: Any, total: Any) -> str:
    if not isinstance(completed, int) or not isinstance(total, int) or total <= 0:
        return ""
    return f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({min(100, 100 * completed // total)}%)"
