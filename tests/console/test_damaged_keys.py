"""Keys whose rows in the store are damaged, as a restored or edited database may have them: named, and deleted."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.console import Visit, make_key, names_of
from tests.support.keys import admin
from tests.support.processes import GatewayProcess

DAMAGE = ["priority = 0", "labels = '{'", "expires_at = 'soon'", "name = ''", "disabled = 'maybe'", "created_at = -1"]


@pytest.fixture(scope="module", autouse=True)
def _no_bug(console: GatewayProcess) -> Iterator[None]:
    yield
    assert "a bug in the console" not in console.log_path.read_text()


def damage(data: Path, change: str, where: str, value: str) -> None:
    with closing(sqlite3.connect(data / "stack.db", timeout=30)) as store, store:
        store.execute(f"UPDATE keys SET {change} WHERE {where} ?", (value,))


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_key_is_named_in_the_list_and_deleted_on_its_page(
    operator: Visit, data: Path, mark: str, change: str
) -> None:
    key_id, _ = make_key(operator, "whole", owner=mark)
    damage(data, change, "id =", key_id)
    listed = operator.get("/console/keys", params={"q": mark}).text
    assert names_of(listed) == []
    assert f'<a href="/console/keys/{key_id}"><code>{key_id}</code></a>' in listed
    where = f"/console/keys/{key_id}"
    page = operator.get(where)
    assert page.status_code == 400
    assert "is damaged" in page.text
    wrong = operator.send(where, f"{where}/delete", typed="yes")
    assert (wrong.status_code, f"type its id: {key_id}" in wrong.text) == (400, True)
    for action in ("", "/switch", "/prompt", "/capture"):
        assert operator.send(where, where + action, name="x").status_code == 400
    assert operator.send(where, f"{where}/delete", typed=key_id).headers["location"] == "/console/keys"
    assert operator.get(where).status_code == 404
    assert key_id not in operator.get("/console/keys", params={"q": mark}).text


@pytest.mark.parametrize("change", ["priority = 0", "created_at = -1", "created_at = 999999999999999"])
def test_a_page_of_damaged_keys_leads_to_the_next_page(
    console: GatewayProcess, operator: Visit, data: Path, mark: str, change: str
) -> None:
    with admin(console) as api:
        api.post("/admin/keys", json={"name": f"whole {mark}"}).raise_for_status()
        for number in range(60):
            api.post("/admin/keys", json={"name": f"{mark} {number}"}).raise_for_status()
    damage(data, change, "name GLOB", f"{mark} *")
    seen: list[str] = []
    found: list[str] = []
    where: str | None = f"/console/keys?q={mark}"
    while where:
        page = operator.get(where)
        assert page.status_code == 200
        seen += re.findall(r'<a href="/console/keys/(\w{10})"><code>', page.text)
        found += names_of(page.text)
        match = re.search(r'href="(/console/keys\?[^"]+)" rel="next"', page.text)
        where = match[1].replace("&amp;", "&") if match else None
    assert len(seen) == len(set(seen)) == 60
    assert found == [f"whole {mark}"]
