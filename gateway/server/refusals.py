"""Refusals: the errors for bytes that are not a request that this server takes."""

from gateway.errors import BadRequest, HeadersTooLarge, NotFound

MAX_HEADERS = 100  # Apache's default; real clients send 10 to 25
MAX_HEAD = 32 * 1024  # bytes of target and headers together: what nginx takes by default


def invalid(reason: str) -> BadRequest:
    """Return the error for what is not HTTP/1.1, with the reason."""
    return BadRequest(f"The request is not valid HTTP/1.1: {reason}.", code="invalid_http")


def other_protocol(data: bytes) -> str:
    """Return which other protocol a client seems to speak, by its first bytes; otherwise an empty string."""
    if data.startswith(b"PRI * HTTP/2"):
        return "this port serves HTTP/1.1, and not HTTP/2 by prior knowledge"
    if data.startswith(b"\x16\x03"):
        return "this port serves plain HTTP, and not TLS: use http://, or put a proxy with a certificate in front"
    return ""


def no_proxy() -> NotFound:
    """Return the error for a target that is not a path."""
    return NotFound("The request's target must be a path, because this server is not a proxy.")


def too_large() -> HeadersTooLarge:
    """Return the error for a head that is larger than the limits."""
    return HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers, or more than {MAX_HEAD} bytes of them.")
