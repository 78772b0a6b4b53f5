"""docs/traces.md lists the names that spans have."""

import re

from gateway.traces import names
from tests.support.processes import ROOT


def test_the_page_has_every_name_and_no_other() -> None:
    page = (ROOT / "docs/traces.md").read_text()
    told = set(re.findall(r"^\| `([a-z_.]+)` \|", page, re.MULTILINE))
    assert told == {it for name, it in vars(names).items() if name.isupper() and isinstance(it, str)}
