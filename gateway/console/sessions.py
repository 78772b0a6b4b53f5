"""Sessions: remember who is signed in, and how often an address was wrong, in memory that all workers share.

A session is an opaque token in the browser's cookie. Here are the token's digest and the digest of the key that was
given, so that a session ends with its key. All sessions end with the gateway. Times are seconds since 1970.
"""

import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable

from gateway.errors import GatewayBusy
from gateway.shared_memory import BusyError, Region

SESSIONS = 1024  # of all visitors; beyond that, the one that ends soonest makes room
OF_ONE_KEY = 16  # sessions of one key; beyond that, its own oldest one makes room
ADDRESSES = 4096  # cells in which wrong attempts are counted
WRONG = 10  # attempts that an address may make in a row
AGAIN = 6.0  # seconds for each further one
FORMS = 1024  # forms that act once and were sent last, of all visitors

_DIGEST = 32  # bytes of a SHA-256
_LINE = 2 * _DIGEST


class Sessions:
    """Hold all sessions. The master makes it before it forks. Every method raises GatewayBusy if the memory is locked
    for too long. `now` is the clock.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._region = Region(8 * (SESSIONS + ADDRESSES) + SESSIONS * _LINE + 8 * (FORMS + 1))
        view = memoryview(self._region.memory)
        self._ends = view[: 8 * SESSIONS].cast("d")  # 0: the place is free; written last
        self._full = view[8 * SESSIONS : 8 * (SESSIONS + ADDRESSES)].cast("d")
        end = 8 * (SESSIONS + ADDRESSES) + SESSIONS * _LINE
        self._lines = view[8 * (SESSIONS + ADDRESSES) : end]
        self._sent = view[end:].cast("Q")  # 0: nothing; the last one counts them, and is written last
        self._salt = secrets.token_bytes(16)

    def begin(self, secret: bytes, seconds: float) -> str:
        """Begin a session of the key with that digest. Returns its token."""
        token = secrets.token_urlsafe(_DIGEST)
        with self._locked():
            now, ends = self._now(), self._ends.tolist()
            own = [it for it in self._places(secret, at=_DIGEST) if ends[it] > now]
            candidates = own if len(own) >= OF_ONE_KEY else range(SESSIONS)
            place = min(candidates, key=lambda it: ends[it])
            self._ends[place] = 0.0
            self._lines[place * _LINE : (place + 1) * _LINE] = _digest(token) + secret
            self._ends[place] = now + seconds
        return token

    def find(self, token: str) -> bytes | None:
        """Return the digest of the key whose session that token is of; None if there is no such session, or no more."""
        with self._locked():
            place = self._place(token)
            return None if place is None else bytes(self._lines[place * _LINE + _DIGEST : (place + 1) * _LINE])

    def end(self, token: str) -> None:
        """End that session."""
        with self._locked():
            if (place := self._place(token)) is not None:
                self._ends[place] = 0.0

    def try_in(self, address: str) -> float:
        """Charge an attempt to sign in from that address. Returns 0, or the seconds to wait, and then nothing is
        charged."""
        with self._locked():
            now, cell = self._now(), self._cell(address)
            full = max(self._full[cell], now)
            wait = full + AGAIN - now - WRONG * AGAIN
            if wait > 0:
                return wait
            self._full[cell] = full + AGAIN
            return 0.0

    def was_right(self, address: str) -> None:
        """Give back the charge of an attempt, because its key was right."""
        with self._locked():
            self._full[self._cell(address)] -= AGAIN

    def use(self, form_token: str) -> bool:
        """Note that a form with that token was sent. Returns whether it is the first time."""
        number = _number(form_token)
        with self._locked():
            if number in self._sent[:FORMS].tolist():
                return False
            self._sent[self._sent[FORMS] % FORMS] = number
            self._sent[FORMS] += 1
            return True

    def give_back(self, form_token: str) -> None:
        """Forget that a form with that token was sent."""
        number = _number(form_token)
        with self._locked():
            for place, it in enumerate(self._sent[:FORMS].tolist()):
                if it == number:
                    self._sent[place] = 0

    def _place(self, token: str) -> int | None:
        now = self._now()
        return next((it for it in self._places(_digest(token), at=0) if self._ends[it] > now), None)

    def _places(self, digest: bytes, at: int) -> list[int]:
        """The places whose line has that digest at that offset."""
        lines, found, start = bytes(self._lines), [], 0
        while (start := lines.find(digest, start)) >= 0:
            if start % _LINE == at:
                found.append(start // _LINE)
            start += 1
        return found

    def _cell(self, address: str) -> int:
        digest = hashlib.blake2b(network(address).encode(), digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest, "little") % ADDRESSES

    def _locked(self) -> "_Locked":
        return _Locked(self._region)


class _Locked:
    """The region's lock, with our error."""

    def __init__(self, region: Region) -> None:
        self._lock = region.lock

    def __enter__(self) -> None:
        try:
            self._lock.__enter__()
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy. Try again shortly.") from exc

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(*exc)


def network(address: str) -> str:
    """Return the address, or the /64 of an IPv6 address, which one visitor has as a whole."""
    try:
        it = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(it if it.version == 4 else ipaddress.ip_network((it, 64), strict=False))


def _number(form_token: str) -> int:
    return int.from_bytes(_digest(form_token)[:8], "little")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
