"""The `stack` command of the scripts: which words are files of this machine, and how they get into the container and
out of it. A program takes the place of Docker. It answers `docker compose exec` with its words and standard input."""

import os
import stat
from pathlib import Path

import pytest

from tests.support.clone import Tree, write_program

BACKUP = "what the gateway wrote"


@pytest.fixture
def command(tree: Tree, programs: Path) -> Tree:
    """A clone whose Docker has a gateway that runs: `backup` writes BACKUP, and all else tells what it got."""
    write_program(
        programs / "docker",
        f"""case "$1 $2" in
        "compose version") echo 2.40.0 ;;
        "compose ps") echo 0123abcd ;;
        "compose exec")
          shift 5
          case $1 in backup) echo "{BACKUP}" ;; *) echo "$*: $(cat)" ;; esac ;;
        esac
        """,
    )
    return tree


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ("restore --yes a b", "restore takes one FILE: a and b were given. Nothing was changed."),
        ("restore a --yes - b", "restore takes one FILE: a and - and b were given. Nothing was changed."),
        ("backup a /b", "backup takes one FILE: a and /b were given. Nothing was changed."),
        ("prompts set polite a b", "prompts set takes one FILE: a and b were given. Nothing was changed."),
    ],
)
@pytest.mark.parametrize("place", [{}, {"STACK_DATA_DIR": "data"}])
def test_more_than_one_file_is_refused(
    command: Tree, programs: Path, words: str, whole: str, place: dict[str, str]
) -> None:
    """It took the last one, and `restore --yes` replaced all keys."""
    for name in "ab":
        (command.path / name).write_text(name)
    ran = command.run("scripts/stack", *words.split(), PATH=str(programs), **place)
    assert (ran.returncode, ran.stdout) == (1, f"stack: {whole}\n")
    assert [(command.path / name).read_text() for name in "ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("restore --yes a", "restore --yes -: in a"),
        ("restore a --yes", "restore --yes -: in a"),
        ("prompts set polite a", "prompts set polite -: in a"),
        ("keys create a b", "keys create a b: "),
    ],
)
def test_one_file_goes_into_the_container(command: Tree, programs: Path, words: str, got: str) -> None:
    (command.path / "a").write_text("in a")
    ran = command.run("scripts/stack", *words.split(), PATH=str(programs))
    assert (ran.returncode, ran.stdout) == (0, got + "\n")


def test_a_backup_goes_into_a_pipe(command: Tree, programs: Path) -> None:
    """A regular file took the pipe's place: as root, `backup /dev/null` would have replaced the device."""
    os.mkfifo(command.path / "pipe")
    script = "cat pipe >read & scripts/stack backup pipe && wait"
    ran = command.run("bash", "-c", script, PATH=str(programs))
    assert (ran.returncode, ran.stdout) == (0, "")
    assert (command.path / "read").read_text() == BACKUP + "\n"
    assert (command.path / "pipe").is_fifo()
    ran = command.run("bash", "-c", "{ scripts/stack backup >(cat >&3); } 3>&1 | cat", PATH=str(programs))
    assert ran.stdout == BACKUP + "\n"


def test_a_backup_goes_where_a_symbolic_link_leads(command: Tree, programs: Path) -> None:
    """The link stays, whether its file exists already or not. The file is closed to other users."""
    (command.path / "elsewhere").mkdir()
    link, file = command.path / "link", command.path / "elsewhere/file"
    link.symlink_to("elsewhere/file")
    for before in (None, "an earlier backup, which others could read"):
        if before:
            file.write_text(before)
            file.chmod(0o644)
        ran = command.run("scripts/stack", "backup", "link", PATH=str(programs))
        assert (ran.returncode, ran.stdout, link.is_symlink()) == (0, "", True)
        assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (BACKUP + "\n", 0o600)
        assert [it.name for it in file.parent.iterdir()] == ["file"]
