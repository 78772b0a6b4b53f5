"""Facts: what the master tells at each scrape, beside what the workers count: the build, the fetching of the model, and
how full the journal of usage is."""

import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from gateway import __version__
from gateway.settings import Settings
from gateway.upstream.progress import Progress
from gateway.usage.journal import LIMIT


def facts(settings: Settings) -> Iterator[Metric]:
    """Yield them as they are now. A file that cannot be read is left out."""
    build = GaugeMetricFamily(
        "stack_build_info", "The version of the gateway and of Python.", labels=("version", "python")
    )
    build.add_metric((__version__, platform.python_version()), 1)
    yield build
    fetched = list(Progress(settings).fetched())
    for name, text, at in (
        ("stack_model_fetched_ratio", "How much of the model is fetched: 0 to 1.", 1),
        ("stack_model_fetch_failed", "Whether the model could not be fetched.", 2),
    ):
        if fetched:
            told = GaugeMetricFamily(name, text, labels=("model",))
            for it in fetched:
                told.add_metric((it[0],), float(it[at]))
            yield told
    largest = _largest(settings.journals)
    yield GaugeMetricFamily(
        "stack_usage_journal_bytes", "The largest file of usage that is not in the store yet.", value=largest
    )
    yield GaugeMetricFamily(
        "stack_usage_journal_limit_bytes", "The bound of that file. Beyond it, usage is lost.", value=LIMIT
    )


def _largest(home: Path) -> int:
    """The bytes of the largest file of any journal."""
    sizes = [0]
    with suppress(OSError):
        for file in home.glob("*/*"):
            with suppress(OSError):  # it was saved just now
                sizes.append(file.stat().st_size)
    return max(sizes)
