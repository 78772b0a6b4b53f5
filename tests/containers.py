"""Containers that go with the process that started them, whatever ends it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# Again, where something else must go first.
REMOVE = 'cat; for _ in 1 2 3 4 5 6 7 8 9; do docker "$@" >/dev/null 2>&1 && break; sleep 1; done'


def docker(*words: str) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(["docker", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def removing(*removal: str) -> Iterator[None]:
    """Have docker remove something at the end. Who does it waits for a pipe to break: a SIGKILL breaks it, too."""
    with subprocess.Popen(["sh", "-c", REMOVE, "sh", *removal], stdin=subprocess.PIPE, start_new_session=True):
        yield


@contextmanager
def container(name: str, *words: str) -> Iterator[str]:
    """`docker run` with these words, detached; its name."""
    with removing("rm", "--force", "--volumes", name):
        docker("run", "--detach", "--init", "--name", name, *words)
        yield name
