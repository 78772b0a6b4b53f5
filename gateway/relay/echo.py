"""Echo: tell the prompt that an answer begins with from the rest of it.

With `echo`, vLLM puts the prompt before each choice of a completion, and a last assistant message before each choice of
a chat completion. Those tokens are the prompt's and must not be counted a second time as tokens of the answer.
"""

from typing import Any

from gateway.exchange import Exchange
from gateway.relay.content import Content


def made(content: Content, exchange: Exchange) -> tuple[int, int]:
    """Return the events and the characters of a stream without the prompts that it repeats."""
    events, characters = content.tokens, content.characters
    if not exchange.fields.get("echo"):
        return events, characters
    for index in content.indices:
        text = content.part(index).text.getvalue()
        rest = _without(text, _prompt(exchange, index))
        if len(rest) < len(text):
            characters -= len(text) - len(rest)
            events -= exchange.endpoint.chats or not rest  # a completion's first token comes in the prompt's event
    return events, characters


def made_whole(answer: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
    """Return a blocking answer without the prompts that it repeats."""
    choices = answer.get("choices")
    if not exchange.fields.get("echo") or not isinstance(choices, list):
        return answer
    return answer | {"choices": [_made_choice(it, exchange) if isinstance(it, dict) else it for it in choices]}


def _made_choice(choice: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
    index, text, message = choice.get("index"), choice.get("text"), choice.get("message")
    prompt = _prompt(exchange, index if isinstance(index, int) else 0)
    if isinstance(text, str):
        return choice | {"text": _without(text, prompt)}
    if isinstance(message, dict) and isinstance(content := message.get("content"), str):
        return choice | {"message": message | {"content": _without(content, prompt)}}
    return choice


def _without(text: str, prompt: str | int) -> str:
    """Return a text without the prompt at its beginning. Of a prompt that was sent as tokens only their number is
    known. It has at most as many words, because no token spans two words."""
    if isinstance(prompt, str):
        return text.removeprefix(prompt)
    rest = text.split(maxsplit=prompt)[prompt:]
    return rest[0] if rest else ""


def _prompt(exchange: Exchange, index: int) -> str | int:
    """Return what the choice with this index may repeat: a text, or a number of tokens."""
    value = exchange.fields.get(exchange.endpoint.content)
    if exchange.endpoint.chats:
        value = value[-1].get("content") if isinstance(value, list) and value else None
        return value if isinstance(value, str) else ""
    if isinstance(value, list) and not all(isinstance(it, int) for it in value):
        each = exchange.choices // max(1, exchange.prompts)
        value = value[min(max(0, index // max(1, each)), len(value) - 1)]
    return value if isinstance(value, str) else len(value) if isinstance(value, list) else ""
