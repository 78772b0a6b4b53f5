"""Limits: decide what a key may use, count what it has used, and estimate what a request will use."""
