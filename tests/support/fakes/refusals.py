"""What an engine refuses because of the model's chat template, or of its own grammars: in that engine's words.

Those of llama.cpp stand in tests/recordings/llamacpp, or in ggml-org/llama.cpp issue 26930 if a pattern lacks an
anchor. Ollama passes on those of its own llama.cpp, as JSON in the message. vLLM's about a pattern are made up.
"""

import json
from itertools import pairwise
from typing import Any

Answer = tuple[int, Any]
FIRST = "System message must be at the beginning."
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
ANCHORS = "Pattern must start with '^' and end with '$'"
_NO_PARSER = "Unable to generate parser for this template. Automatic parser generation failed: "
_JINJA = (
    "\n------------\nWhile executing CallExpression at line 85, column 32 in source:\n...\nError: Jinja Exception: "
)


def refusal(
    dialect: str, body: dict[str, Any], *, one_system: bool, anchored: bool, alternating: bool
) -> Answer | None:
    """The engine's refusal. `one_system`: the template takes one system message, at the front. `alternating`: it takes
    no two messages in a row of one role, except for tools. `anchored`: a pattern of a tool needs both anchors."""
    roles = [it["role"] for it in body.get("messages", ())]
    if one_system and any(it in ("system", "developer") for it in roles[1:]):
        return _told(dialect, FIRST if dialect == "vllm" else f"{_NO_PARSER}{_JINJA}{FIRST}")
    if alternating and any(one == two != "tool" for one, two in pairwise(roles)):
        return _told(dialect, ALTERNATE if dialect == "vllm" else f"{_NO_PARSER}{_JINJA}{ALTERNATE}")
    if anchored and any(not (it[:1] == "^" and it[-1:] == "$") for it in _patterns(body.get("tools"))):
        about = f"Grammar error: {ANCHORS}" if dialect == "vllm" else f"JSON schema conversion failed:\n{ANCHORS}"
        return _told(dialect, about if dialect == "vllm" else _NO_PARSER + about)
    return None


def _patterns(tools: Any) -> list[str]:
    """The values of all `pattern`s that are texts; one that names a property is an object."""
    if isinstance(tools, list):
        return [found for it in tools for found in _patterns(it)]
    if not isinstance(tools, dict):
        return []
    mine = [tools["pattern"]] if isinstance(tools.get("pattern"), str) else []
    return mine + [found for it in tools.values() for found in _patterns(it)]


def _told(dialect: str, message: str) -> Answer:
    kind = "BadRequestError" if dialect == "vllm" else "invalid_request_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": 400}
    if dialect == "llamacpp":
        error = {"code": 400, "message": message, "type": kind}
    if dialect == "ollama":
        inner = {"error": {"code": 400, "message": message, "type": kind}}
        error = {"message": json.dumps(inner, separators=(",", ":")), "type": kind, "param": None, "code": None}
    return 400, {"error": error}
