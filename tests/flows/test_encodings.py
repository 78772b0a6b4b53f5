"""Bodies in gzip and zstd: decoded under the size limit, and refused unless they are one encoded body."""

import gzip
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHAT = "/v1/chat/completions"
CAP = 1_000_000  # the shared gateway's STACK_MAX_BODY_BYTES
ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "zstd": zstd.compress,
    "identity": bytes,
}
# A zstd block of 128 KiB that repeats one byte takes four bytes, so that 1 kB becomes 33 MB, and 31 kB a gigabyte.
BLOCK = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b" "
MAGIC = b"\x28\xb5\x2f\xfd"
HEAD = MAGIC + b"\x00\x58"  # no content size, a window of 2 MiB


def body(mark: str, size: int = 0) -> bytes:
    return orjson.dumps({"messages": MESSAGES, "user": mark, "metadata": {"x": "y" * size}})


def with_window(log: int) -> bytes:
    """A zstd frame that is one raw block, and asks for a window of two to that power in bytes."""
    raw = body("x")
    return MAGIC + bytes([0, (log - 10) << 3]) + (len(raw) << 3 | 1).to_bytes(3, "little") + raw


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("size", [0, 700_000])
def test_an_encoded_body_is_the_body_itself(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, encoding: str, size: int
) -> None:
    data = ENCODERS[encoding](body(mark, size))
    with gateway.client() as client:
        for content in (data, in_pieces(data, 1 if len(data) < 1000 else 50_000)):
            answer = client.post(CHAT, content=content, headers={"content-encoding": encoding})
            assert answer.status_code == 200, answer.text
    assert [it["body"]["messages"] for it in engine.seen(mark)] == [MESSAGES, MESSAGES]


def test_a_repetition_in_another_encoding_is_the_same_request(gateway: GatewayProcess, mark: str) -> None:
    named = {"idempotency-key": mark}
    with gateway.client() as client:
        first = client.post(CHAT, content=body(mark), headers=named)
        again = client.post(CHAT, content=zstd.compress(body(mark)), headers=named | {"content-encoding": "zstd"})
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotent-replayed"] == "true"


def huge_gzip() -> bytes:
    """A gigabyte of spaces, in 1 MB: more than the size limit takes, so a piece of it is sent."""
    made = zlib.compressobj(9, wbits=31)
    first, again = (made.compress(b" " * (9 << 20)) + made.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * 99  # after a full flush, the same bytes are compressed to the same


BOMBS: dict[str, Callable[[], bytes]] = {
    "gzip": huge_gzip,
    "zstd": lambda: HEAD + BLOCK * 7630,
    "zstd, well formed": lambda: bytes(zstd.compress(b" " * (1 << 30), level=1)),
}


def peak(gateway: GatewayProcess) -> int:
    """The most memory that any worker has held, in bytes."""
    lines = [Path(f"/proc/{pid}/status").read_text().splitlines() for pid in gateway.workers()]
    return max(int(line.split()[1]) * 1024 for it in lines for line in it if line.startswith("VmHWM"))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_decompression_bomb_is_refused_at_the_size_limit_in_little_memory_and_time(
    gateway: GatewayProcess, bomb: str
) -> None:
    data = BOMBS[bomb]()
    assert len(data) < CAP
    encoding = bomb.partition(",")[0]
    with gateway.client() as client:
        client.post(CHAT, content=data[:1000], headers={"content-encoding": encoding})  # what a first one needs once
        before, since = peak(gateway), time.monotonic()
        for _ in range(5):
            answer = client.post(CHAT, content=data, headers={"content-encoding": encoding})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert time.monotonic() - since < 10  # a gigabyte takes longer than that five times
        assert peak(gateway) - before < 32 << 20


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_one_kilobyte_that_becomes_more_than_the_limit_is_refused(gateway: GatewayProcess, encoding: str) -> None:
    data = gzip.compress(b" " * CAP * 2) if encoding == "gzip" else HEAD + BLOCK * 240
    assert len(data) < 2500
    with gateway.client() as client:
        assert client.post(CHAT, content=data, headers={"content-encoding": encoding}).status_code == 413


WHOLE = {"gzip": gzip.compress(body("x")), "zstd": zstd.compress(body("x"))}
WRONG = {
    "gzip that is none": ("gzip", b'{"messages": []}'),
    "zstd that is none": ("zstd", b'{"messages": []}'),
    "zstd that is gzip": ("zstd", WHOLE["gzip"]),
    "gzip cut": ("gzip", WHOLE["gzip"][:-1]),
    "zstd cut": ("zstd", WHOLE["zstd"][:-1]),
    "gzip of nothing": ("gzip", b""),
    "zstd of nothing": ("zstd", b""),
    "gzip with a wrong checksum": ("gzip", WHOLE["gzip"][:-8] + b"\0" * 8),
    "gzip twice": ("gzip", WHOLE["gzip"] * 2),
    "zstd twice": ("zstd", WHOLE["zstd"] * 2),
    "gzip and more": ("gzip", WHOLE["gzip"] + b"\0"),
    "zstd and more": ("zstd", WHOLE["zstd"] + b"\0"),
    "deflate as gzip": ("gzip", zlib.compress(body("x"))),
    "zstd with a window of 16 MiB": ("zstd", with_window(24)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_body_that_is_not_one_encoded_body_is_refused(gateway: GatewayProcess, what: str) -> None:
    encoding, data = WRONG[what]
    with gateway.client() as client:
        for content in (data, in_pieces(data, 7 if len(data) < 1000 else 50_000)):
            answer = client.post(CHAT, content=content, headers={"content-encoding": encoding})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-encoding"), answer.text


def test_a_zstd_window_of_8_mib_is_taken(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, content=with_window(23), headers={"content-encoding": "zstd"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("encoding", ["br", "deflate", "compress", "gzip, gzip", "gzip, zstd", "gzip,identity", "x"])
def test_an_encoding_that_is_not_taken_is_a_415_that_names_those_that_are(
    gateway: GatewayProcess, encoding: str
) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, content=WHOLE["gzip"], headers={"content-encoding": encoding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert answer.headers["accept-encoding"] == "gzip, zstd"
    assert "gzip or zstd" in answer.json()["error"]["message"]


def test_two_headers_are_a_nested_encoding(gateway: GatewayProcess) -> None:
    headers = [("content-encoding", "gzip"), ("content-encoding", "gzip")]
    with gateway.client() as client:
        answer = client.post(CHAT, content=gzip.compress(WHOLE["gzip"]), headers=headers)
    assert answer.status_code == 415
