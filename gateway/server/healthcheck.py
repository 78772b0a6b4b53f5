"""Check the gateway in this container: `python -m gateway.server.healthcheck` exits 0 if /livez answers.

It uses only the standard library, because it runs every few seconds.
"""

import http.client
import os
import sys


def main() -> None:
    host, _, port = (os.environ.get("STACK_BIND") or "127.0.0.1:9000").rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    connection = http.client.HTTPConnection(host, int(port), timeout=4)
    try:
        connection.request("GET", "/livez")
        sys.exit(0 if connection.getresponse().status == 200 else 1)
    except OSError as exc:
        sys.exit(f"/livez: {exc}")


if __name__ == "__main__":
    main()
