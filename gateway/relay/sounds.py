"""Sounds: what is particular about answers that are sounds, or the texts of sounds."""

from typing import Any

from gateway.errors import EngineError
from gateway.exchange import MOST, Exchange
from gateway.multipart import File, seconds

PLAIN = (b"content-type", b"text/plain; charset=utf-8")


def heard(exchange: Exchange, answer: dict[str, Any]) -> float | None:
    """Tell how many seconds of sound were transcribed, as the engine says, or as the head of a WAV file does.
    None: nobody says."""
    usage = answer.get("usage")
    told = usage.get("seconds") if isinstance(usage, dict) else answer.get("duration")
    try:
        found = float(told) if isinstance(told, int | float | str) else -1.0
    except ValueError:
        found = -1.0
    if 0 <= found < MOST:
        return found
    file = exchange.fields.get("file")
    return seconds(file) if isinstance(file, File) else None


def as_text(exchange: Exchange, answer: dict[str, Any]) -> bytes | None:
    """Write a transcription as plain text, if that was asked for. Engines are asked for JSON, which tells the seconds.
    Raises EngineError if there is no text."""
    if exchange.kind != "transcription":
        return None
    text = answer.get("text")
    if not isinstance(text, str):
        raise EngineError("The engine's answer holds no text.")
    return f"{text}\n".encode() if exchange.fields.get("response_format") == "text" else None


def sound_of(content_type: bytes) -> bytes:
    """Return the media type of an answer that is a sound. Raises EngineError for JSON, for text, and without a type."""
    kind = content_type.partition(b";")[0].strip().lower()
    if not kind.startswith(b"audio/") and kind not in (b"application/octet-stream", b"text/event-stream"):
        raise EngineError("The engine's answer is not a sound.")
    return content_type
