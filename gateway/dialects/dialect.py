"""Dialect: the form of an engine's file, with every question that the gateway has about an engine."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.dialects.asking import AskCount, AskModels, AskSlots, AskWindow, Engine, Prompt, listed
from gateway.endpoints import Kind

Use = Literal[
    "taken",
    "as max_tokens",  # the engine takes it under that name
    "ignored",
    "by the gateway",  # the gateway does what the parameter asks for
    "refused",  # by the engine itself, with a 400
]
RoleUse = Literal["taken", "as system"]
PartUse = Literal["taken", "as text", "refused"]
ReasoningUse = Literal["taken", "as reasoning", "as reasoning_content"]
# What an answer that broke off consists of, and in which way an engine of the same kind and model can be asked for the
# rest of it. gateway.relay.resume.handover has the ways' code.
Made = Literal["text", "reasoning", "json", "calls"]
Way = Literal[
    "message",  # the text is an assistant's message, which the engine goes on with
    "raw",  # it stands behind the prompt as the chat template writes it
    "rest",  # as "message", and a grammar allows only what may still come
    "thought",  # as "message" or "raw", with the reasoning before it
    "nailed",  # the answer is made anew, by a schema that allows only what begins like it
    "arguments",  # those of the call that is not whole are made as JSON, by the call's own schema
    "anew",  # the same request is made again, and its answer has to begin like it
]
Meaning = Literal[
    "caller",  # the request is wrong, whatever the status
    "unable",  # the request is wrong for this model, and another one may be able
    "unsupported",  # the engine or its model cannot do this
    "died",  # the model's process ended while it worked on the request
    "missing",  # the engine has no such model
    "full",  # the engine has its maximum number of requests
]


@dataclass(frozen=True, slots=True)
class Word:
    """A phrase in an engine's errors, in lower case, and whose fault such an error is. `param` is the request's field
    that the error is about. `says` replaces the engine's own message if that is meant for the engine's operator."""

    phrase: str
    means: Meaning
    param: str | None = None
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What an engine makes of one endpoint.

    `parameters` has the use of each of OpenAI's parameters there. `extras` has the uses of other fields that people
    send, beside the dialect's `sampling`; what another engine's file names and this one does not is ignored. `count`
    asks how long a prompt is. `fit` returns the fields with values that the engine takes, and raises a BadRequest that
    names the field if the engine can make nothing of a value.
    """

    parameters: Mapping[str, Use]
    count: AskCount
    extras: Mapping[str, Use] = field(default_factory=dict)
    fit: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Reads(Protocol):
    """Make a function that takes the bytes of an answer as they come, and returns OpenAI's events for them. With
    `closes`, the answer begins with reasoning, which that tag ends."""

    def __call__(self, *, chats: bool, closes: str = "") -> Callable[[bytes], bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """How an engine goes on with a text that no chat template touches.

    `fits` says whether a request's fields allow it. `render` asks for the prompt as the template writes it, and returns
    None if the engine does not say; it raises EngineError. `body` is what is asked for at `path`, a path below the
    server's root, to go on with a text that begins with that prompt. `reads` makes OpenAI's events of the answer.
    """

    path: str
    fits: Callable[[dict[str, Any]], bool]
    render: Callable[[Engine, Prompt], Awaitable[str | None]]
    body: Callable[[Prompt, str], dict[str, Any]]
    reads: Reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How an engine that loads models when they are asked for is asked about that.

    `loaded` returns the models in its memory, by the one spelling of their names, with the seconds after which it
    unloads each of them if nobody asks. `load` returns when a model is loaded that is to answer requests of this kind,
    and whether that worked; if not, the request itself is refused. The engine then keeps the model for `keep` seconds,
    or as long as its own setting says if that is None. Both raise EngineError. It is LoadFailed if the engine tried the
    load.
    """

    loaded: Callable[[Engine], Awaitable[Mapping[str, float]]]
    load: Callable[[Engine, Kind, str, int | None], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleeper:
    """How an engine that can leave the GPU to others is asked for that.

    `asleep` returns whether it sleeps. `sleep` returns when the running answers have ended and the GPU's memory is
    free. `wake` returns when it can answer again. All raise EngineError. It is harmless to have an engine sleep that
    sleeps.
    """

    asleep: Callable[[Engine], Awaitable[bool]]
    sleep: Callable[[Engine], Awaitable[None]]
    wake: Callable[[Engine], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonStyle:
    """How an engine's own grammar of a JSON schema has the text written, as rules in its notation.

    `space` may stand between two tokens, but before a comma only if `space_before_comma`. `required_first`: the
    properties that have to come stand before the others. `asks` makes the request's fields that have the engine keep to
    a grammar.
    """

    space: str
    space_before_comma: bool
    required_first: bool
    asks: Callable[[str], dict[str, Any]]


def _effort(fields: dict[str, Any]) -> Any:
    return fields.get("reasoning_effort")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One engine's ways. A field without a default has to be answered for every engine."""

    name: str  # its name in LLM_BACKEND and stack.yaml
    url: str  # the default base URL, with /v1
    model: str  # the default model
    health: str  # a path below the server's root that answers 200 once the engine can generate

    # What a request may say. None: the engine does not have that endpoint.
    endpoints: Mapping[Kind, Ways | None]
    sampling: Mapping[str, Use]  # how tokens are drawn, at every endpoint that generates; OpenAI has no such fields
    roles: Mapping[str, RoleUse]  # of messages; any other role passes, and the model's chat template decides
    parts: Mapping[str, PartUse]  # of a message's content
    reasoning: Mapping[
        str, ReasoningUse
    ]  # the fields of an assistant's message for its reasoning; the first one counts
    # Fields that steer the engine for all callers, with the values at which they steer nothing, as null does for all.
    control: Mapping[str, tuple[Any, ...]]
    native: frozenset[str] = frozenset()  # other fields that it reads in its own API alone
    picky_contents: bool = False  # a content without text is refused, and each of its texts becomes a message
    refuses_nothing: bool = False  # no tools, a choice among none, or options of a stream that is none: refused
    most_repeats: int | None = None  # repetitions in a grammar or schema, beyond which it refuses that
    follows_each_way: bool = False  # it follows each way of a grammar by itself (gateway.grammars.ambiguity)

    # What it says. The first of `words` that an error has counts; `too_long` are its phrases for a prompt that does not
    # fit; `bare_refusal` is the reason for a 401 or 403 without a text.
    words: tuple[Word, ...]
    too_long: tuple[str, ...]
    bare_refusal: str = ""

    # How it is asked about itself. `slots`: how many requests it works on at a time if nobody says. `learns_slots`:
    # `slots` is only the most there may be, and its refusals show what it takes.
    window: AskWindow
    models: AskModels = listed
    slots: int = 1
    ask_slots: AskSlots | None = None
    learns_slots: bool = False
    loader: Loader | None = None  # it unloads models to load others
    sleeper: Sleeper | None = None  # it can sleep, while another engine uses its GPU
    spelling: Callable[[str], str] | None = None  # the one spelling of all names that mean the same model to it

    # How it answers.
    deaf: bool = False  # it goes on with a blocking request whose client has disconnected
    repeats: bool = False  # a blocking answer begins with a last message of the assistant's, which a stream leaves out
    whole_streams: bool = False  # a stream holds all that a blocking answer does, in the same words
    hides_calls: bool = False  # a stream is silent while a tool call is made, and then has all of the call at once
    cuts: bool = False  # it makes a prompt fit by shortening it, and doesn't say so
    dies_apart: bool = False  # its model is in a process of its own, whose death cuts answers while the server is well
    # The options of a stream that have it tell its tokens. `counts_each`: it tells those of each choice apart.
    counts: dict[str, Any] = field(default_factory=lambda: {"include_usage": True})
    counts_each: bool = False
    counts_by_reading: bool = False  # to count a prompt it works through it, as for an answer

    # What becomes of a translated request's limit that is longer than the model's context. Clients of those APIs send
    # 32,000 or more to any model.
    long_limits: Literal["taken", "cut", "left out"] = "taken"

    # How it continues an answer. `continues`: the fields that have it go on with a last message of the assistant's, if
    # it doesn't do that by itself. `trims`: the white space at that message's end may be lost in the chat template.
    # `doubtful`: whether it goes on depends on the model, and a completion's prompt goes through the chat template, so
    # that no engine of another kind can go on with its completion, nor it with theirs. `raw`: another way to go on.
    continues: Mapping[str, Any] = field(default_factory=dict)
    trims: bool = True
    doubtful: bool = False
    raw: Raw | None = None
    # What it does with an answer of each kind, the ways in the order in which they are tried. `json_style` is for the
    # way "rest".
    resumes: Mapping[Made, tuple[Way, ...]]
    json_style: JsonStyle | None = None
    # For the way "thought": what stands before and behind reasoning in the text of a model whose reasoning the engine
    # takes up. Whether a model is one of them is tried.
    think_tags: tuple[str, str] = ("", "")
    # The field of a last message of the assistant's in which it takes up reasoning itself, so that no tags are needed.
    thinks_in: str = ""
    effort: Callable[[dict[str, Any]], Any] = _effort  # how much a request's fields let the model think; None: unsaid
    seeds: bool = False  # a seed makes it give the same answer to the same request again, and does not slow it down


def uses(*, taken: str = "", ignored: str = "") -> dict[str, Use]:
    """Return the use of each parameter. Each argument holds names, with white space between them."""
    table: dict[str, Use] = dict.fromkeys(taken.split(), "taken")
    return table | dict.fromkeys(ignored.split(), "ignored")
