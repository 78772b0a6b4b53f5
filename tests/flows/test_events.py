"""Events that affect every request at once: each request ends as its row allows, and the common promises hold."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.faults import answers, clients, connections, ends, load, machine
from tests.support.faults.scene import scene
from tests.support.processes import ROOT, fake_engine

FAULTS = (*answers.FAULTS, *clients.FAULTS, *connections.FAULTS)
EVENTS = {it.name: it for it in (*ends.EVENTS, *load.EVENTS, *machine.EVENTS)}


@pytest.mark.parametrize("name", EVENTS)
def test_event(tmp_path: Path, name: str) -> None:
    event = EVENTS[name]
    log = tmp_path / event.log
    with ExitStack() as stack:
        if event.log == "pipe":
            os.mkfifo(log)
            stack.callback(os.close, os.open(log, os.O_RDWR))  # so that opening one end doesn't wait for the other
        engine = stack.enter_context(fake_engine())
        config = tmp_path / "stack.yaml"
        config.write_text(event.config.format(url=engine.url))
        settings = event.settings | ({"STACK_CONFIG": str(config)} if event.config else {})
        here = stack.enter_context(scene(log, engine, **settings))
        outcomes = event.happens(here)
    for stream, expected in ((True, event.streaming), (False, event.blocking)):
        seen = {outcome for (call, _), outcome in zip(here.calls, outcomes, strict=True) if call.stream == stream}
        assert seen
        assert seen <= expected


# What needs containers, an engine with a model, or a table of its own.
ELSEWHERE = [
    (2, "tests/stack/test_faults.py::test_an_engine_gone_and_back_with_another_address"),  # recovers unaided
    (2, "tests/flows/test_names.py::test_a_slow_name_lookup_delays_no_other_engine"),
    (3, "tests/stack/test_faults.py::test_an_engine_gone_and_back_with_another_address"),
    (8, "tests/stack/test_faults.py::test_ten_streams_under_a_fault"),
    (12, "tests/stack/test_faults.py::test_a_disconnected_engine_leaves_no_client_hanging"),
    (17, "tests/relay/test_tap_properties.py::test_a_sound_stream_passes_whole_however_it_is_written_and_cut"),
    (26, "tests/flows/attacks/test_attacks.py::test_slow_connections_are_closed_and_other_clients_are_served"),
    (27, "tests/stack/test_restarts.py::test_sigterm_during_a_stream_loses_nothing"),
    (28, "tests/store/test_usage.py::test_nothing_is_lost_or_doubled_or_held_for_ever_by_kills"),
    (30, "tests/store/test_keys.py::test_a_locked_store_is_said_to_be_so_and_keys_go_on"),
    (30, "tests/store/test_keys.py::test_known_keys_outlive_the_database"),
    (30, "tests/store/test_keys.py::test_a_gateway_starts_without_its_database_and_finds_it_later"),
    (30, "tests/store/test_faults.py::test_a_server_that_stands_still_is_not_waited_for"),
    (30, "tests/store/test_faults.py::test_a_file_that_is_gone_and_back"),
    (30, "tests/store/test_usage_faults.py::test_with_a_full_disk_requests_go_on_and_what_is_lost_is_counted"),
    (30, "tests/store/test_usage_faults.py::test_with_a_read_only_disk_nothing_is_lost"),
]


def test_every_fault_of_the_list_has_a_case() -> None:
    cases = {it.number for it in FAULTS} | {it.number for it in EVENTS.values()}
    assert cases | {number for number, _ in ELSEWHERE} == set(range(1, 37))
    for _, place in ELSEWHERE:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), place
