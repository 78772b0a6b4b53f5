"""Admin: serve the HTTP API of the operator, which can do what the `stack` command can.

The API needs an admin key. If no admin key is set, its paths do not exist. This module reads the bodies itself, with a
size limit and after the key is checked, because FastAPI reads a body before it knows the caller.
"""
