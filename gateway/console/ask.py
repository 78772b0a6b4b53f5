"""Ask: what a page is asked for, once it is known by whom."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.console.door import Visitor
from gateway.console.forms import Form


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a visitor: the parameters of its address, and the fields of its form."""

    visitor: Visitor
    query: Mapping[str, str] = field(default_factory=dict)
    path: Mapping[str, str] = field(default_factory=dict)
    form: Form = field(default_factory=dict)
