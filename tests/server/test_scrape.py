"""The files that workers count in, and the port, where something happens in the midst of a scrape."""

import socket
import threading
from collections.abc import Iterator

import httpx
import prometheus_client
import pytest
from prometheus_client import values

from gateway.instruments import Histogram
from gateway.server.scrape import Board, Port
from tests.support.processes import NO_TLS, free_port


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.remove()


def test_a_worker_number_that_is_reused_during_scrapes_breaks_no_scrape(board: Board) -> None:
    """A worker's death takes its files of gauges away, and its successor's are made, while others are read."""
    over = threading.Event()

    def deaths() -> None:
        while not over.is_set():
            for seat in range(3):
                board.vacate(seat)
                assert board.reserve(seat)

    thread = threading.Thread(target=deaths)
    thread.start()
    try:
        for _ in range(800):
            board.page()
    finally:
        over.set()
        thread.join()


@pytest.fixture
def url() -> str:
    return f"http://127.0.0.1:{free_port()}/metrics"


def serve(url: str, page: bytes | None) -> None:
    def read() -> bytes:
        if page is None:
            raise ValueError("a file that nobody can read")
        return page

    Port("127.0.0.1", httpx.URL(url).port, read).open()


def test_a_page_that_can_not_be_made_is_answered_all_the_same(url: str) -> None:
    serve(url, None)
    answer = httpx.get(url, verify=NO_TLS)
    assert (answer.status_code, answer.text) == (500, "The metrics can't be read: see the log.\n")


def test_a_scraper_that_says_nothing_ends_and_the_next_is_answered(url: str) -> None:
    serve(url, b"all\n")
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as silent:
        assert httpx.get(url, verify=NO_TLS, timeout=30).text == "all\n"
        assert silent.recv(1) == b""


@pytest.mark.parametrize("amount", [0, 0.5, 0.500001, 1, 2.5, 3, 1e308, -1, float("inf")])
def test_an_amount_falls_into_the_librarys_own_bucket(
    board: Board, amount: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.setattr(values, "ValueClass", values.MutexValue)
    its = prometheus_client.Histogram("seconds", "How long.", registry=None, buckets=(0.5, 1, 2.5))
    its.observe(amount)
    assert board.reserve(0)
    board.take(0)
    ours = Histogram("seconds", "How long.", registry=None, buckets=(0.5, 1, 2.5))
    for _ in range(2):
        ours.observe(amount)
    expected = [(it.labels.get("le"), 2 * it.value) for it in its.collect()[0].samples if it.name == "seconds_bucket"]
    (found,) = board.collect()
    assert [(it.labels["le"], it.value) for it in found.samples if it.name == "seconds_bucket"] == expected
    assert [it.value for it in found.samples if it.name == "seconds_sum"] == [2 * amount]
