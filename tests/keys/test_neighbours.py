"""Where a connection comes from."""

import pytest

from gateway.keys.neighbours import is_beside, is_outside


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_this_machine_may_use_the_placeholder(peer: str) -> None:
    assert is_outside(peer)


@pytest.mark.parametrize("peer", ["", "unix", "::ffff:x", "1.2.3", "gateway"])
def test_a_malformed_address_is_not_outside(peer: str) -> None:
    assert not is_outside(peer)


@pytest.mark.parametrize(
    ("peer", "own", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("127.0.0.1", "192.0.2.7", False),
        ("198.51.100.7", "127.0.0.1", False),
        ("unix", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_a_peer_is_beside_the_address_from_which_it_would_be_answered(peer: str, own: str, expected: bool) -> None:
    assert is_beside(peer, own) is expected
