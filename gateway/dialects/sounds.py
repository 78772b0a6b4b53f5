"""Sounds: the fields of a request for the text of a sound, as engines take them."""

from collections.abc import Callable
from typing import Any

from gateway.errors import BadRequest


def fit_transcription(*formats: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a `fit` for an engine that answers in these formats, beside plain text.

    Text is asked for as JSON, in which engines tell how long the sound is. The relay makes text of it.
    """

    def fit(fields: dict[str, Any]) -> dict[str, Any]:
        wanted = fields.get("response_format")
        if wanted in (None, *formats):
            return fields
        if wanted == "text":
            return fields | {"response_format": "json"}
        known = ", ".join(("text", *formats))
        raise BadRequest(f"'response_format' must be one of {known}.", param="response_format")

    return fit
