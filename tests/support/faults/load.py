"""Events of load: more than an engine can serve, an engine that always fails, and one that is silent (33 to 35)."""

from typing import Any

from tests.support.faults.callers import Call
from tests.support.faults.event import event
from tests.support.faults.outcome import FAILED, OVERLOADED, SILENT, UNREACHABLE, WHOLE, Outcome, error
from tests.support.faults.scene import Scene
from tests.support.faults.scripts import ANSWER, FINISH, START, http, says
from tests.support.processes import scrape, wait_for


@event(33, "ten times the load it can serve", streaming={WHOLE, OVERLOADED}, blocking={WHOLE, OVERLOADED})
def overload(here: Scene) -> list[Outcome]:
    """The engine works on eight requests and refuses the rest: just these eight are answered, and it is asked again."""
    for number in range(80):
        stream = number % 2 == 0
        answer = [*START, *FINISH, ["end"]] if stream else [http(ANSWER)]
        here.ask(stream=stream, script=[["slots", 8], ["gate", "overload"], *answer])
    wait_for(lambda: sum(not call.is_alive() for call, _ in here.calls) == 72)
    assert here.engine.running() == 8
    here.engine.release("overload")
    answered = [call.outcome() for call, _ in here.calls]
    assert (answered.count(WHOLE), answered.count(OVERLOADED)) == (8, 72)
    for stream in (True, False):
        assert here.ask(stream=stream).outcome() == WHOLE
    return here.settle()


@event(34, "retry storm", streaming={error(502, FAILED)}, blocking={error(502, FAILED)})
def retry_storm(here: Scene) -> list[Outcome]:
    """An engine that fails every request: retries add a fifth of them, and ten in reserve."""
    for _ in range(10):
        calls = [here.ask(stream=stream, script=says(500, {})) for stream in (True, False) for _ in range(10)]
        for call in calls:
            call.join()
    outcomes = here.settle()
    asked = sum(len(here.engine.seen(call.id)) for call, _ in here.calls)
    assert 200 < asked <= 200 + 10 + 200 * 0.2
    return outcomes


FLAPPING = """
engines: {{engine: {{dialect: vllm, base_url: "{url}"}}}}
models: {{fake-model: {{targets: [{{engine: engine, model: fake-model}}], timeouts: {{first_token: 0.5}}}}}}
default_model: fake-model
breaker: {{failures: 1, open_for: 60, probe_every: 0.2}}
"""


@event(
    35,
    "flapping engine",
    streaming={error(504, SILENT), UNREACHABLE},
    blocking={UNREACHABLE, WHOLE},
    config=FLAPPING,
)
def flapping(here: Scene) -> list[Outcome]:
    """It is silent, and its health probes succeed all the while: one request at a time has to show each worker whether
    it answers."""

    def workers(state: str) -> float:
        return scrape(here.metrics).total("stack_upstream_workers", state=state)

    def ask_both(**fields: Any) -> list[Call]:
        """So many at once that neither is left out."""
        return [here.ask(**fields) for _ in range(20)]

    def both_half_open() -> bool:
        if workers("closed"):
            for call in ask_both(stream=True, script=[["hang"]]):
                call.join(60)
        return workers("half-open") == 2

    def both_closed() -> bool:
        for call in ask_both(stream=False, script=gated):
            call.join(60)
        return workers("closed") == 2

    wait_for(both_half_open, deadline=60)
    gated = [["gate", "trial"], http(ANSWER)]
    calls = ask_both(stream=False, script=gated)
    wait_for(lambda: sum(call.is_alive() for call in calls) == here.engine.running() > 0)
    assert here.engine.running() <= 2
    here.engine.release("trial")
    wait_for(both_closed, deadline=60)
    assert all(here.ask(stream=False).outcome() == WHOLE for _ in range(10))
    return here.settle()


EVENTS = (overload, retry_storm, flapping)
