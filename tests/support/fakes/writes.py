"""A fake model that writes answers of every kind, as an engine of some dialect would, or goes on with them where that
engine would. Handed a part in another way, it does what engines were seen to do: a grammar or a schema begins anew, so
that the whole comes once more.

`["write", {...}]` in a script of tests/support/fakes/engine.py:
    dialect   ollama, vllm or llamacpp
    choices   for each choice {"thinks": [...], "pieces": [...], "calls": [[name, [pieces]], ...]}, all optional; a
              request for one choice gets the one that its text so far, its prompt or its seed belongs to. Its calls are
              numbered from `from` (0), and the fields of `empty` are a piece of each call that says nothing
    prompts   the prompts, in the order of their choices
    again     the choices when they are made once more; the same, if it is left out
    disobeys  the choices when a rest is asked for; whatever the engine is to keep to, it does not
    seed      the seed of the first choice
    refuses   the fields that the engine refuses with a 400
    cuts, how, at   as in `answer`
"""

from typing import Any

import jsonschema_rs

from gateway.grammars.grammar import read
from gateway.grammars.rest import Walk
from tests.support.fakes.frames import Frame, Json
from tests.support.fakes.model import PROMPT_TOKENS, Steps, cut_of, given_in, raw, rest_of, token, wrong_in
from tests.support.fakes.thinker import handed, written


def write(what: Json, request: Json, *, number: int, unique: int) -> Steps:
    """The steps of one request: its user's `number`th, `unique` among all."""
    dialect = what["dialect"]
    refused = [name for name in what.get("refuses", ()) if name in request]
    if wrong := wrong_in(dialect, request) or ", ".join(refused):
        return [["json", [400, {"error": {"message": wrong, "type": "BadRequestError", "code": 400}}]]]
    given = given_in(dialect, request) if "messages" in request else _prompted(what, request)
    thought = handed(request) if dialect == "llamacpp" else None
    given = given if thought is None else thought
    if given.startswith("<think>\n"):
        return _thinking(what, request, given.removeprefix("<think>\n"), number=number, unique=unique)
    choices, disobeys = what["choices"], bool(number) and "disobeys" in what
    if number and "again" in what and not given and ("tools" in request or not choices[0].get("calls")):
        choices = what["again"]
    if disobeys:
        given, choices = "", what["disobeys"] if given else choices
    made = [(it, _choice(choices[it], request, given)) for it in _asked(what, choices, request, given)]
    for _, said in made:
        if not disobeys:
            obeys(said, request)
    frame = Frame(dialect, "messages" in request, request["model"], unique)
    renumber = len(made) == 1
    events = events_of(frame, [(0 if renumber else index, said) for index, said in made], request)
    after, how = cut_of(what, number)
    if not request.get("stream"):
        return _whole(frame, made) if after is None else [["text", "{"], *how]
    steps: Steps = [*(["event", it] for it in frame.sealed(events, usage=True)), ["done"]]
    return [*steps, ["end"]] if after is None else [*steps[:after], *how]


def _thinking(what: Json, request: Json, given: str, *, number: int, unique: int) -> Steps:
    """The steps of a request that goes on with reasoning, or with the text behind it."""
    choice, (thoughts, closed, text) = what["choices"][0], given.partition("</think>")
    assert "".join(choice["thinks"]).startswith(thoughts), given
    assert "".join(choice["pieces"]).startswith(text), given
    left = [] if closed else rest_of(choice["thinks"], len(thoughts))
    rest = {"thinks": left, "pieces": rest_of(choice["pieces"], len(text)), "whole": choice["pieces"]}
    events = events_of(Frame(what["dialect"], True, request["model"], unique), [(0, rest)], request)
    after, how = cut_of(what, number)
    steps: Steps = [*(["event", it] for it in events), ["done"]]
    return [*steps, ["end"]] if after is None else [*steps[:after], *how]


def write_raw(what: Json, request: Json, *, number: int) -> Steps:
    """The steps of a raw request to Ollama."""
    given = request["prompt"].rpartition("<|im_start|>assistant\n")[2]
    seed = request.get("options", {}).get("seed")
    choice = what["choices"][_index(what, what["choices"], given, seed)]
    pieces = written(request["model"], choice.get("thinks", []), choice["pieces"])
    return raw(what | {"pieces": pieces}, request, number=number)


def _prompted(what: Json, request: Json) -> str:
    """The text that stands behind a completion's prompt."""
    prompt = request["prompt"]
    known = [it for it in what.get("prompts", ()) if isinstance(prompt, str) and prompt.startswith(it)]
    return prompt.removeprefix(known[0]) if known else ""


def _asked(what: Json, choices: list[Json], request: Json, given: str) -> list[int]:
    """The choices that a request is for."""
    prompt = request.get("prompt")
    if (request.get("n") or 1) > 1 or (isinstance(prompt, list) and len(prompt) > 1):
        return list(range(len(choices)))
    if "prompts" in what:
        one = prompt[0] if isinstance(prompt, list) else prompt
        return [next(index for index, it in enumerate(what["prompts"]) if one.startswith(it))]
    return [_index(what, choices, given, request.get("seed"))]


def _index(what: Json, choices: list[Json], given: str, seed: Any) -> int:
    if len(choices) == 1:
        return 0
    if "seed" in what and isinstance(seed, int):
        return int(seed - what["seed"])
    found = [index for index, it in enumerate(choices) if "".join(it["pieces"]).startswith(given)]
    assert found, f"no beginning of a choice: {given!r}"
    return found[0]


def _choice(choice: Json, request: Json, given: str) -> Json:
    """What is still made of a choice. Without tools the arguments of the call that the request tells of are made."""
    if choice.get("calls") and "tools" not in request:
        told = str(request["messages"][0]["content"])
        arguments = [pieces for name, pieces in choice["calls"] if f'{{"name":"{name}"' in told.replace(" ", "")]
        choice = {"pieces": arguments[-1]}
    pieces, form = choice.get("pieces", []), request.get("response_format")
    if not given or (form is not None and form["type"] != "text"):
        return choice  # from the beginning, as a grammar has it
    assert "".join(pieces).startswith(given), f"no beginning of the answer: {given!r}"
    return choice | {"pieces": rest_of(pieces, len(given)), "given": given, "whole": pieces}


def obeys(said: Json, request: Json) -> None:
    """Whether what comes is allowed by what the request prescribes: otherwise this engine could not have made it."""
    text = "".join(said.get("pieces", ()))
    grammar = request.get("grammar") or (request.get("structured_outputs") or {}).get("grammar")
    if grammar:
        walk = Walk(read(grammar))
        assert walk.follow(text), (text, grammar)
        assert walk.may_end, (text, grammar)
    form = request.get("response_format") or {}
    if form.get("type") == "json_schema" and text:
        import json  # noqa: PLC0415

        jsonschema_rs.validate(form["json_schema"]["schema"], json.loads(text))


def events_of(frame: Frame, made: list[tuple[int, Json]], request: Json) -> list[Json]:
    """The events of the choices, piece by piece in turn."""
    lines = [_line(frame, index, said, request) for index, said in made]
    events = [event for index, _ in made for event in frame.opening(index)]
    for number in range(max(map(len, lines))):
        events += [line[number] for line in lines if number < len(line)]
    tokens = sum(len(said.get("pieces", ())) for _, said in made)
    before = sum(len(said.get("whole", said.get("pieces", ()))) - len(said.get("pieces", ())) for _, said in made)
    prompt = PROMPT_TOKENS + before
    usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    return [*events, frame.usage(usage)]


def _line(frame: Frame, index: int, said: Json, request: Json) -> list[Json]:
    """The events of one choice."""
    thoughts = [] if said.get("given") else said.get("thinks", [])
    events, offset = [frame.thought(text, index, first=number == 0) for number, text in enumerate(thoughts)], 0
    for number, text in enumerate(said.get("pieces", ())):
        event = frame.text(text, index, first=number == 0 and not thoughts)
        if request.get("logprobs") or request.get("n_probs"):
            event["choices"][0]["logprobs"] = (
                {"content": [token(text)]}
                if frame.chat
                else {"tokens": [text], "token_logprobs": [-0.25], "text_offset": [offset]}
            )
        offset += len(text)
        events.append(event)
    calls = said.get("calls", [])
    for number, (name, pieces) in enumerate(calls, said.get("from", 0)):
        if frame.dialect == "ollama":  # whole, in one event
            events.append(frame.call(number, name, "".join(pieces), index, first=not events))
            continue
        events.append(frame.call(number, name, "", index))
        if "empty" in said:
            events.append(frame.call(number, None, "", index))
            events[-1]["choices"][0]["delta"]["tool_calls"] = [{"index": number} | said["empty"]]
        events += [frame.call(number, None, it, index) for it in pieces]
    return [*events, frame.finish("tool_calls" if calls else "stop", index)]


def _whole(frame: Frame, made: list[tuple[int, Any]]) -> Steps:
    texts = ["".join(said.get("pieces", ())) for _, said in made]
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1}
    return [["json", [200, frame.whole(texts, "stop", usage)]]]
