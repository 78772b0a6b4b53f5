"""`python -m gateway.healthcheck`: exit 0 if the gateway in this container answers /livez. Standard library only: it
runs every few seconds."""

import http.client
import os
import sys


def main() -> None:
    port = int(os.environ.get("STACK_BIND", "127.0.0.1:9000").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", "/livez")
        sys.exit(0 if connection.getresponse().status == 200 else 1)
    except OSError as exc:
        sys.exit(f"/livez: {exc}")


if __name__ == "__main__":
    main()
