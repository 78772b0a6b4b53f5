"""Forms are read as they were written, whatever is in them, and no cut or change of a form is anything but a 400."""

import email.policy
from contextlib import suppress
from email.parser import BytesParser
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gateway import multipart
from gateway.errors import BadRequest
from gateway.multipart import CONTENT_TYPE, File
from tests.support.parameters import form

NAMES = st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True).filter(lambda it: it != "file")
TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=50)
FIELDS = st.dictionaries(NAMES, TEXTS, max_size=5)
DATA = st.binary(max_size=200) | st.sampled_from([b"\r\n--", b"\r\n\r\n", b"--\r\n", b"-" * 70])


@given(FIELDS, DATA)
def test_what_a_client_writes_is_what_is_read(fields: dict[str, str], data: bytes) -> None:
    raw, headers = form(fields, ("a b.wav", data, "audio/wav"))
    body = multipart.parse(raw, headers["content-type"].encode())
    file = body.pop("file")
    assert (file.name, file.kind, bytes(file.data)) == ("a_b.wav", "audio/wav", data)
    assert body.keys() == fields.keys()
    for name, text in fields.items():
        assert body[name] in (text, _as_engine(text))


def _as_engine(text: str) -> Any:
    return {"true": True, "false": False}.get(text) if text in ("true", "false") else _whole(text)


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


@given(FIELDS, DATA, st.lists(TEXTS, max_size=3))
def test_what_the_gateway_writes_an_engine_reads(fields: dict[str, str], data: bytes, several: list[str]) -> None:
    wanted: dict[str, Any] = {"file": File("a.wav", "audio/wav", memoryview(data)), "several[]": several} | fields
    raw = multipart.write(wanted | {"nothing": None})
    parser = BytesParser(policy=email.policy.HTTP)
    read = parser.parsebytes(f"content-type: {CONTENT_TYPE}\r\n\r\n".encode() + raw)
    found = [
        (str(it.get_param("name", header="content-disposition")), it.get_payload(decode=True)) for it in read.walk()
    ]
    texts = [(name, text.encode()) for name, text in fields.items()]
    assert found[1:] == [("file", data), *(("several[]", it.encode()) for it in several), *texts]


@given(FIELDS, DATA, st.data())
def test_a_form_that_was_cut_or_changed_is_read_or_refused(fields: dict[str, str], data: bytes, draw: Any) -> None:
    raw, headers = form(fields, ("a.wav", data, "audio/wav"))
    at = draw.draw(st.integers(0, len(raw)))
    for changed in (raw[:at], raw[:at] + draw.draw(st.binary(max_size=5)) + raw[at:]):
        with suppress(BadRequest):  # nothing else
            multipart.parse(changed, headers["content-type"].encode())


def test_a_cut_form_is_refused() -> None:
    raw, headers = form({"model": "m"})
    for at in range(len(raw) - 4):
        with pytest.raises(BadRequest):
            multipart.parse(raw[:at], headers["content-type"].encode())


@pytest.mark.parametrize(
    ("content_type", "is_form"),
    [
        (b"multipart/form-data; boundary=b", True),
        (b'multipart/form-data; charset=utf-8; boundary="a b"', True),
        (b"Multipart/Form-Data;boundary=b", True),
        (b"multipart/form-data;\tboundary=b", True),
        (b"multipart/form-data ; charset = utf-8 ; boundary = b", True),
        (b"multipart/form-data", False),
        (b"multipart/form-data; boundary=", False),
        (b"multipart/form-data; boundary=" + b"b" * 71, False),
        (b"multipart/mixed; boundary=b", False),
        (b"application/json", False),
    ],
)
def test_a_content_type_of_a_form_names_its_boundary(content_type: bytes, is_form: bool) -> None:
    assert multipart.is_form(content_type) == is_form


def test_only_the_head_of_a_wav_file_tells_its_length() -> None:
    wav = (
        b"RIFF\x00\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00\x10\x00"
    )
    sound = wav + b"data\xff\xff\xff\xff" + bytes(16_000)  # as a stream has it: the length is not known
    assert multipart.seconds(File("a", "audio/wav", memoryview(sound))) == 1.0
    chunk = b"junk" + bytes(4)
    assert multipart.seconds(File("a", "audio/wav", memoryview(wav[:12] + 500 * chunk + sound[12:]))) == 1.0
    endless = wav[:12] + 2_000_000 * chunk + sound[12:]  # it would take seconds to read
    for other in (
        endless,
        b"",
        b"RIFF",
        wav,
        wav + bytes(20),
        b"ID3" + bytes(100),
        sound.replace(b"\x80\x3e", b"\x00\x00"),
    ):
        assert multipart.seconds(File("a", "audio/wav", memoryview(other))) is None
