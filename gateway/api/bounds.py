"""Bounds: limit what one field may ask of an engine, so that no request takes the engine from all others.

Engines allocate, recurse and search by numbers and texts in a request, and check few of them. All functions are pure,
and raise a BadRequest that names the field. The measurement beside each bound is of llama.cpp b11549 (one core,
SmolLM2-135M). Most bounds hold for every engine, because a request means the same wherever it is routed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.api import optional
from gateway.api.body import parse
from gateway.api.schema_bounds import MAX_NODES_IN_ALL, check_schema
from gateway.api.text_bounds import MOST_REPEATS, Texts
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest
from gateway.grammars import ambiguity
from gateway.grammars.grammar import UnsupportedError

NUMBERS = {  # the largest values
    "dry_penalty_last_n": 1 << 20,  # 8 bytes each: 5e8 took 3.8 GB
    "repeat_last_n": 1 << 20,  # 4 bytes each: 5e8 took 1.9 GB
    "n_probs": 128,  # so many log probabilities for each token: a million took a gigabyte for 50 tokens
    "top_logprobs": 128,
    "logprobs": 128,
    "prompt_logprobs": 128,
}
LISTS = {  # the largest numbers of entries, and of characters of one entry
    "stop": (64, 4096),  # each is looked for after each token: 100,000 took 5 s for 40 tokens
    "dry_sequence_breakers": (
        64,
        256,
    ),  # each is compared with the whole vocabulary: 100,000 ended in a minute's silence
    "samplers": (64, 64),  # as one string, a letter each: a million took 7 s
    "logit_bias": (4096, 256),  # texts are made tokens: 1000 of 5000 characters took 27 s
    "preserved_tokens": (1024, 256),
    "grammar_triggers": (256, 4096),
    "bad_words": (1024, 256),
    "stop_token_ids": (4096, 256),
    "guided_choice": (1000, 4096),
    "tools": (1024, 0),  # OpenAI's own limit is 128
}
_GBNF = ("grammar", "response_format.grammar")  # which llama.cpp reads
_GRAMMARS = ("grammar", "guided_grammar", "guided_regex", "guided_whitespace_pattern")
_REGEXES = ("regex", "pattern")  # the ends of the names of those that are regular expressions
_SCHEMAS = ("json_schema", "guided_json")
_WATCHED = frozenset(
    (*NUMBERS, *LISTS, *_GRAMMARS, *_SCHEMAS, "response_format", "structured_outputs", "structural_tag")
)


@dataclass(frozen=True, slots=True)
class Search:
    """What remains to be checked of a body and may take a second: the ways in which an engine can follow one text."""

    places: dict[str, str]  # the grammar, or the patterns, and where they are
    ways: ambiguity.Ways

    @property
    def takes_long(self) -> bool:
        return not self.ways.known

    def check(self) -> None:
        """Refuse what can be followed in too many ways, or takes too long to be searched."""
        where = self.places[max(self.places, key=len)]
        try:
            found, worst = self.ways.most()
        except UnsupportedError as exc:
            raise BadRequest(f"'{where}' cannot be checked: {exc}.", param=where) from None
        if found > ambiguity.MOST:
            where = self.places.get(worst, where)
            raise BadRequest(
                f"'{where}' can follow one and the same text in more than {ambiguity.MOST} ways, for which the engine"
                " needs seconds before each token. Do not repeat what is repeated itself, and let neighbours that may"
                " be absent begin with different characters.",
                param=where,
            )


def check(body: dict[str, Any], engines: Iterable[str]) -> tuple[Texts, Sequence[Search]]:
    """Refuse a body that asks too much of one of these engines. The caller must check what is returned, too: the texts
    first."""
    dialects = [DIALECTS[it] for it in engines]
    repeats = min((it.most_repeats or MOST_REPEATS for it in dialects), default=MOST_REPEATS)
    texts = Texts(repeats)
    if _WATCHED.isdisjoint(body):
        return texts, ()
    for name in NUMBERS.keys() & body.keys():
        value = body[name]
        if type(value) in (int, float) and value > NUMBERS[name]:
            raise BadRequest(f"'{name}' must be at most {NUMBERS[name]}.", param=name)
    for name in LISTS.keys() & body.keys():
        _check_list(name, body[name], *LISTS[name])
    each_way = any(it.follows_each_way for it in dialects)
    searches = []
    for where, text in _texts(body):
        texts.add(text, where, regex=where.endswith(_REGEXES))
        if each_way and where in _GBNF:
            searches.append(Search({text: where}, ambiguity.of_grammar(text)))
    patterns = _check_schemas(body, repeats, texts)
    if each_way and patterns:
        searches.append(Search(patterns, ambiguity.of_patterns(tuple(patterns))))
    return texts, searches


def _check_schemas(body: dict[str, Any], repeats: int, texts: Texts) -> dict[str, str]:
    """Check the body's schemas, add their patterns and grammars to `texts`, and return the patterns and their
    places."""
    patterns: dict[str, str] = {}
    nodes = squares = 0
    for where, schema in _schemas(body):
        found = check_schema(schema, where, repeats)
        nodes, squares = nodes + found.nodes, squares + found.squares
        if nodes > MAX_NODES_IN_ALL or squares > optional.MOST:
            raise BadRequest(
                f"The schemas up to '{where}' have too many optional properties, or more than {MAX_NODES_IN_ALL} values"
                " in all. Make properties 'required', or send fewer tools or smaller schemas.",
                param=where,
            )
        for it in found.patterns:
            texts.add(it, where, regex=True)
            patterns.setdefault(it, where)
        for it in found.names:
            texts.add(it, where, regex=True)
        for it in found.grammars:
            texts.add(it, where, regex=False)
    return patterns


def _check_list(name: str, value: Any, most: int, longest: int) -> None:
    if isinstance(value, list | dict | str) and len(value) > (
        longest if name == "stop" and type(value) is str else most
    ):
        raise BadRequest(f"'{name}' has more than {most} entries, or is too long.", param=name)
    if longest and isinstance(value, list | dict):
        for entry in value:
            text = entry[0] if isinstance(entry, list) and entry else entry
            text = text.get("value") if isinstance(text, dict) else text
            if isinstance(text, str) and len(text) > longest:
                raise BadRequest(f"An entry of '{name}' is longer than {longest} characters.", param=name)


def _texts(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the body's grammars and regular expressions, and their places."""
    form, outputs = body.get("response_format"), body.get("structured_outputs")
    found = [(name, body.get(name)) for name in _GRAMMARS]
    if isinstance(form, dict):
        found += [("response_format.grammar", form.get("grammar"))]
    if isinstance(outputs, dict):
        found += [
            (f"structured_outputs.{name}", outputs.get(name)) for name in ("grammar", "regex", "whitespace_pattern")
        ]
        _check_list("structured_outputs.choice", outputs.get("choice"), *LISTS["guided_choice"])
    return ((where, text) for where, text in found if isinstance(text, str))


def _schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the body's JSON schemas, values that may hold some, and their places."""
    outputs, tools = body.get("structured_outputs"), body.get("tools")
    found = {name: body[name] for name in (*_SCHEMAS, "structural_tag") if name in body}
    if isinstance(outputs, dict):
        found |= {f"structured_outputs.{name}": outputs.get(name) for name in ("json", "structural_tag")}
    yield from ((where, _opened(value, where)) for where, value in found.items())
    if "response_format" in body:
        yield "response_format", body["response_format"]
    if isinstance(tools, list):
        yield from ((f"tools[{index}]", tool) for index, tool in enumerate(tools))


def _opened(value: Any, where: str) -> Any:
    """Return a value as vLLM reads it: a text is the JSON of an object."""
    if not isinstance(value, str) or not value:
        return value
    try:
        read = parse(b'{"guided_json":%b}' % value.encode())  # a field in which numbers may have more than 64 bits
        if read.keys() == {"guided_json"}:
            return read["guided_json"]
    except (BadRequest, UnicodeEncodeError):
        pass
    raise BadRequest(
        f"'{where}' must be an object, or the JSON of one in which no name appears twice and not too many values.",
        param=where,
    )
