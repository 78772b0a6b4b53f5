"""What the console takes: the time of each page with a million usage rows and 100,000 keys, and what hammering the
console does to the latency of answers. `python -m bench.console`; filling the store takes some minutes.

The exit code is 1 if a page takes longer than its aim.
"""

import argparse
import hashlib
import http.client
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bench import service
from bench.chat import BLOCKING
from gateway.keys.tables import keys, secrets
from gateway.store.store import SqliteStore, Store
from gateway.usage.rows import UsageBook

AIM_MS, CSV_AIM_MS = 200.0, 500.0  # for the median of a page, and of a CSV of up to 10,000 rows
LOADS = 5  # of each page
ROUNDS, ANSWERS = 5, 1000  # how often latencies are measured, with and without visitors in turn; answers each time
VISITORS = 4  # that ask for pages without a pause
ADMIN = "bench-admin-0123456789abcdef"
BATCH = 1000
DAY = 86_400  # seconds
PAGES = (
    *(
        "now",
        "now.json",
        "keys",
        "keys?q=key+0999",
        "keys?q=nothing",
        "keys/K000000005",
        "limits",
        "prompts",
        "requests",
    ),
    *("requests/req_777", "try", "usage?by=all&span=year", "usage?by=model&span=month", "usage?by=engine&span=7d"),
    *("usage?by=key&span=24h", "usage?by=key&span=7d", "usage?by=key&span=month", "usage?by=key&span=last"),
    *("usage.csv?by=key&span=month", "usage.csv?by=key&span=7d", "usage.csv?by=key&span=7d&over=time"),
    *("usage?by=owner&span=24h", "usage?by=owner&span=month", "usage?by=owner&span=year"),
)


def fill(store: Store, rows: int, count: int) -> None:
    """Make so many keys of 500 owners, and so many usage rows of the last 30 days."""
    rnd, now = random.Random(1), int(time.time())
    ids = [f"K{number:09d}" for number in range(count)]
    fixed = {"expires_at": None, "disabled": False, "models": None, "limits": {}, "priority": 1, "labels": {}}
    for start in range(0, count, BATCH):
        some = ids[start : start + BATCH]
        made = [
            {"id": it, "name": f"key {it[5:]}", "owner": f"team {int(it[1:]) % 500}", "created_at": now} for it in some
        ]
        with store.change() as connection:
            connection.execute(keys.insert(), [it | fixed for it in made])
            digests = [(it, hashlib.sha256(it.encode()).hexdigest()) for it in some]
            row = {"created_at": now, "expires_at": None}
            connection.execute(secrets.insert(), [{"key_id": it, "digest": digest} | row for it, digest in digests])
    book = UsageBook(store)
    for start in range(0, rows, BATCH):
        book.add([_row(number, ids, rnd, now) for number in range(start, min(rows, start + BATCH))])


def _row(number: int, ids: list[str], rnd: random.Random, now: int) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "at": (now - int(rnd.random() * 30 * DAY)) * 1000,
        "request_id": f"req_{number}",
        "key_id": ids[int(len(ids) * rnd.random() ** 3)],
        "kind": "chat",
        "api": "chat_completions",
        "model": f"model-{number % 5}",
        "engine": f"engine-{number % 3}",
        "stream": True,
        "outcome": "finished" if number % 50 else "engine_timeout",
        "status": 200,
        "tokens_in": 50,
        "tokens_out": 100,
        "cached": 0,
        "exact": True,
        "queued_ms": 0,
        "ttft_ms": rnd.randrange(50, 500),
        "duration_ms": rnd.randrange(500, 5000),
        "attempts": 1,
        "resumes": 0,
    }


class Visitor:
    """An operator's browser, as far as it matters here."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.cookie = ""

    def sign_in(self) -> None:
        self._connection.request("GET", "/console/sign-in")
        answer = self._connection.getresponse()
        token = re.search(r'form_token" value="([0-9a-f]+)"', answer.read().decode())
        assert token
        body = urlencode({"form_token": token[1], "key": ADMIN})
        headers = {"cookie": _cookie(answer), "origin": f"http://127.0.0.1:{self._connection.port}"}
        headers["content-type"] = "application/x-www-form-urlencoded"
        self._connection.request("POST", "/console/sign-in", body, headers)
        answer = self._connection.getresponse()
        answer.read()
        self.cookie = _cookie(answer)

    def load(self, page: str) -> int:
        """Load a page. Returns the status."""
        self._connection.request("GET", f"/console/{page}", headers={"cookie": self.cookie})
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


def _cookie(answer: http.client.HTTPResponse) -> str:
    found = [it.partition(";")[0] for it in answer.headers.get_all("set-cookie", [])]
    return "; ".join(it for it in found if not it.endswith(('=""', "=")))


def pages(port: int) -> tuple[bool, str]:
    """Load each page a few times, and print its times. Returns whether all are within the aim, and a cookie."""
    visitor = Visitor(port)
    visitor.sign_in()
    good = True
    for page in PAGES:
        times: list[float] = []
        while len(times) < LOADS:
            started = time.perf_counter()
            status = visitor.load(page)
            if status == http.HTTPStatus.TOO_MANY_REQUESTS:
                time.sleep(3)  # the time that the gateway spends on visitors is used up for now
                continue
            times.append((time.perf_counter() - started) * 1000)
            if status != http.HTTPStatus.OK:
                raise service.BenchError(f"/console/{page} answered {status}")
        median = statistics.median(times)
        good = good and median <= (CSV_AIM_MS if ".csv" in page else AIM_MS)
        print(f"{'/console/' + page:42} median {median:7.1f} ms   worst {max(times):7.1f} ms")
    return good, visitor.cookie


def latencies(port: int) -> tuple[float, float]:
    """The median and the 99th percentile of the latency of blocking answers, in ms."""
    times = []
    headers = {"authorization": f"Bearer {service.KEY}", "content-type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for _ in range(ANSWERS):
            started = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", BLOCKING, headers)
            connection.getresponse().read()
            times.append((time.perf_counter() - started) * 1000)
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]


def hammer(port: int, cookie: str, stop: Callable[[], bool], core: int) -> None:
    """Ask for pages without a pause, until told to stop. In a process of its own."""
    os.sched_setaffinity(0, {core})
    os.nice(19)  # the engine and the client whose latency is measured come first there
    visitor = Visitor(port)
    visitor.cookie = cookie
    while not stop():
        for page in PAGES:
            visitor.load(page)
            if stop():
                break


def hammered(port: int, cookie: str, core: int) -> tuple[float, float]:
    """The latencies while visitors ask for pages without a pause."""
    stop = multiprocessing.Event()
    crowd = [multiprocessing.Process(target=hammer, args=(port, cookie, stop.is_set, core)) for _ in range(VISITORS)]
    for it in crowd:
        it.start()
    try:
        return latencies(port)
    finally:
        stop.set()
        for it in crowd:
            it.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--data", type=Path, help="a directory whose store is filled once, and used again")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        data = asked.data or Path(scratch, "data")
        if not (data / "stack.db").exists():
            data.mkdir(parents=True, exist_ok=True)
            (data / "stack.db").touch()
            store = SqliteStore(data / "stack.db")
            store.migrate()
            fill(store, asked.rows, asked.keys)
            store.close()
        settings = {"STACK_ADMIN_KEYS": ADMIN, "STACK_DATA_DIR": str(data)}
        with service.mock(cores[0]) as engine, service.gateway(cores[-1], engine.port, Path(scratch), **settings) as it:
            good, cookie = pages(it.port)
            rounds = [(latencies(it.port), hammered(it.port, cookie, cores[0])) for _ in range(ROUNDS)]
    for at, name in enumerate(("alone", f"beside {VISITORS} visitors without a pause")):
        median, worst = (statistics.median(it[at][which] for it in rounds) for which in (0, 1))
        print(f"blocking answers {name}: median {median:.2f} ms, 99th percentile {worst:.2f} ms")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
