"""Check the gateway in this container: exit 0 if /livez answers. `python -IS gateway/server/healthcheck.py` runs it.

It runs every few seconds, so it imports little: with http.client and site-packages it would take three times as long.
"""

import os
import socket
import sys


def main() -> None:
    host, _, port = (os.environ.get("STACK_BIND") or "127.0.0.1:9000").rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    try:
        with socket.create_connection((host, int(port)), timeout=4) as connection, connection.makefile("rb") as answer:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            sys.exit(0 if answer.readline().split()[1:2] == [b"200"] else 1)
    except OSError as exc:
        sys.exit(f"/livez: {exc}")


if __name__ == "__main__":
    main()
