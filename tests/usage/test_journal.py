"""Journal: what has begun and ended is saved once at least, whoever dies; it is bounded, and takes its files for what
they are."""

import mmap
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.usage.journal import ROOM, Journal, Record, adopt
from tests.support.processes import ROOT


class Saved:
    """Somewhere records go. Made `away`, it takes none."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.away = False

    def __call__(self, records: list[Record], _: Any = None) -> None:
        if self.away:
            raise ConnectionError
        self.records |= {it["id"]: it for it in records}

    @property
    def names(self) -> list[str]:
        return sorted(it["name"] for it in self.records.values())


@pytest.fixture
def saved() -> Saved:
    return Saved()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal", limit=2000)
    journal.open()
    return journal


def begin(journal: Journal, name: str) -> Record:
    record: Record = {"name": name}
    journal.begin(record)
    return record


def end(journal: Journal, *records: Record) -> None:
    for record in records:
        record["outcome"] = "finished"
        journal.end(record)


def test_whoever_is_told_first_can_write_the_record_if_this_process_dies_then(
    journal: Journal, tmp_path: Path, saved: Saved
) -> None:
    noted: list[Record] = []

    def note(record: Record) -> None:
        noted.append(dict(record))
        raise KeyboardInterrupt  # the process is killed

    with pytest.raises(KeyboardInterrupt):
        journal.begin({"name": "a"}, note)
    adopt(tmp_path / "journal", saved)
    assert saved.names == []
    other = Journal(tmp_path / "journal", limit=2000)
    other.open()
    end(other, noted[0])
    other.drain(saved)
    assert list(saved.records.values()) == [noted[0]]


def test_records_that_have_ended_are_saved_and_the_others_stay(journal: Journal, saved: Saved) -> None:
    long = begin(journal, "long")
    end(journal, begin(journal, "a"), begin(journal, "b"))
    for _ in range(3):
        journal.drain(saved)
    assert saved.names == ["a", "b"]
    end(journal, long)
    journal.drain(saved)
    assert saved.names == ["a", "b", "long"]
    journal.close()
    assert list(Path(journal.directory or "").parent.iterdir()) == []


def test_records_that_cannot_be_saved_wait_up_to_a_limit(journal: Journal, saved: Saved) -> None:
    saved.away = True
    open_ones = [begin(journal, f"a{number}") for number in range(1000)]
    kept = [it for it in open_ones if "id" in it]
    assert 10 < len(kept) < 100
    assert journal.dropped == 1000 - len(kept)
    end(journal, *open_ones)  # for the end of what has begun there is room
    with pytest.raises(ConnectionError):
        journal.drain(saved)
    end(journal, begin(journal, "b"))
    with pytest.raises(ConnectionError):
        journal.drain(saved)
    saved.away = False
    journal.drain(saved)
    journal.drain(saved)
    assert saved.names == sorted([*(it["name"] for it in kept), "b"])
    assert journal.dropped == 1000 - len(kept)


def test_without_files_everything_is_dropped_and_counted(tmp_path: Path, saved: Saved) -> None:
    journal = Journal(tmp_path / "journal")
    end(journal, begin(journal, "a"))
    assert journal.dropped == 1
    journal.drain(saved)
    end(journal, begin(journal, "b"))
    journal.drain(saved)
    assert saved.names == ["b"]
    shutil.rmtree(tmp_path / "journal")
    end(journal, begin(journal, "c"))  # into files that nobody finds again
    with pytest.raises(FileNotFoundError):
        journal.drain(saved)
    journal.drain(saved)
    end(journal, begin(journal, "d"))
    journal.drain(saved)
    assert saved.names == ["b", "d"]


class Fixed(mmap.mmap):
    """A memory map as macOS has it."""

    def resize(self, newsize: int) -> None:
        del newsize
        raise SystemError("mmap: resizing not available--no mremap()")


def test_where_a_file_cannot_grow_records_are_dropped_and_counted(
    tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", Fixed)
    journal = Journal(tmp_path / "journal")
    journal.open()
    end(journal, begin(journal, "a"))
    assert "id" not in begin(journal, "b" * ROOM)
    assert journal.dropped == 1
    journal.drain(saved)
    assert saved.names == ["a"]


DIES = """
import sys
from pathlib import Path
from gateway.usage.journal import Journal

def end(record):
    journal.end(record | {"outcome": "finished"})

journal = Journal(Path(sys.argv[1]))
journal.open()
opened, saved, ended, last = ({"name": name} for name in ("open", "a", "b", "last"))
journal.begin(opened)
journal.begin(saved)
end(saved)
journal.drain(lambda _: None)
journal.begin(ended)
end(ended)
journal.begin(last)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_the_journal_of_a_dead_process_is_adopted(tmp_path: Path, saved: Saved, cut: int) -> None:
    """Even where it died in the midst of writing a line."""
    home = tmp_path / "journal"
    with subprocess.Popen(
        [sys.executable, "-c", DIES, home], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        adopt(home, saved)
        assert saved.records == {}
        process.kill()
    (file,) = home.glob("*/*")
    written = file.read_bytes().rstrip(b"\0")
    file.write_bytes(written[: len(written) - cut] + bytes(cut + 1000))
    saved.away = True
    with pytest.raises(ConnectionError):
        adopt(home, saved)
    saved.away = False
    adopt(home, saved)
    ended = {it["name"] for it in saved.records.values() if "outcome" in it}
    begun = {it["name"] for it in saved.records.values() if "outcome" not in it}
    assert (ended, begun) == ({"b"}, {"open", "last"} if cut < 2 else {"open"})
    assert list(home.iterdir()) == []
