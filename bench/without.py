"""The gateway as if it had no limits and wrote down no usage, which no setting makes of it: for bench.budget."""

from typing import Any

from gateway.accounts import SharedBook
from gateway.estimates import Estimate
from gateway.keys import Key
from gateway.limits import Lease, free
from gateway.recorder import Recorder
from gateway.server import main


async def _admit(_: SharedBook, __: Key, estimate: Estimate) -> Lease:
    return free(estimate)


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


if __name__ == "__main__":
    SharedBook.admit = _admit  # type: ignore[method-assign, assignment]
    Recorder.started = _nothing  # type: ignore[method-assign, assignment]
    Recorder.finished = _nothing  # type: ignore[method-assign, assignment]
    main()
