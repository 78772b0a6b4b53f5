"""Bell: wake a worker, by a datagram, when one of its requests gets a slot."""

import contextlib
import socket
import struct
from pathlib import Path

from gateway.admission.memory import Places

_DATAGRAM = struct.Struct("<I")


class Bell:
    """Wake the workers of one gateway. Each worker listens on a socket of its own in a directory that all of them
    share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def listen(self, seat: int) -> None:
        """Listen as the worker with this seat, and replace a socket that its predecessor left. Raises OSError if the
        path is too long."""
        path = self._path(seat)
        Path(path).unlink(missing_ok=True)
        self._socket.bind(path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def ring(self, seat: int, place: int) -> None:
        """Tell the worker with this seat that its place has a slot. The datagram may be lost."""
        with contextlib.suppress(OSError):
            self._socket.sendto(_DATAGRAM.pack(place), self._path(seat))

    def heard(self) -> list[int]:
        """Return the places for which the bell was rung since the last call."""
        found = []
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_DATAGRAM.size):
                found.append(_DATAGRAM.unpack(data)[0])
        return found

    def _path(self, seat: int) -> str:
        return f"{self._directory}/{seat}"


def vacate(places: Places, bell: Bell, seat: int) -> None:
    """Free the slots and places of a dead worker, and give the slots to waiting requests. Called in the master. Raises
    BusyError."""
    for worker, place in places.vacate(seat):
        bell.ring(worker, place)
