"""The `stack` command of the scripts: which words are files of this machine, and how they get into the container and
out of it. A program takes the place of Docker. It answers `docker compose exec` with its words and standard input."""

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
