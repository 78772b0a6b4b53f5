"""Output: end a command with a sentence, and not with a traceback, if its output cannot be written or it is
interrupted."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


@contextmanager
def written() -> Iterator[None]:
    """Have everything written that the block prints. Exits with 1 and a message if that is impossible, with 1 if the
    reader of a pipe has gone, and with 130 after Ctrl-C."""
    if not sys.stdout:
        sys.exit("Standard output is closed.")
    if isinstance(sys.stdout, TextIOWrapper):  # a character that the terminal cannot show must not stop the output
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        discard()
        sys.exit(130)
    except OSError as exc:
        discard()
        sys.exit(1 if isinstance(exc, BrokenPipeError) else f"Reading or writing failed: {exc.strerror or exc}.")


def discard() -> None:
    """Drop what is not written yet. Otherwise Python tries again at the end of the process, and reports that."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
