"""Bounds: limit what one field may ask of an engine, so that no request takes the engine from all others.

Engines allocate, recurse and search by numbers and texts in a request, and check few of them. All functions are pure,
and raise a BadRequest that names the field. The measurement beside each bound is of llama.cpp b11549 (one core,
SmolLM2-135M). Most bounds hold for every engine, because a request means the same wherever it is routed.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.api import branching
from gateway.api.body import parse
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
MAX_TEXT = 64 * 1024  # characters of a grammar or a regular expression
MAX_DEPTH = 64  # of brackets in one, and of a schema; 60,000 parentheses overflowed the parser's stack
MAX_OPTIONS = 64  # of ? * + { in one rule: 100 in a row took 11 s for two tokens, 200 more than 40 s
MAX_ALTERNATIVES = 1000  # 5000 took 12 s for each token
MAX_PROPERTIES = 500  # of one object of a schema: 2000 optional ones took more than 40 s
MAX_VALUES = 1000  # of all its enums: OpenAI's own limit; 5000 took more than 40 s
MAX_NODES = 20_000  # of a schema: values of every kind
MOST_REPEATS = 100_000  # with any engine; some take fewer (gateway.dialects)

_BRANCHES = "'{where}' has a rule that can begin in more than " + f"{branching.MOST} ways. Simplify it."

_GBNF = ("grammar", "response_format.grammar")  # which llama.cpp reads
_GRAMMARS = ("grammar", "guided_grammar", "guided_regex", "guided_whitespace_pattern")
_REGEXES = ("regex", "pattern")  # the ends of the names of those that are regular expressions
_SCHEMAS = ("json_schema", "guided_json")
_WATCHED = frozenset(
    (*NUMBERS, *LISTS, *_GRAMMARS, *_SCHEMAS, "response_format", "structured_outputs", "structural_tag")
)
_PAIRS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minimum", "maximum"),
    ("minProperties", "maxProperties"),
)
_NEEDED = ("minLength", "minItems")  # keywords that demand repetitions
_REPEAT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
# Text in quotes, in brackets, in a comment or behind a backslash is not an operator. Without a closing quote or
# bracket, it extends to the end, so each character is read once. A class ends at its first bracket, as llama.cpp reads
# it.
_TEXTS = re.compile(r'#[^\n]*|//[^\n]*|\\.|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|\s+', re.DOTALL)
_CLASSES = re.compile(r"\\.|\[\^?(?:[^\]\\]|\\.)*\]?", re.DOTALL)


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


def check(body: dict[str, Any], engines: Iterable[str]) -> Sequence[Search]:
    """Refuse a body that asks too much of one of these engines. The caller must check what is returned, too."""
    if _WATCHED.isdisjoint(body):
        return ()
    for name in NUMBERS.keys() & body.keys():
        value = body[name]
        if type(value) in (int, float) and value > NUMBERS[name]:
            raise BadRequest(f"'{name}' must be at most {NUMBERS[name]}.", param=name)
    for name in LISTS.keys() & body.keys():
        _check_list(name, body[name], *LISTS[name])
    dialects = [DIALECTS[it] for it in engines]
    repeats = min((it.most_repeats or MOST_REPEATS for it in dialects), default=MOST_REPEATS)
    each_way = any(it.follows_each_way for it in dialects)
    searches = []
    for where, text in _texts(body):
        _check_text(text, where, repeats, regex=where.endswith(_REGEXES))
        if each_way and where in _GBNF:
            searches.append(Search({text: where}, ambiguity.of_grammar(text)))
    patterns: dict[str, str] = {}  # and where they are
    names: dict[str, str] = {}  # that are patterns
    for where, schema in _schemas(body):
        _check_schema(schema, where, repeats, patterns, names)
    for text, where in (names | patterns).items():
        _check_text(text, where, repeats, regex=True)
    if each_way and patterns:
        if sum(map(len, patterns)) > MAX_TEXT:
            where = patterns[max(patterns, key=len)]
            raise BadRequest(f"'{where}' has patterns of more than {MAX_TEXT} characters in all.", param=where)
        searches.append(Search(patterns, ambiguity.of_patterns(tuple(patterns))))
    return searches


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


def _check_text(text: str, where: str, repeats: int, *, regex: bool) -> None:
    """Check a grammar, or a regular expression."""
    if len(text) > MAX_TEXT:
        raise BadRequest(f"'{where}' is longer than {MAX_TEXT} characters.", param=where)
    bare = (_CLASSES if regex else _TEXTS).sub("", text)
    depth = deepest = 0
    for sign in re.findall(r"[()]", bare):
        depth += 1 if sign == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise BadRequest(f"'{where}' is nested more than {MAX_DEPTH} levels deep.", param=where)
    if max(sum(map(rule.count, "?*+{")) for rule in bare.split("::=")) > MAX_OPTIONS:
        raise BadRequest(
            f"'{where}' has more than {MAX_OPTIONS} optional or repeated parts in one rule.",
            param=where,
        )
    if bare.count("|") > MAX_ALTERNATIVES:
        raise BadRequest(f"'{where}' has more than {MAX_ALTERNATIVES} alternatives.", param=where)
    if not regex and branching.of_grammar(text) > branching.MOST:
        raise BadRequest(_BRANCHES.format(where=where), param=where)
    for least, between, most in _REPEAT.findall(bare):
        low, high = _whole(least), _whole(most)
        if max(low, high) > repeats:
            raise BadRequest(f"'{where}' has a repetition of more than {repeats} times.", param=where)
        if between and most and low > high:  # llama.cpp counts down from there, for gigabytes
            raise BadRequest(
                f"'{where}' has a repetition of at least {low} and at most {high} times, which is impossible.",
                param=where,
            )


def _whole(digits: str) -> int:
    return int(digits.lstrip("0")[:20] or "0")


def _check_schema(schema: Any, where: str, repeats: int, patterns: dict[str, str], names: dict[str, str]) -> None:
    """Check a schema without its patterns. Adds these, and the names that are patterns."""
    nodes, values = 0, 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH * 2):  # a level of a schema is two of JSON: an object's properties, and one of them
        found: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check_object(node, where, repeats)
                if isinstance(it := node.get("pattern"), str):
                    patterns.setdefault(it, where)
                if isinstance(them := node.get("patternProperties"), dict):
                    names.update(dict.fromkeys(them, where))
                values += len(node["enum"]) if isinstance(node.get("enum"), list) else 0
                found += node.values()
            elif isinstance(node, list):
                found += node
        nodes += len(found)
        if nodes > MAX_NODES:
            raise BadRequest(f"'{where}' is too large: it has more than {MAX_NODES} values.", param=where)
        if values > MAX_VALUES:
            raise BadRequest(f"'{where}' has more than {MAX_VALUES} values in its enums.", param=where)
        level = [it for it in found if isinstance(it, dict | list)]
        if not level:
            if branching.of_schema(schema) > branching.MOST:
                raise BadRequest(_BRANCHES.format(where=where), param=where)
            return
    raise BadRequest(f"'{where}' is nested more than {MAX_DEPTH} levels deep.", param=where)


def _check_object(node: dict[str, Any], where: str, repeats: int) -> None:
    """Check one object of a schema: its own keywords."""
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise BadRequest(f"'{where}' has more than {MAX_PROPERTIES} properties in one object.", param=where)
    for least, most in _PAIRS:
        low, high = _number(node.get(least)), _number(node.get(most))
        if low is not None and high is not None and low > high:  # llama.cpp counts down from there, for gigabytes
            raise BadRequest(f"'{where}' has a {least} above its {most}, which no value can satisfy.", param=where)
    for name in _NEEDED:
        if (low := _number(node.get(name))) is not None and low > repeats:
            raise BadRequest(f"'{where}' has a {name} above {repeats}.", param=where)
    if node.get("type") == "grammar" and isinstance(grammar := node.get("grammar"), str):  # in a structural tag
        _check_text(grammar, where, repeats, regex=False)


def _number(value: Any) -> float | None:
    """Return a number; None for anything else. The body has a whole number beyond 64 bits as an orjson.Fragment."""
    if isinstance(value, orjson.Fragment):
        return float(orjson.dumps(value))
    return value if type(value) in (int, float) else None
