"""Services: the objects that all relays of a worker share, and the settings that apply to all of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.admission.queue import Admission
from gateway.config import Retries
from gateway.limits.estimates import Estimates
from gateway.metrics import Metrics
from gateway.recent.recent import Recent
from gateway.relay.resume.trials import Continuations
from gateway.relay.suspects import Suspects
from gateway.routing.retry import Budget
from gateway.upstream.context_window import Contexts
from gateway.upstream.progress import Progress
from gateway.usage.recorder import Recorder

if TYPE_CHECKING:
    from gateway.traces.spans import Traces


@dataclass(frozen=True, slots=True)
class Services:
    """What all relays of one worker share."""

    retries: Retries
    budget: Budget
    metrics: Metrics
    recorder: Recorder
    recent: Recent
    estimates: Estimates
    contexts: Contexts
    continuations: Continuations
    admission: Admission
    suspects: Suspects
    progress: Progress
    traces: "Traces | None"
    log_content: bool
    max_answer: int  # the largest size of a blocking answer, in bytes
