"""Fixtures of the bundle's tests: copies of the tree, which leave this clone's .env and a stack that is up alone."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clone import Tree, clone
from tests.support.machine import Machine

# What the scripts use of a system.
NEEDED = (
    "bash env dirname sed awk grep tail head tr cut id sort df cat mktemp mv ss sleep rm readlink find mkfifo".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def python_image() -> str:
    """The base of the images built here; scripts/test has seen to it that it is there."""
    return os.environ.get("PYTHON_IMAGE", "stack-base:trixie")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = clone(tmp_path / "clone")
    yield tree
    if tree.dotenv.exists():  # only `make up`, shortly before it starts something, writes one
        tree.remove_everything()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a registry that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hole:
        yield f"127.0.0.1:{hole.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    """An address of this machine where nothing listens: a registry that does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH with what the scripts use of a system, and no docker: tests add what they need."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in NEEDED:
        if program := shutil.which(name):
            (directory / name).symlink_to(program)
    return directory


@pytest.fixture
def machine(programs: Path, python_image: str) -> Machine:
    return Machine(programs, python_image)
