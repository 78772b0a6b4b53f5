"""Changes of keys: a worker that reads only what has changed knows the same as one that reads everything. So does a
worker that starts while the store is unreachable."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa

from gateway.errors import InvalidKey
from gateway.keys import keepsake, secret
from gateway.keys.book import Keybook
from gateway.keys.entries import KeyFields, NewKeyFields
from gateway.keys.known import Key, Keyring
from gateway.keys.limit_fields import LimitFields
from gateway.prompts.book import Promptbook
from gateway.settings import Settings
from gateway.shared_memory import Keepsake
from gateway.store import revisions
from gateway.store.store import Store, open_store, prepare

LISTED = "sk-of-the-settings-0123456789"


@pytest.fixture
def settings(store_settings: dict[str, str]) -> Settings:
    return Settings(**{name.lower(): value for name, value in store_settings.items()}, stack_api_keys=LISTED)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    prepare(settings)
    store = open_store(settings)
    yield store
    store.close()


class Changed:
    """Keys that are changed at random. `secrets` are all that there ever were."""

    def __init__(self, store: Store) -> None:
        self.book = Keybook(store)
        self.secrets = [LISTED]
        self._ids: list[str] = []
        self._random = Random(7)

    def make(self) -> None:
        entry, text = self.book.create(NewKeyFields(name="made", models=["a"], labels={"é": "\u2028"}, users=True))
        self._ids.append(entry.id)
        self.secrets.append(text)

    def change(self) -> None:
        """One change of one key, or of the limits of all."""
        self.make()
        key_id, rnd = self._random.choice(self._ids), self._random
        match rnd.randrange(8):
            case 0:
                self.book.delete(key_id)
                self._ids.remove(key_id)
            case 1 | 2:
                self.secrets.append(self.book.rotate(key_id, rnd.choice([0, 3600]))[1])
            case 3 | 4:
                self.book.change(key_id, KeyFields(disabled=rnd.random() < 0.5, owner="Ann"))
            case 5:
                self.book.change(key_id, KeyFields(limits=LimitFields(concurrent=rnd.randrange(1, 9)), name="other"))
            case 6:
                self.book.tell_users_apart(key_id, on=rnd.random() < 0.5)
            case 7:
                self.book.set_defaults(LimitFields(tokens_per_day=rnd.randrange(1, 1000)))


def state(ring: Keyring, text: str) -> tuple[Key | None, str]:
    """A secret's key, and why it is not in force."""
    known = ring.get(secret.digest(text.encode()))
    if known is None:
        return None, "unknown"
    try:
        known.check()
    except InvalidKey as exc:
        return ring.key(known), exc.message
    return ring.key(known), ""


def test_what_changes_leave_is_what_the_store_holds(settings: Settings, store: Store, tmp_path: Path) -> None:
    changed, kept = Changed(store), Keepsake(tmp_path)
    changed.make()
    contents = changed.book.contents()
    ring = Keyring(settings, contents)
    kept.keep(keepsake.dump(contents, b"\x00\xff"), contents.number, 1.0)
    for number in range(20):
        for _ in range(1 + number % 3):
            changed.change()
        before, changes = ring.number, changed.book.changes(ring.number, ring.mark)
        assert changes, "it is known what has changed"
        assert kept.add(keepsake.dump_changes(changes, b"later" if number == 10 else None), before, changes.number, 2.0)
        ring.change(changes)
    contents = changed.book.contents()
    there = kept.look(before)
    assert there
    assert keepsake.load(there.data) == (contents, b"later")
    assert kept.look(contents.number) is None, "nothing is newer"
    for whole in (Keyring(settings, contents), Keyring(settings, keepsake.load(there.data)[0])):
        assert (ring.number, ring.mark) == (whole.number, whole.mark)
        assert {it: state(ring, it) for it in changed.secrets} == {it: state(whole, it) for it in changed.secrets}
    assert {state(ring, it)[1] == "" for it in changed.secrets} == {True, False}


def test_a_damaged_row_is_named_until_it_is_mended(settings: Settings, store: Store) -> None:
    changed = Changed(store)
    changed.make()
    ring = Keyring(settings, changed.book.contents())
    other = changed.book.create(NewKeyFields(name="other"))[0].id
    with store.change("key", other) as connection:
        connection.execute(sa.text("UPDATE keys SET priority = 1000 WHERE id = :id"), {"id": other})
    for owner in ("it stays", "and stays"):
        changed.book.change(changed.book.list()[0].id, KeyFields(owner=owner))
        changes = changed.book.changes(ring.number, ring.mark)
        assert changes
        assert ring.change(changes).broken == changed.book.contents().broken
        assert [it.startswith(f"the key {other} (priority") for it in ring.broken] == [True]
    changed.book.delete(other)
    changes = changed.book.changes(ring.number, ring.mark)
    assert changes
    assert ring.change(changes).broken == ()


def test_everything_is_read_if_it_is_not_known_what_has_changed(store: Store) -> None:
    book = Keybook(store)

    def now() -> tuple[int, int | None]:
        contents = book.contents()
        return contents.number, contents.mark

    number, mark = now()
    assert mark is not None
    with store.write() as connection:  # an older version of the gateway
        connection.execute(sa.update(revisions.revision).values(number=number + 1))
    assert book.changes(number, mark) is None
    assert now() == (number + 1, None)
    book.create(NewKeyFields(name="x"))
    assert book.changes(number, mark) is None
    assert book.changes(number + 1, None) is None
    number, mark = now()
    book.create(NewKeyFields(name="y"))
    assert book.changes(number, mark)
    assert book.changes(number, (mark or 0) + 1) is None, "another database, with the same number"
    assert book.changes(number + 5, mark) is None, "another database, which is older"
    with store.write() as connection:
        for _ in range(revisions.KEPT):
            revisions.begin(connection, "key", "x")
        assert connection.execute(sa.select(sa.func.count()).select_from(revisions.changes)).scalar() == revisions.KEPT
    assert book.changes(number, mark) is None, "too much has changed"
    number, mark = now()
    Promptbook(store).set("polite", "Be polite.")
    changes = book.changes(number, mark)
    assert changes
    assert (changes.prompts, changes.ids) == (True, frozenset())
    with store.change():
        pass
    assert book.changes(number, mark) is None, "a backup was restored"


def test_a_file_to_which_a_change_cannot_be_added_is_removed(tmp_path: Path) -> None:
    """It would tell a worker of keys that are no longer true."""
    kept = Keepsake(tmp_path)
    assert not kept.add(b"change", 1, 2, 1.0), "there is none"
    for before, number, line in ((5, 6, b"a gap"), (1, 2, bytes(kept.ROOM + 10)), (0, 0, b"of another store")):
        kept.keep(b"all", 1, 1.0)
        assert kept.look(0)
        assert not kept.add(line, before, number, 2.0)
        assert kept.look(-1) is None
    kept.keep(b"all", 3, 2.0)
    assert kept.add(b"older", 1, 2, 1.0), "another worker has read it later"
    assert kept.add(b"known", 2, 3, 3.0), "another worker has added it"
    assert kept.add(b"new", 3, 4, 3.0)
    kept.keep(b"old", 3, 2.5)
    there = kept.look(3)
    assert there
    assert (there.data, there.number, there.at) == (b"all\nnew", 4, 3.0)
