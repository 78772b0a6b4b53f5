"""Where a connection comes from."""

import pytest

from gateway.keys.neighbours import is_outside


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_this_machine_may_use_the_placeholder(peer: str) -> None:
    assert is_outside(peer)


@pytest.mark.parametrize("peer", ["", "unix", "::ffff:x", "1.2.3", "gateway"])
def test_a_malformed_address_is_not_outside(peer: str) -> None:
    assert not is_outside(peer)
