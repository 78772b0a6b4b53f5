"""Files of a backup that are not regular files: pipes and symbolic links."""

import gzip
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.command import Command, empty_store


@pytest.fixture
def stack(tmp_path: Path) -> Command:
    return Command(STACK_DATA_DIR=empty_store(tmp_path / "data"))


def test_a_backup_goes_through_a_pipe_with_a_name(stack: Command, tmp_path: Path) -> None:
    """A regular file took the pipe's place. A restore reads its file twice, and waited for a second writer."""
    stack.json("keys", "create", "Ann")
    pipe, saved = tmp_path / "pipe", tmp_path / "saved"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["dd", f"if={pipe}", f"of={saved}"])
    try:
        stack("backup", str(pipe))
        assert pipe.is_fifo()
        assert reader.wait(10) == 0
    finally:
        reader.kill()
        reader.wait()
    stack.json("keys", "create", "made since")
    writer = subprocess.Popen(["dd", f"if={saved}", f"of={pipe}"])
    try:
        assert stack("restore", str(pipe), "--yes") == "Restored 1 keys and 0 usage rows.\n"
    finally:
        writer.kill()
        writer.wait()
    assert [it["name"] for it in stack.json("keys", "list")] == ["Ann"]


def test_a_backup_goes_into_a_device(stack: Command, tmp_path: Path) -> None:
    """`/dev/null` itself cannot be tried here, because as root a mistake would replace it. This one is a terminal."""
    ours, its = os.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(its, "wb") as terminal:
        name = os.ttyname(terminal.fileno())
        (tmp_path / "device").symlink_to(name)
        stack("backup", str(tmp_path / "device"))
        assert ((tmp_path / "device").is_symlink(), Path(name).is_char_device()) == (True, True)


def test_a_backup_goes_where_a_symbolic_link_leads(stack: Command, tmp_path: Path) -> None:
    """The link stays, whether its file exists already or not."""
    link, file = tmp_path / "link", tmp_path / "elsewhere/file"
    file.parent.mkdir()
    link.symlink_to(file)
    for _ in range(2):
        stack("backup", str(link))
        assert (link.is_symlink(), gzip.decompress(file.read_bytes())[:15]) == (True, b'{"stack_backup"')
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert [it.name for it in file.parent.iterdir()] == ["file"]
