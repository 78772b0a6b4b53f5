"""Reading: take the body of a request from its connection, decoded, under the size limit and the byte budget."""

import asyncio
import sys
import zlib
from collections.abc import Iterator
from typing import Protocol

from starlette.types import Receive, Scope

from gateway.byte_budget import Charge
from gateway.errors import BadRequest, ClientLeft, TooLarge, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

SLICE = 64 * 1024  # bytes that are decoded at a time, which blocks the event loop for less than a millisecond
_WINDOW = 23  # a frame's window is 8 MiB at most (RFC 9659), and so is the memory of its decoder
_GZIP = 16 + zlib.MAX_WBITS  # zlib's value for gzip's header and trailer
# Parts of a body's size that it is charged: as it is read, and what is made of it. zstd's window is a third copy.
_COPIES, _COPIES_ZSTD = 2, 3


class _Decoder(Protocol):
    """Decode one body. `eof` is true once its encoding has ended."""

    eof: bool

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the decoded bytes of `data`, in pieces of SLICE bytes at most. Raises BadRequest if it cannot be
        decoded."""


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(_GZIP)
        self.eof = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        piece = b""
        while data or len(piece) == SLICE:
            _refuse_trailing(data if self.eof else b"")
            try:
                piece = self._zlib.decompress(data, SLICE)
            except zlib.error as exc:
                raise _damaged("gzip") from exc
            self.eof = self._zlib.eof
            _refuse_trailing(self._zlib.unused_data)
            yield piece
            data = self._zlib.unconsumed_tail


class _Zstd:
    def __init__(self) -> None:
        self._zstd = ZstdDecompressor(options={DecompressionParameter.window_log_max: _WINDOW})
        self.eof = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        while data or not (self.eof or self._zstd.needs_input):
            _refuse_trailing(data if self.eof else b"")
            try:
                piece = self._zstd.decompress(data, SLICE)
            except ZstdError as exc:
                raise _damaged("zstd") from exc
            self.eof = self._zstd.eof
            _refuse_trailing(self._zstd.unused_data)
            yield piece
            data = b""


_DECODERS: dict[bytes, type[_Gzip | _Zstd] | None] = {
    b"": None,
    b"identity": None,
    b"gzip": _Gzip,
    b"x-gzip": _Gzip,  # another name for gzip (RFC 9110, 8.4.1.3)
    b"zstd": _Zstd,
}


async def read(scope: Scope, receive: Receive, charge: Charge, most: int) -> bytes:
    """Return the whole body, decoded. `most` bounds its bytes, encoded and decoded.

    The body is charged for all its copies while it grows. Raises UnsupportedEncoding, TooLarge, BadRequest, ClientLeft
    if the client disconnects, what Charge.resize raises, and the protocol's rejection of a body that never came whole.
    """
    headers = scope["headers"]
    decoder = _decoder(headers)
    copies = _COPIES_ZSTD if isinstance(decoder, _Zstd) else _COPIES
    declared = dict(headers).get(b"content-length", b"")
    if declared.isdigit():
        if len(declared) > 18 or int(declared) > most:
            raise _too_large(most)
        charge.resize(copies * int(declared))
    parts: list[bytes] = []
    small = bytearray()  # the last pieces, because an object for each small one would take many times its bytes
    taken = size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("The client disconnected.")
        data = message.get("body", b"")
        taken += len(data)
        more = message.get("more_body", False)
        for piece in decoder.decode(data) if decoder else (data,):
            size += len(piece)
            if max(size, taken) > most:
                raise _too_large(most)
            if copies * size > charge.size:
                charge.resize(copies * size)
            small += piece
            if len(small) >= SLICE:
                parts.append(bytes(small))
                small.clear()
            if len(piece) == SLICE and decoder:
                await asyncio.sleep(0)  # let other requests run
    if "refusal" in scope:  # the rest of the body did not come, or was malformed (server/protocol.py)
        raise scope["refusal"]
    if decoder and not decoder.eof:
        raise BadRequest("The compressed body is incomplete. Send all of it.", param="content-encoding")
    parts.append(bytes(small))
    return b"".join(parts)


def _decoder(headers: list[tuple[bytes, bytes]]) -> _Decoder | None:
    """Return the decoder of the body; None if it is not encoded. Raises UnsupportedEncoding."""
    encodings = [value.strip().lower() for name, value in headers if name == b"content-encoding"]
    encoding = b",".join(encodings)
    if encoding not in _DECODERS:
        raise UnsupportedEncoding(
            "Compress the body once, with gzip or zstd, and name that in Content-Encoding. Or send it uncompressed, "
            "without Content-Encoding."
        )
    if dict(headers).get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        raise UnsupportedEncoding("Send the body without a Transfer-Encoding, or with chunked.")
    made = _DECODERS[encoding]
    return made() if made else None


def _refuse_trailing(data: bytes) -> None:
    if data:
        raise BadRequest("The body has bytes after the end of its compressed data.", param="content-encoding")


def _damaged(encoding: str) -> BadRequest:
    return BadRequest(
        f"The body is not valid {encoding}, although its Content-Encoding says so.", param="content-encoding"
    )


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"The body is larger than {most} bytes.")
