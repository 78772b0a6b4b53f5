"""Ask: what a page is asked for, once it is known by whom; and how this is told to the process that makes the page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from gateway.console.door import Visitor
from gateway.console.forms import Form
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a visitor: the parameters of its address, and the fields of its form. `live` is what only the
    worker knows that was asked."""

    visitor: Visitor
    query: Mapping[str, str] = field(default_factory=dict)
    path: Mapping[str, str] = field(default_factory=dict)
    form: Form = field(default_factory=dict)
    live: Mapping[str, Any] = field(default_factory=dict)

    def dump(self) -> bytes:
        """Return this as JSON. Of a key, it has what pages show."""
        key = self.visitor.key
        shown = None
        if key is not None:
            models = None if key.models is None else list(key.models)
            shown = {"id": key.id, "name": key.name, "owner": key.owner, "models": models, "limits": key.limits}
        whose = {"token": self.visitor.token, "key": shown}
        return orjson.dumps([whose, self.query, self.path, self.form, self.live])

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Return what `dump` made JSON of."""
        whose, query, path, form, live = orjson.loads(data)
        key = whose["key"]
        if key is not None:
            models = None if key["models"] is None else frozenset(key["models"])
            key = Key(**{**key, "models": models, "limits": Limits(**key["limits"])})
        return cls(Visitor(whose["token"], key), query, path, form, live)
