#!/usr/bin/env -S python3 -IS
"""Exit 0 if llama.cpp has loaded its model: only then it answers 200 here. It imports little, because it runs every few
seconds."""

import socket
import sys

with socket.create_connection(("127.0.0.1", 8080), timeout=3) as connection, connection.makefile("rb") as answer:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    sys.exit(answer.readline().split()[1:2] != [b"200"])
