"""`python -m gateway` runs the service."""

from gateway.server import main

main()
