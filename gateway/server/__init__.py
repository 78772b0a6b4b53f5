"""Server: own the processes and sockets, from gunicorn's master to the bytes of one response.

Only this package knows the internals of gunicorn and uvicorn.
"""
