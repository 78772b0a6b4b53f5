"""Thinkers: fake models that write reasoning between tags, as Ollama's with such templates were recorded."""

from typing import Any, NamedTuple


class Thinker(NamedTuple):
    """`rendered` is the end of its prompt. It writes `opens` and `closes` around its reasoning, token by token. The
    tokens of `closes` are missing in raw answers if they are `control` tokens."""

    rendered: str
    opens: str
    closes: tuple[str, ...]
    control: bool = False


THINKERS = {
    "thinker": Thinker("<think>", "<think>", ("</", "think", ">")),
    "thinkerlines": Thinker("", "<think>\n", ("</", "think>\n", "\n")),
    "thinkergpt": Thinker("<think>", "<think>", ("</think>",), control=True),
}
THOUGHT = ["one", " two", " three"]  # what is thought of anything without a script


def written(model: str, thinks: list[str], pieces: list[str]) -> list[str]:
    """The tokens of an answer as the model writes them."""
    it = THINKERS.get(model)
    return pieces if it is None or not thinks else [it.opens, *thinks, *it.closes, *pieces]


def rendered(model: str) -> str:
    """What the template writes behind the beginning of the model's turn."""
    return THINKERS[model].rendered if model in THINKERS else ""


def applied(request: dict[str, Any]) -> dict[str, str]:
    """What llama.cpp says to /apply-template. Only the thinker's template leaves reasoning open."""
    last = request["messages"][-1]
    thought = last.get("reasoning_content") if request["model"] == "thinker" else None
    return {"prompt": f"<think>\n{thought}" if thought else f"{last['content']}<|im_end|>\n"}


def handed(request: dict[str, Any]) -> str | None:
    """The reasoning that llama.cpp is handed in a field, and the text behind it, as the model writes them. An empty
    text: the template leaves it out. None: there is none."""
    last = (request.get("messages") or [{}])[-1]
    if "reasoning_content" not in last:
        return None
    if request["model"] != "thinker":
        return ""
    return "<think>\n" + last["reasoning_content"] + ("</think>" + last["content"] if last["content"] else "")


def unasked(model: str, given: str) -> list[str]:
    """The tokens of a raw answer without a script. A thought that it does not know is at its end."""
    whole = written(model, [*THOUGHT, "\n"], ["Four", "."])
    return whole if "".join(whole).startswith(given) else [given, *THINKERS[model].closes, "Four", "."]


def shown(model: str, made: list[str]) -> list[str]:
    """The tokens that a raw answer shows."""
    it = THINKERS.get(model)
    return [token for token in made if token not in it.closes] if it is not None and it.control else made
