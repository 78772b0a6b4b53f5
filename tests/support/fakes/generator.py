"""A fake model of which only the number of tokens matters: it obeys the limits of a request as its dialect does, and
says how many tokens it has made, whatever it tells its callers.

`["generate", {...}]` in a script of tests/support/fakes/engine.py:
    dialect   ollama, vllm or llamacpp
    length    tokens of an answer without a limit
    pace      seconds for a token
    usage     what it says it took: see TOLD
"""

from typing import Any

from tests.support.fakes.frames import Frame

Steps = list[list[Any]]

# What an engine may say of `made` tokens in `n` answers.
TOLD: dict[str, Any] = {
    "exact": lambda made, _: {"prompt_tokens": 7, "completion_tokens": made, "total_tokens": 7 + made},
    "of one choice": lambda made, n: {"prompt_tokens": 7, "completion_tokens": made // n},
    "zeros": lambda *_: {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    "negative": lambda made, _: {"prompt_tokens": -7, "completion_tokens": -made},
    "text": lambda made, _: {"prompt_tokens": "7", "completion_tokens": str(made)},
    "fractions": lambda made, _: {"prompt_tokens": 7.5, "completion_tokens": made + 0.5},
    "true": lambda *_: {"prompt_tokens": True, "completion_tokens": True},
    "no answer": lambda *_: {"prompt_tokens": 7},
    "null": lambda *_: {"prompt_tokens": None, "completion_tokens": None},
    "a list": lambda *_: [1, 2],
    "nothing": lambda *_: None,
}


def generate(what: dict[str, Any], request: dict[str, Any]) -> Steps:
    """The steps of one request."""
    dialect = what["dialect"]
    n = 1 if dialect == "ollama" else request.get("n") or 1
    each = _length(dialect, request, what["length"])
    usage = TOLD[what["usage"]](each * n, n)
    frame = Frame(dialect, "messages" in request, request["model"])
    if not request.get("stream"):
        made = [step for _ in range(each) for step in (["pause", what["pace"]], ["made", n])]
        return [*made, ["json", [200, frame.whole(["word " * each] * n, "stop", usage)]]]
    told = usage is not None and bool((request.get("stream_options") or {}).get("include_usage"))
    opening = [event for index in range(n) for event in frame.opening(index)]
    texts = [frame.text("word ", index, first=number == 0) for number in range(each) for index in range(n)]
    ends = [frame.finish("stop", index) for index in range(n)] + ([frame.usage(usage)] if told else [])
    events = [["event", event] for event in frame.sealed([*opening, *texts, *ends], usage=told)]
    steps: Steps = events[: len(opening)]
    for start in range(len(opening), len(opening) + len(texts), n):
        steps += [["pause", what["pace"]], ["made", n], *events[start : start + n]]
    return [*steps, *events[len(opening) + len(texts) :], ["done"], ["end"]]


def _length(dialect: str, request: dict[str, Any], length: int) -> int:
    """vLLM and llama.cpp rank the names of a limit, Ollama knows one."""
    names = {
        "ollama": ["max_tokens"],
        "vllm": ["max_completion_tokens", "max_tokens"],
        "llamacpp": ["n_predict", "max_completion_tokens", "max_tokens"],
    }[dialect]
    limit = next((request[name] for name in names if request.get(name) is not None), None)
    return length if limit is None else min(limit, 10 * length)
