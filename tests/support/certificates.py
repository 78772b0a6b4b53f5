"""Certificates: a TLS server of this machine, with a certificate made for a test."""

import datetime as dt
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

AUTHORITY = """
[ca]
default_ca = own
[own]
database = index
new_certs_dir = .
default_md = sha256
policy = any
rand_serial = yes
copy_extensions = copy
[any]
commonName = supplied
"""


def make(directory: Path, name: str, days: int) -> None:
    """Write key.pem and cert.pem for the name ('IP:…' or 'DNS:…'), which signs itself. The certificate began a year ago
    and ends in so many days."""
    (directory / "index").touch()
    (directory / "authority").write_text(AUTHORITY)
    now = dt.datetime.now(dt.UTC)
    begins, ends = (f"{now + dt.timedelta(days=it):%Y%m%d%H%M%SZ}" for it in (-365, days))
    validity = f"-startdate {begins} -enddate {ends}"
    for command in (
        f"req -new -newkey rsa:2048 -nodes -keyout key.pem -out asked -subj /CN=test -addext subjectAltName={name}",
        f"ca -config authority -selfsign -batch -in asked -keyfile key.pem -out cert.pem {validity}",
    ):
        done = subprocess.run(["openssl", *command.split()], cwd=directory, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@contextmanager
def tls_server(directory: Path, address: str) -> Iterator[str]:
    """Serve HTTPS at the address with the files of the directory. Yield address and port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    with ThreadingHTTPServer((address, 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{address}:{server.server_address[1]}"
        server.shutdown()
