"""Cli: the `stack` command, and the client behind `make chat`."""
