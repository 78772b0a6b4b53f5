"""Neighbours: decide whether a connection comes from this machine, from a container on a network without a route out,
or from the reverse proxy.

The gateway's port is published on the container's network that has a route out, so requests from the host arrive by
that network. The engine's network has no route out. The route of an answer to a peer therefore tells the two apart. The
peer chooses its Host header, but not this route.
"""

import ipaddress
import socket
from functools import lru_cache

_ELSEWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}  # addresses for documentation, which only a default route reaches


@lru_cache(maxsize=256)
def is_outside(peer: str) -> bool:
    """Return whether the peer's address is this machine's own, or is reached by the network with a route out."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return True
    ours = _source(str(address), address.version)
    return ours is not None and ours == _source(_ELSEWHERE[address.version], address.version)


@lru_cache(maxsize=256)
def is_beside(peer: str, own: str) -> bool:
    """Return whether the peer is reached by the network on which this machine has the address `own`."""
    try:
        return _source(peer, ipaddress.ip_address(peer).version) == own
    except ValueError:
        return False


def _source(peer: str, version: int) -> str | None:
    """Return the source address of a packet to the peer. No packet is sent."""
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
