"""What `make test` installs: the virtual environment of the client packages, once for each lock, and the programs that
are missing. If it cannot, it says why."""

import hashlib
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.support.clone import Tree, write_program

MAKE_IT = "set -euo pipefail; for it in say venv; do . scripts/lib/$it.sh; done; need_clients_venv"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory with two releases of a package, which takes the place of an index."""
    directory = tmp_path / "packages"
    directory.mkdir()
    for version in ("1.0", "2.0"):
        about = f"client-{version}.dist-info"
        with zipfile.ZipFile(directory / f"client-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("client.py", f"print('client {version}')\n")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: client\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    return directory


def lock(tree: Tree, packages: Path, version: str) -> None:
    digest = hashlib.sha256((packages / f"client-{version}-py3-none-any.whl").read_bytes()).hexdigest()
    (tree.path / "requirements/clients.txt").write_text(f"client=={version} --hash=sha256:{digest}\n")


def test_the_clients_are_installed_again_only_when_their_lock_changes(tree: Tree, packages: Path) -> None:
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages)}
    for version in ("1.0", "2.0"):
        lock(tree, packages, version)
        made = tree.run("bash", "-c", MAKE_IT, **index)
        assert made.returncode == 0, made.stdout
        assert "==> installing requirements/clients.txt into it" in made.stdout
        assert tree.run("bash", "-c", MAKE_IT, **index).stdout == ""
        assert tree.run(".venv-clients/bin/python", "-c", "import client").stdout == f"client {version}\n"


def test_make_test_says_that_the_package_index_does_not_answer(tree: Tree, closed_port: str) -> None:
    """It stops before the first test, and does not leave out the tests that need the packages."""
    (tree.path / ".venv/bin").mkdir(parents=True)
    write_program(tree.path / ".venv/bin/python", "exit 0\n")  # in place of the one that make test would make first
    tree.run("sh", "-c", "cksum <requirements/dev.txt >.venv/installed-from")
    unreachable = {"PIP_INDEX_URL": f"http://{closed_port}/simple", "PIP_RETRIES": "0", "PIP_FIND_LINKS": ""}
    ran = tree.run("scripts/test", **unreachable)
    *_, last = ran.stdout.rstrip().splitlines()
    assert ran.returncode == 1, ran.stdout
    assert re.search(
        r"^stack: .*could not be installed.* reaches the Python package index .*then run this again\.$", last
    )
    # The next run tries again.
    assert not (tree.path / ".venv-clients/installed-from").exists()


def test_an_environment_that_is_only_linked_is_not_deleted(tree: Tree, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "installed-from").write_text("another lock")
    (tree.path / ".venv-clients").symlink_to(shared)
    ran = tree.run("bash", "-c", MAKE_IT)
    assert ran.returncode == 1
    assert ran.stdout.startswith("stack: .venv-clients is a symbolic link to an environment that does not have")
    assert (shared / "installed-from").exists()


def test_an_older_python_is_told_what_to_install(tree: Tree, programs: Path) -> None:
    (programs / "cksum").symlink_to(shutil.which("cksum") or "cksum")
    write_program(programs / "python3", "exit 1\n")  # says that it is older
    ran = tree.run("bash", "-c", MAKE_IT, PATH=str(programs))
    assert ran.stdout.startswith("stack: Python 3.11 or newer is needed: install it (from Debian 12 and")


def need_browser(tree: Tree, programs: Path, distribution: str) -> tuple[int, str]:
    (tree.path / "os-release").write_text(f'NAME="It"\nID={distribution}\n')
    script = "for it in say tools; do . scripts/lib/$it.sh; done; os_release=os-release; need_tools chromium"
    ran = tree.run("bash", "-euc", script, PATH=str(programs))
    return ran.returncode, ran.stdout


def test_any_browser_that_starts_will_do(tree: Tree, programs: Path) -> None:
    """Ubuntu's chromium-browser is a script that asks for the snap, if that is not installed."""
    write_program(programs / "chromium-browser", "echo 'requires the chromium snap to be installed'; exit 1\n")
    status, said = need_browser(tree, programs, "ubuntu")
    assert (status, "Chromium is missing, and Ubuntu's archive has it only as a snap" in said) == (1, True)
    write_program(programs / "google-chrome", "echo Google Chrome 140\n")
    assert need_browser(tree, programs, "ubuntu") == (0, "")


def test_a_package_that_cannot_be_installed_is_named(tree: Tree, programs: Path) -> None:
    """Only on Debian or Ubuntu something is installed. Without the right to write policy-rc.d, nothing is tried."""
    (programs / "chmod").symlink_to(shutil.which("chmod") or "chmod")
    for name, text in (("id", "echo 0\n"), ("apt-get", "exit 100\n")):
        write_program(programs / name, text)
    status, said = need_browser(tree, programs, "debian")
    ending = "could not be installed. " if Path("/etc/debian_version").exists() else "is missing: install it"
    assert (status, f"stack: chromium {ending}" in said) == (1, True), said
