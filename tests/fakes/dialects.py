"""What the fake engine says about itself in each engine's dialect, what it takes of a request, and what it does with a
prompt that is too long. A word is a token here, and so is each message of a chat.

Written after the engines' sources, apart from the gateway's own table: Ollama 0.32 (openai/openai.go, server/routes.go,
llm/llama_server.go), vLLM 0.30 (the endpoints' protocol.py, renderers/params.py), llama.cpp b11549.
"""

import json
from typing import Any, ClassVar

Answer = tuple[int, Any]


def words(value: Any) -> int:
    """The tokens of a prompt, whatever its form."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, dict):
        return 1 + words(value.get("content"))
    if isinstance(value, list):
        return sum(len(it.get("text", "").split()) if "text" in it else words(it) for it in value if not_number(it))
    return 0


def not_number(value: Any) -> bool:
    return not isinstance(value, int)


def prompt_of(body: dict[str, Any]) -> Any:
    return next(body[name] for name in ("messages", "prompt", "input") if name in body)


class Dialect:
    """`answer` is what it says at once to a request, or None: the script decides. At /_dialect its attributes can be
    set, and it tells what it was asked."""

    knows: ClassVar[dict[str, str]] = {}  # the fields it does something with

    def __init__(self) -> None:
        self.model = "fake-model"
        self.context = 1000
        self.numbers = True  # whether a refusal tells them
        self.counts = True  # whether its tokenizer answers
        self.slots = 256  # how many requests it says it works on at a time, where it says
        self.slow = 0.0  # seconds until it answers at an endpoint of its own
        self.asked: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, raw: bytes) -> Answer | None:
        body = json.loads(raw) if raw else {}
        if path == "/_dialect":
            for name, value in body.items():
                setattr(self, name, value)
            asked, self.asked = self.asked, [] if method == "POST" else self.asked
            return 200, asked
        if path.startswith("/_"):
            return None
        took = self.took(path, body) if path in self.knows else []
        self.asked.append({"path": path, "body": body, "took": took})
        if path not in self.knows:
            return self.own(path, body)
        refused = self.openai(path, body)
        if refused or body.get("stream"):
            return refused
        choice = {"index": 0, "message": {"role": "assistant", "content": "one two three"}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": self.read(body), "completion_tokens": 3}}

    def took(self, path: str, body: dict[str, Any]) -> list[str]:
        """The fields of a request that it does something with."""
        return sorted(set(self.knows[path].split()) & body.keys())

    def read(self, body: dict[str, Any]) -> int:
        """The tokens of its prompt that it read."""
        return words(prompt_of(body))

    def openai(self, path: str, body: dict[str, Any]) -> Answer | None:
        """Its refusal of a request to one of OpenAI's endpoints, if it refuses."""
        raise NotImplementedError

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        """Its answer at an endpoint of its own."""
        raise NotImplementedError


CHAT = """messages model stream stream_options max_tokens temperature top_p stop seed frequency_penalty
    presence_penalty logprobs top_logprobs response_format tools reasoning_effort """


class Ollama(Dialect):
    knows: ClassVar = {
        "/v1/chat/completions": CHAT + "reasoning",
        "/v1/completions": """model prompt frequency_penalty max_tokens presence_penalty seed stop stream stream_options
            temperature top_p suffix logprobs""",
        "/v1/embeddings": "model input dimensions encoding_format",
    }

    def __init__(self) -> None:
        super().__init__()
        self.models = [self.model, "small:latest", "own-system:latest", "unloaded:latest"]
        self.loaded = True
        self.system = ""

    def openai(self, _: str, body: dict[str, Any]) -> Answer | None:
        effort = body.get("reasoning_effort")
        if effort in (None, "none", "low", "medium", "high"):
            return None
        message = f"invalid reasoning value: '{effort}'"
        return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

    def read(self, body: dict[str, Any]) -> int:
        """It cuts in silence: whole messages from the front, then the text."""
        prompt = prompt_of(body)
        while "messages" in body and len(prompt) > 1 and self.length(prompt) > self.context:
            prompt = prompt[1:]
        return min(self.length(prompt), self.context)

    def length(self, prompt: Any) -> int:
        return words(prompt) + words(self.system)

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        match path:
            case "/api/version":
                return 200, {"version": "0.32.6"}
            case "/v1/models":
                return 200, {"data": [{"id": it} for it in self.models]}
            case "/api/ps":
                loaded = [{"name": it, "model": it, "context_length": self.context} for it in self.models]
                return 200, {"models": loaded if self.loaded else []}
            case "/api/show":
                return 200, {"template": "", "system": self.system, "parameters": "", "model_info": {}}
            case "/api/chat" | "/api/generate" | "/api/embed":
                return self.generate(body)
        return None

    def generate(self, body: dict[str, Any]) -> Answer:
        self.loaded = True
        if not any(name in body for name in ("messages", "prompt", "input")):
            return 200, {"done": True, "done_reason": "load"}
        prompt = prompt_of(body)
        texts = prompt if "input" in body and isinstance(prompt, list) else [prompt]
        tokens = max(map(self.length, texts))
        if body.get("truncate") is False and tokens > self.context:
            if not self.numbers:  # before 0.30
                return 400, {"error": "the input length exceeds the context length"}
            return 400, {"error": json.dumps({"error": too_long(tokens, self.context)})}
        return 200, {"done": True, "prompt_eval_count": min(tokens, self.context)}


def too_long(tokens: int, context: int) -> dict[str, Any]:
    """llama.cpp's."""
    message = f"request ({tokens} tokens) exceeds the available context size ({context} tokens), try increasing it"
    return {
        "code": 400,
        "message": message,
        "type": "exceed_context_size_error",
        "n_prompt_tokens": tokens,
        "n_ctx": context,
    }


class Vllm(Dialect):
    knows: ClassVar = {
        "/v1/chat/completions": CHAT + "max_completion_tokens n logit_bias tool_choice parallel_tool_calls",
        "/v1/completions": """model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
            stop stream stream_options suffix temperature top_p""",
        "/v1/embeddings": "model input encoding_format dimensions",
    }

    def openai(self, _: str, body: dict[str, Any]) -> Answer | None:
        if body.get("suffix"):
            return self.refusal("suffix is not currently supported", "suffix")
        tokens, asked = words(prompt_of(body)), body.get("max_tokens") or 0
        if tokens + asked <= self.context:
            return None
        least = self.context - asked + 1
        return self.refusal(
            f"This model's maximum context length is {self.context} tokens. However, you requested {asked} output "
            f"tokens and your prompt contains at least {least} input tokens, for a total of at least "
            f"{self.context + 1} tokens. Please reduce the length of the input prompt or the number of requested "
            f"output tokens. (parameter=input_tokens, value={least})",
            "input_tokens",
        )

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.model, "max_model_len": self.context}]}
        if path == "/tokenize" and self.counts:
            tokens = words(prompt_of(body))
            return 200, {"count": tokens, "max_model_len": self.context, "tokens": list(range(tokens))}
        return None

    @staticmethod
    def refusal(message: str, param: str) -> Answer:
        return 400, {"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}


class LlamaCpp(Dialect):
    knows: ClassVar = {
        "/v1/chat/completions": CHAT + "max_completion_tokens n logit_bias tool_choice parallel_tool_calls",
        "/v1/completions": """model prompt frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
            stream stream_options temperature top_p""",
        "/v1/embeddings": "model input encoding_format",
    }

    def took(self, path: str, body: dict[str, Any]) -> list[str]:
        named = isinstance(body.get("tool_choice"), dict)  # a wrong type to it: a warning in its log
        return [name for name in super().took(path, body) if name != "tool_choice" or not named]

    def openai(self, path: str, body: dict[str, Any]) -> Answer | None:
        tokens = max(map(words, body["input"])) if isinstance(body.get("input"), list) else words(prompt_of(body))
        if path == "/v1/embeddings" and tokens > 512:
            message = (
                f"input ({tokens} tokens) is too large to process. increase the physical batch size "
                "(current batch size: 512)"
            )
            return 500, {"error": {"code": 500, "message": message, "type": "server_error"}}
        if tokens < self.context:
            return None
        error = too_long(tokens, self.context)
        if not self.numbers:
            error = {"code": 400, "message": "the request exceeds the available context size", "type": error["type"]}
        return 400, {"error": error}

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.model}]}
        if path == "/props":
            return 200, {"default_generation_settings": {"n_ctx": self.context}, "total_slots": self.slots}
        if path == "/v1/chat/completions/input_tokens" and self.counts:
            return 200, {"input_tokens": words(body["messages"])}
        if path == "/tokenize" and self.counts:
            return 200, {"tokens": list(range(words(body["content"])))}
        return None


DIALECTS = {"ollama": Ollama, "vllm": Vllm, "llamacpp": LlamaCpp}
