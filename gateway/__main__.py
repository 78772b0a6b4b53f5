"""Run the service: `python -m gateway`."""

from gateway.server.master import main

main()
