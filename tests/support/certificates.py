"""Certificates: a TLS server of this machine, with a certificate made for a test."""

import datetime as dt
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme


@contextmanager
def tls_server(address: str, name: str, days: int) -> Iterator[str]:
    """Serve HTTPS at the address, and yield it with the port. The certificate is for the name, began a year ago, and
    ends in so many days."""
    now = dt.datetime.now(dt.UTC)
    begins, ends = now - dt.timedelta(days=365), now + dt.timedelta(days=days, hours=1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert(name, not_before=begins, not_after=ends).configure_cert(context)
    with ThreadingHTTPServer((address, 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{address}:{server.server_address[1]}"
        server.shutdown()
