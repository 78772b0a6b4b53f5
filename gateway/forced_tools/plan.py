"""Plan: decide how one engine is made to meet a request's demand: by its own means, or by a JSON Schema."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from gateway.dialects.dialect import Dialect
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import BadRequest
from gateway.forced_tools import telling
from gateway.forced_tools.demand import Demand, read
from gateway.forced_tools.guard import Guard, Terms
from gateway.forced_tools.keywords import patterns
from gateway.forced_tools.schema import MOST_CALLS, answer_schema, compiles, response_format

# How a call is forced: by the engine itself, or by a schema that constrains its answer.
Way = Literal["engine", "schema"]

# Fields that would change or cut the JSON, or report its tokens.
_DISPLACED = frozenset(
    {"tools", "tool_choice", "parallel_tool_calls", "response_format", "stop", "logprobs", "top_logprobs", "n_probs"}
    | {"grammar", "json_schema", "structured_outputs"}
)


@dataclass(frozen=True)
class Plan:
    """The plan for one answer. `reason`: why the last answer was rejected, empty for the first one."""

    demand: Demand
    way: Way
    most_repeats: int | None
    reason: str = ""

    @property
    def loosens(self) -> bool:
        """Whether the engine is constrained without a pattern of the arguments that it cannot compile. The guard checks
        the arguments with it."""
        if self.way != "schema":
            return False
        there = (it for tool in self.demand.tools for it in patterns(tool.parameters))
        return not all(compiles(it, self.most_repeats) for it in there)

    def guard(self) -> Guard:
        """Return the guard of an answer."""
        demand = self.demand
        forced, reads = demand.must_call, self.way == "schema"
        most = 0 if demand.mode == "none" else None if demand.several else 1
        return Guard(
            Terms(
                reads=reads,
                only=demand.tools[0].name if reads and demand.mode == "named" else None,
                names=frozenset(it.name for it in demand.tools) if forced or demand.narrowed else None,
                most=MOST_CALLS if most is None and reads else most,
                must=forced,
                checked={it.name: it for it in demand.checked},
            )
        )

    def fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return a request's fields as this plan changes them."""
        if self.way == "schema":
            kept = {name: value for name, value in fields.items() if name not in _DISPLACED}
            schema = answer_schema(self.demand, self.most_repeats)
            messages = telling.told(fields["messages"], self.demand, self.reason)
            return kept | {"messages": messages, "response_format": response_format(schema)}
        if self.demand.narrowed:
            return fields | {"tools": [it.entry for it in self.demand.tools], "tool_choice": self.demand.mode}
        return fields

    def by_schema(self, reason: str = "", called: str | None = None) -> "Plan":
        """Return the plan for another try. It is by schema if a call is demanded, or if the function `called` was
        called with wrong arguments; otherwise it is the same plan."""
        demand = self.demand
        if not demand.must_call and called is not None:
            tools = tuple(it for it in demand.tools if it.name == called)
            demand = Demand("named", tools, several=False)
        way: Way = "schema" if demand.must_call else self.way
        return replace(self, demand=demand, way=way, reason=reason)


def call_of(name: str, fields: dict[str, Any], most_repeats: int | None) -> dict[str, Any]:
    """Return a request's fields as they have an engine write the arguments of a call to the function of this name.
    Raises BadRequest if the request has no such function."""
    demand = read({"tools": fields.get("tools"), "tool_choice": {"type": "function", "function": {"name": name}}})
    if demand is None:
        raise BadRequest("There is no such function.", param="tools")
    return Plan(demand, "schema", most_repeats).fields(fields)


def plan(kind: Kind, fields: dict[str, Any], dialect: Dialect) -> Plan | None:
    """Return the plan for an engine of this dialect; None if nothing has to be done. Raises BadRequest that names the
    field."""
    ways = dialect.endpoints.get(kind)
    if ways is None or not ENDPOINTS[kind].chats or not fields.get("tools") or (demand := read(fields)) is None:
        return None
    obeys = ways.parameters.get("tool_choice") == "taken"
    way: Way = "schema" if demand.must_call and not obeys else "engine"
    return Plan(demand, way, dialect.most_repeats)
