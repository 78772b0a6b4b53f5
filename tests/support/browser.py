"""Chromium, driven by Playwright: one browser for a session, and a fresh profile for each test."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, expect, sync_playwright

from tests.support.processes import ROOT

PICTURES = ROOT / "test-results" / "screenshots"
DESK, PHONE = (1280, 900), (390, 844)  # width and height in pixels
PATIENCE = 60_000  # milliseconds, because the machine may be busy
NAMES = ("google-chrome", "chromium", "chromium-browser")  # as in scripts/lib/tools.sh; Ubuntu's chromium is a snap


@contextmanager
def chromium(home: Path | None = None) -> Iterator[Browser]:
    """This machine's browser, with another home directory if one is given. Fails with a sentence if there is none."""
    program = next(filter(_starts, filter(None, map(shutil.which, NAMES))), None)
    if program is None:
        told = "on Debian 'apt-get install chromium', on Ubuntu Google Chrome from https://www.google.com/chrome/"
        pytest.fail(f"No browser starts: install one ({told})", pytrace=False)
    with sync_playwright() as playwright:
        browser = _launch(playwright, program, home)
        try:
            yield browser
        finally:
            browser.close()


def _starts(program: str) -> bool:
    return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0


def _launch(playwright: Playwright, program: str, home: Path | None) -> Browser:
    options = ["--no-sandbox"] if os.getuid() == 0 else []  # root may not use it
    options += ["--disable-http2"]  # Chromium ends HTTP/2 streams when Docker changes this machine's interfaces
    environment = os.environ | ({"HOME": str(home)} if home else {})
    return playwright.chromium.launch(executable_path=program, args=[*options, "--disable-gpu"], env={**environment})


def visit(page: Page, path: str) -> None:
    """Load a page, and do so again if Docker has just changed this machine's interfaces: Chromium then gives up, shows
    a page of its own, and loads the wanted one again by itself. Both interrupt the next attempt."""
    while True:
        try:
            page.goto(path)
        except Error as exc:
            if not re.search("ERR_NETWORK_CHANGED|interrupted by another navigation", exc.message):
                raise
        else:
            return


def trust(root: Path, home: Path) -> None:
    """Make a browser with that home directory trust a root certificate."""
    database = home / ".pki/nssdb"
    database.mkdir(parents=True)
    words = ["certutil", "-A", "-d", f"sql:{database}", "-n", "stack", "-t", "C,,", "-i", str(root)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=60)


@contextmanager
def page(browser: Browser, url: str, *, dark: bool = False, size: tuple[int, int] = DESK) -> Iterator[Page]:
    """A page of a profile of its own. At its end it must have raised no error, and broken no rule of the policy."""
    context = browser.new_context(
        base_url=url,
        color_scheme="dark" if dark else "light",
        viewport={"width": size[0], "height": size[1]},
        reduced_motion="reduce",
    )
    made = context.new_page()
    made.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    wrong: list[str] = []
    made.on("pageerror", lambda it: wrong.append(str(it)))
    made.on("console", lambda it: wrong.append(it.text) if "Content Security Policy" in it.text else None)
    made.on("dialog", lambda it: wrong.append(f"a dialog: {it.message}"))
    try:
        yield made
    finally:
        context.close()
    assert wrong == []


def sign_in(page: Page, key: str) -> None:
    """Sign in at the console with that key, whether it is valid or not."""
    visit(page, "/console")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Sign in").click()


def picture(page: Page, name: str) -> Path:
    """Keep a picture of the whole page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    file = PICTURES / f"{name}.png"
    page.screenshot(path=file, full_page=True)
    return file
