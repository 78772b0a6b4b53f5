"""Progress: turn the provisioner's last report about a model into the error that callers get while it is being fetched.

The file has the report on one model, or `{"models": […]}` with several.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from gateway import files
from gateway.errors import EngineOverloaded, EngineTimeout, EngineUnavailable, ModelLoading, ModelNotFound, StackError
from gateway.settings import Settings

_STATES = ("fetching", "ready", "failed")  # as engine/provisioning.py writes them
MAX_FILE = 64 * 1024  # bytes
SILENCE = 60.0  # seconds; a running provisioner writes more often (engine/provisioning.py)


class Progress:
    """Read the provisioner's reports whenever an engine cannot answer. A missing or damaged file says nothing."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.stack_progress_file

    def explain(self, error: StackError, *models: str) -> StackError:
        """Return the reason for an error about these models of engines: one of them is still being fetched, or could
        not be fetched. Without such a reason, return the error itself."""
        absent = isinstance(error, EngineUnavailable | EngineTimeout | ModelNotFound)
        if not absent or isinstance(error, EngineOverloaded) or not models:
            return error
        reports, age = _read(self._file)
        found = (_reason(it, age) for it in reports if it.get("model") in models)
        return next(filter(None, found), error)

    def fetched(self) -> Iterator[tuple[str, float, bool]]:
        """Yield each model that is fetched, how much of it is there (0 to 1), and whether it could not be fetched."""
        reports, age = _read(self._file)
        for report in reports:
            model, state, completed, total = (report.get(it) for it in ("model", "state", "completed", "total"))
            if not isinstance(model, str) or state not in _STATES:
                continue
            share = 1.0 if state == "ready" else 0.0
            if state == "fetching" and isinstance(completed, int) and isinstance(total, int) and total > 0:
                share = min(1.0, completed / total)
            yield model, share, state == "failed" or (state == "fetching" and age > SILENCE)


def _reason(report: dict[str, Any], age: float) -> StackError | None:
    model = report.get("model")
    if report.get("state") == "failed":
        return EngineUnavailable(f"{report.get('message')}", code="model_unavailable")
    if report.get("state") != "fetching":
        return None
    far = _how_far(report.get("completed"), report.get("total"))
    if age > SILENCE:
        return EngineUnavailable(
            f"The download of the model {model} stopped{far and ' at ' + far}. Run 'make up' again, "
            "which continues it.",
            code="model_unavailable",
        )
    return ModelLoading(f"The model {model} is being fetched{far and ': ' + far}.")


def _read(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the report on each model, and their age in seconds. The file's time and the gateway's clock are those of
    one machine, because the file is on a volume of its Docker."""
    try:
        report = orjson.loads(files.read(path, MAX_FILE))
        age = time.time() - path.stat().st_mtime
    except (OSError, orjson.JSONDecodeError):
        return [], 0.0
    several = report.get("models", [report]) if isinstance(report, dict) else []
    return [it for it in several if isinstance(it, dict)] if isinstance(several, list) else [], age


def _how_far(completed: Any, total: Any) -> str:
    if not isinstance(completed, int) or not isinstance(total, int) or total <= 0:
        return ""
    return f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({min(100, 100 * completed // total)}%)"
