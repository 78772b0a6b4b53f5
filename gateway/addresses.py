"""Addresses: check the URLs and addresses of the settings."""

import ipaddress
import re
import socket
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit


def base_url(value: str) -> str:
    """Accept a base URL with or without its trailing slash or /v1, and return it with /v1. Raises ValueError."""
    url = urlsplit(value)
    if not _is_http(url, value):
        raise ValueError("must look like http://host:port/v1")
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("must not have credentials, a query or a fragment (an engine's key belongs in LLM_API_KEY)")
    path = url.path.rstrip("/")
    return f"{url.scheme}://{url.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def with_host(url: str, host: str) -> str:
    """Return the URL with another host and the same port."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port is not None else ""
    return parts._replace(netloc=host + port).geturl()


def collector(value: str) -> str:
    """Check the base URL of an OpenTelemetry collector. Raises ValueError."""
    url = urlsplit(value)
    if not _is_http(url, value) or url.username or url.query or url.fragment:
        raise ValueError(
            "must look like http://host:4318 (a collector's password belongs in OTEL_EXPORTER_OTLP_HEADERS)"
        )
    return value


def _is_http(url: SplitResult, value: str) -> bool:
    """Tell whether this is an HTTP URL whose host and port a connection can be made to."""
    try:
        sound = url.port != 0 and bool(url.hostname and url.hostname.encode("idna"))  # no label is empty or too long
    except ValueError:  # UnicodeError is one
        return False
    return sound and url.scheme in ("http", "https") and re.fullmatch(r"[\x21-\x7e]+", value) is not None


def database(value: str) -> str:
    """Check the URL of a PostgreSQL database, and return it with the scheme `postgresql`. Raises ValueError, whose
    message has no part of the URL, because that has a password."""
    import psycopg.conninfo  # noqa: PLC0415  it is slow to import

    url = re.sub(r"^postgres(ql)?://", "postgresql://", value, flags=re.IGNORECASE)
    try:
        parts = urlsplit(url)
        sound = parts.scheme == "postgresql" and parts.port != 0 and len(parts.path) > 1
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("must look like postgresql://user:password@host:5432/database")
    try:
        read = psycopg.conninfo.conninfo_to_dict(url)
    except (psycopg.Error, ValueError):
        read = {}
    # libpq takes what follows a raw @ or / of the password for the host or the database, and would tell it in errors
    if not read or re.search(r"[\x00-\x20\x7f]", url) or any("@" in str(read.get(it, "")) for it in ("host", "dbname")):
        raise ValueError(
            "PostgreSQL cannot read this URL. In the user, the password and the database, write % as %25, @ as %40, "
            "/ as %2F, : as %3A and a space as %20. After ? there may be only libpq's parameters."
        )
    return url


def address(value: str) -> str:
    """Check 'host:port', where host is an IP address ('[::1]:9000' for IPv6). Raises ValueError."""
    host, port = split_address(value)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"'{value}' must be an IP address and a port, such as 127.0.0.1:9000 or 0.0.0.0:9000"
        ) from None
    if not 0 <= port <= 65535:
        raise ValueError(f"the port {port} must be from 0 to 65535 (0 means any free port)")
    return value


def listening(value: str) -> str:
    """Check 'host:port', where host is an IP address or a name of this machine's own. Raises ValueError."""
    host, port = split_address(value)
    if not re.fullmatch(r"[0-9A-Za-z:._-]+", host) or not 1 <= port <= 65535:
        raise ValueError(f"'{value}' must be an address and a port, such as 127.0.0.1:9090")
    return value


def own(value: str) -> str:
    """Return the IP address of a name of this machine's own, or of an address. Raises ValueError."""
    try:
        return str(min(socket.getaddrinfo(value, None))[4][0])  # IPv4 before IPv6, because Caddy connects by IPv4
    except (OSError, UnicodeError):
        raise ValueError(f"'{value}' must be an address or a name of the gateway's own") from None


def host(value: str) -> str:
    """Return a host name or an address as a Host header has it: in lower case, without the port and the final dot, and
    IPv6 in brackets. Raises ValueError."""
    for given in (value, value.rpartition(":")[0]):
        with suppress(ValueError):
            return f"[{ipaddress.IPv6Address(given.removeprefix('[').removesuffix(']'))}]"
    match = re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]*?)\.?(:\d{1,5})?", value)
    if not match:
        raise ValueError(
            f"'{value}' must be a host name or an address, such as llm.example, and not a URL or a pattern"
        )
    return match[1].lower()


def origin(value: str) -> str:
    """Return the origin of web pages as an Origin header has it: in lower case, and without the final slash. `*` means
    all origins. Raises ValueError."""
    found = value.lower().removesuffix("/")
    if found not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-~]+", found):
        found = ""
    if not found or re.search(r"[/?#@*]", found.partition("://")[2]):
        raise ValueError(f"'{value}' must be an origin, such as https://app.example: a scheme and a host, and no path")
    return re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", found)


def split_address(value: str) -> tuple[str, int]:
    """'127.0.0.1:9000' → ('127.0.0.1', 9000). Raises ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+)):(\d{1,5})", value)
    if not match:
        raise ValueError(f"'{value}' must be an IP address and a port, such as 127.0.0.1:9000 or 0.0.0.0:9000")
    return match[1] or match[2], int(match[3])
