"""Prompts by the console: however many there are, a page reads a bounded number of them, and one text at most."""

import re
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.console import Visit, change_key, make_key
from tests.support.keys import admin, ask
from tests.support.processes import GatewayProcess, wait_for


@pytest.fixture(autouse=True)
def _no_prompts(data: Path) -> Iterator[None]:
    yield
    with closing(sqlite3.connect(data / "stack.db", timeout=30)) as store, store:
        store.executescript("DELETE FROM prompts; DELETE FROM prompt_uses")


def fill(data: Path, prompts: int, versions: int, size: int) -> None:
    """Store so many prompts with so many versions each."""
    rows = (
        (f"p{name:04}", version, f"{version} of {name}: " + "x" * size)
        for name in range(1, prompts + 1)
        for version in range(1, versions + 1)
    )
    with closing(sqlite3.connect(data / "stack.db", timeout=30)) as store, store:
        store.executemany("INSERT INTO prompts VALUES (?, ?, ?, 1790000000)", rows)


def listed(page: str) -> list[tuple[str, str]]:
    """The names and newest versions in the list of prompts."""
    return re.findall(r'<th scope="row"><a href="[^"]+">([^<]+)</a></th><td class="n">(\d+)</td>', page)


def following(page: str) -> str | None:
    found = re.search(r'href="(/console/prompts\?[^"]+)" rel="next"', page)
    return found[1].replace("&amp;", "&") if found else None


def peak(pid: int) -> int:
    """The most memory that a process has had, in kB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])


def test_prompts_are_paged_by_name(operator: Visit, data: Path) -> None:
    fill(data, 120, 3, 10)
    page = operator.get("/console/prompts").text
    found, pages = listed(page), 1
    while where := following(page):
        page = operator.get(where).text
        found += listed(page)
        pages += 1
    assert pages == 3
    assert found == [(f"p{it:04}", "3") for it in range(1, 121)]
    assert 'href="/console/prompts">To the first page' in page
    assert "There are no more prompts" in operator.get("/console/prompts?after=p0120").text


def test_the_newest_version_of_the_chosen_prompt_is_shown(operator: Visit, data: Path) -> None:
    fill(data, 120, 3, 10)
    assert "3 of 117: x" in operator.get("/console/prompts?name=p0117").text
    assert "of 117" not in operator.get("/console/prompts?name=p01170").text


def test_a_key_uses_one_of_more_prompts_than_its_page_lists(
    console: GatewayProcess, operator: Visit, data: Path
) -> None:
    key_id, _ = make_key(operator, "prompted")
    fill(data, 300, 1, 10)
    page = change_key(operator, key_id, "/prompt", prompt=" p0299 ")
    assert re.search(r'<input id="prompt" name="prompt" [^>]*value="p0299"', page)
    assert 'value="p0300"' not in page
    with admin(console) as api:
        assert [it["name"] for it in api.get("/admin/prompts").json()["uses"]] == ["p0299"]
    wrong = operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}/prompt", prompt="p0301")
    assert wrong.status_code == 404
    assert "There is no prompt &#39;p0301&#39;" in wrong.text
    change_key(operator, key_id, "/prompt", prompt="")
    with admin(console) as api:
        assert api.get("/admin/prompts").json()["uses"] == []


def test_pages_do_not_read_the_texts_that_they_do_not_show(
    console: GatewayProcess, operator: Visit, data: Path
) -> None:
    key_id, _ = make_key(operator, "watched")
    pages = [f"/console/keys/{key_id}", "/console/prompts", "/console/prompts?name=p0002"]
    for page in pages:
        operator.get(page)
    fill(data, 2, 400, 60_000)
    (pid,) = console.consoles()
    before = peak(pid)
    for page in pages:
        assert operator.get(page).status_code == 200
    assert peak(pid) - before < 20_000


def test_workers_read_only_the_prompts_that_are_used(console: GatewayProcess, operator: Visit, data: Path) -> None:
    key_id, secret = make_key(operator, "watched")
    fill(data, 2, 400, 60_000)
    before = [peak(it) for it in console.workers()]
    change_key(operator, key_id, "/prompt", prompt="p0002")  # from now on, each worker holds its newest version

    def applied() -> bool:
        with ThreadPoolExecutor(10) as pool:  # each worker takes some
            answers = list(pool.map(lambda _: ask(console, secret), range(10)))
        lines = [console.lines(it.headers["x-request-id"])[0] for it in answers]
        return [it.get("prompt") for it in lines] == ["p0002@400"] * 10

    wait_for(applied)
    grown = [now - then for now, then in zip(map(peak, console.workers()), before, strict=True)]
    assert max(grown) < 20_000
