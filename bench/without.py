"""The gateway without limits and without usage, for bench.budget. No setting does this."""

from typing import Any

from gateway.limits.memory import SharedBook
from gateway.limits.rules import Lease
from gateway.server.master import main
from gateway.usage.recorder import Recorder


async def _enter(*_: Any, **__: Any) -> Lease:
    return Lease()


def _nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


if __name__ == "__main__":
    SharedBook.enter = _enter  # type: ignore[method-assign, assignment]
    Recorder.started = _nothing  # type: ignore[method-assign, assignment]
    Recorder.finished = _nothing  # type: ignore[method-assign, assignment]
    main()
