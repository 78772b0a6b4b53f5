"""Every header that the gateway's answers may have is exposed to browsers and documented."""

import re

from gateway import headers
from tests.support.processes import ROOT

PAGE = (ROOT / "docs/headers.md").read_text()
OURS = re.compile(r"""["'](?:x-stack-|x-ratelimit-|x-should-retry|x-request-id|idempot|retry-after)[a-z-]*["']""")


def documented(heading: str) -> list[str]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)


def test_every_header_of_an_answer_is_documented_and_no_other() -> None:
    assert sorted(documented("In an answer")) == sorted(headers.EXPOSED)


def test_every_header_of_a_request_is_documented_and_no_other() -> None:
    names = (
        headers.AUTHORIZATION,
        headers.API_KEY,
        headers.REQUEST_ID,
        headers.IDEMPOTENCY_KEY,
        headers.STRICT,
        headers.QUEUE_TIMEOUT,
        headers.RESUME,
        headers.USER,
        headers.TRACEPARENT,
        headers.TRACESTATE,
    )
    assert sorted(documented("In a request")) == sorted(it.decode() for it in names)


def test_the_names_stand_in_one_file() -> None:
    files = [it for it in (ROOT / "gateway").rglob("*.py") if it.name != "headers.py"]
    assert [(it.name, found) for it in files if (found := OURS.findall(it.read_text()))] == []
