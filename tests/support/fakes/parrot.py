"""Parrot: a fourth engine's file, written by the recipe in ARCHITECTURE.md. It repeats what it is told.

tests/flows/test_recipes.py puts it into a copy of the gateway.
"""

from gateway.dialects.asking import Engine, Prompt, Window, as_count, as_object, uncounted
from gateway.dialects.dialect import Dialect, Ways, Word, uses


async def _window(engine: Engine, _prompt: Prompt) -> Window:
    return Window(as_count(as_object(await engine.ask("/cage")).get("bars")))


_CHAT = Ways(
    parameters=uses(
        taken="messages model stream stream_options max_tokens stop",
        ignored="""temperature top_p n seed frequency_penalty presence_penalty logit_bias logprobs top_logprobs
            response_format tools tool_choice parallel_tool_calls reasoning_effort verbosity modalities audio prediction
            web_search_options functions function_call user safety_identifier prompt_cache_key prompt_cache_retention
            prompt_cache_options service_tier store metadata moderation""",
    )
    | {"max_completion_tokens": "as max_tokens"},
    extras=uses(taken="volume"),
    count=uncounted,
)

PARROT = Dialect(
    name="parrot",
    url="http://127.0.0.1:7777/v1",
    model="polly",
    health="/health",
    endpoints={
        "chat": _CHAT,
        "completion": None,
        "embedding": None,
        "rerank": None,
        "transcription": None,
        "speech": None,
    },
    sampling={},
    roles={
        "system": "taken",
        "developer": "as system",
        "user": "taken",
        "assistant": "taken",
        "tool": "taken",
        "function": "taken",
    },
    parts={
        "text": "taken",
        "image_url": "refused",
        "input_audio": "refused",
        "refusal": "as text",
        "file": "refused",
        "any other": "refused",
    },
    reasoning={"reasoning": "taken", "reasoning_content": "as reasoning"},
    control={"perch": ()},
    picky_contents=True,
    words=(Word("squawk", "caller", "messages", "The parrot does not repeat that."),),
    too_long=("out of breath",),
    window=_window,
    slots=4,
    resumes={"text": ("message",), "reasoning": ("anew",), "json": ("anew",), "calls": ("anew",)},
)
