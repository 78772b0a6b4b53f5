"""What the fake engine says about itself in each engine's dialect, what it takes of a request, and what it does with a
prompt that is too long. A word is a token here, and so is each message of a chat.

Written after the engines' sources, apart from the gateway's own table: Ollama 0.32 (openai/openai.go, server/routes.go,
llm/llama_server.go), vLLM 0.32 (the endpoints' protocol.py, renderers/params.py), llama.cpp b11549.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from tests.support.fakes.frames import MOMENT, Frame, busy, embeddings, listed, loaded, shown, tag, unknown
from tests.support.fakes.memory import Memory
from tests.support.fakes.refusals import refusal
from tests.support.fakes.says import asks
from tests.support.fakes.told import with_told

if TYPE_CHECKING:
    from tests.support.fakes.gpu import Gpu

Answer = tuple[int, Any]
GENERATING = ("/v1/chat/completions", "/v1/completions")
SECONDS = {"type": "duration", "seconds": 2}
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "ultra", "max", "none")


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


def inputs_of(body: dict[str, Any]) -> int:
    """What a request counts for in vLLM's queue: each prompt or input `n` times."""
    prompt = body.get("prompt", body.get("input", body.get("documents")))
    several = isinstance(prompt, list) and all(map(not_number, prompt))
    return (len(prompt) if several else 1) * (body.get("n") or 1)


def prompt_of(body: dict[str, Any]) -> Any:
    return next(body[name] for name in ("messages", "file", "prompt", "input", "documents") if name in body)


class Dialect:
    """`answer` is what it says at once to a request, or None: the script decides. At /_dialect its attributes can be
    set, and it tells what it was asked."""

    name: ClassVar[str]
    knows: ClassVar[dict[str, str]] = {}  # the fields it does something with

    def __init__(self) -> None:
        self.model = "fake-model"
        self.context = 1000
        self.numbers = True  # whether a refusal tells them
        self.counts = True  # whether its tokenizer answers
        self.clips = (
            True  # whether an answer is cut to what its prompt leaves, as by vLLM since 0.31; otherwise refused
        )
        self.slots = 256  # how many requests it says it works on at a time, where it says
        self.one_system = False  # whether the chat template takes one system message only, at the front
        self.alternating = False  # whether it takes no two messages in a row of one role
        self.anchored = False  # whether it refuses a tool with a pattern that lacks an anchor
        self.slow = 0.0  # seconds until it answers at an endpoint of its own
        self.takes = 1 << 40  # inputs at a time, of all requests, where it refuses more
        self.works = 0.0  # seconds that a blocking answer takes
        self.at_work = 0  # inputs that it has
        self.obeys = False  # whether it does as it is asked (obedient.py), and tells of each request as it came
        self.asked: list[dict[str, Any]] = []
        self.memory = Memory()
        self.gpu: Gpu | None = None  # one that it shares with others

    def answer(self, method: str, path: str, raw: bytes) -> Answer | None:
        body = with_told(json.loads(raw)) if raw else {}
        if path == "/_dialect":
            for name, value in body.items():
                setattr(self._owner(name), name, value)
            asked, self.asked = self.asked, [] if method == "POST" else self.asked
            return 200, asked
        if path.startswith("/_"):
            return None
        took = self.took(path, body) if path in self.knows else []
        self.asked.append({"path": path, "body": body, "took": took} | ({"raw": raw.decode()} if self.obeys else {}))
        if path not in self.knows:
            return self.own(path, body)
        if body.get("model") is not None and not self.has(body["model"]):
            return 404, unknown(self.name, body["model"])
        refused = self.openai(path, body)
        template = {"one_system": self.one_system, "alternating": self.alternating}
        refused = refused or refusal(self.name, body, anchored=self.anchored, **template)
        if refused or body.get("stream") or "tries" in body or asks(body) or (self.obeys and path in GENERATING):
            return refused
        tokens = self.read(body)
        if path == "/v1/rerank":
            return 200, self.ranking(body)
        if path == "/v1/audio/speech":
            return None
        if path == "/v1/audio/transcriptions":
            return 200, {"text": "one two three"} | ({"usage": SECONDS} if self.name == "vllm" else {})
        if path == "/v1/embeddings":
            return 200, embeddings(self.name, body["model"], inputs_of(body), tokens)
        usage = {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3}
        text = self.repeated(body) + "one two three"
        return 200, Frame(self.name, "messages" in body, body["model"]).whole([text], "stop", usage)

    def repeated(self, body: dict[str, Any]) -> str:  # noqa: ARG002
        """What a blocking answer repeats of its request."""
        return ""

    def has(self, model: str) -> bool:
        """Whether it has a model of that name."""
        return model == self.model

    def _owner(self, name: str) -> object:
        if name in ("room", "seconds", "too_large", "wakes"):
            return self.gpu or self.memory
        return self

    @contextmanager
    def admitted(self, path: str, raw: bytes) -> Iterator[Answer | None]:
        """Its refusal if it has no room for a request; otherwise it has it until the block's end. A refusal with status
        200 is said in the stream that was asked for."""
        inputs = inputs_of(json.loads(raw)) if path in self.knows else 0
        if inputs and self.at_work + inputs > self.takes:
            body = json.loads(raw)
            self.asked.append({"path": path, "body": body, "took": [], "full": True})
            begun = body.get("stream") and (body.get("n") or 1) <= self.takes
            yield 200 if begun else 503, busy()
            return
        self.at_work += inputs
        try:
            yield None
        finally:
            self.at_work -= inputs

    def having(self, path: str, raw: bytes, gone: Callable[[], bool]) -> AbstractAsyncContextManager[None]:
        """Have the model of a request in memory in the block."""
        if self.gpu:
            return self.gpu.works() if path in self.knows else nullcontext()
        loads = path in self.knows or path in ("/api/chat", "/api/generate", "/api/embed")
        return self.memory.having(json.loads(raw).get("model"), gone) if loads else nullcontext()

    def took(self, path: str, body: dict[str, Any]) -> list[str]:
        """The fields of a request that it does something with."""
        return sorted(set(self.knows[path].split()) & body.keys())

    def read(self, body: dict[str, Any]) -> int:
        """The tokens of its prompt that it read."""
        return words(prompt_of(body))

    def ranking(self, body: dict[str, Any]) -> dict[str, Any]:
        """The longest document is the best."""
        texts = body["documents"]
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[: body.get("top_n") or None]
        tokens = sum(words(body["query"]) + words(it) for it in texts)
        results = [{"index": it, "relevance_score": len(texts[it]) / 100} for it in order]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"model": body["model"], "results": results, "usage": usage}

    def openai(self, path: str, body: dict[str, Any]) -> Answer | None:
        """Its refusal of a request to one of OpenAI's endpoints, if it refuses."""
        raise NotImplementedError

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        """Its answer at an endpoint of its own."""
        raise NotImplementedError


CHAT = """messages model stream stream_options max_tokens temperature top_p stop seed frequency_penalty
    presence_penalty logprobs top_logprobs response_format tools reasoning_effort """


SAMPLING = "top_k min_p ignore_eos "
VLLM = (
    SAMPLING
    + """repetition_penalty length_penalty min_tokens use_beam_search include_stop_str_in_output include_reasoning
    thinking_token_budget structured_outputs stop_token_ids bad_words allowed_token_ids skip_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs return_token_ids return_prompt_text add_special_tokens """
)
LLAMA = (
    SAMPLING
    + """n_predict repeat_penalty repeat_last_n typical_p top_n_sigma xtc_probability xtc_threshold dynatemp_range
    dynatemp_exponent mirostat mirostat_tau mirostat_eta dry_multiplier dry_base dry_allowed_length dry_penalty_last_n
    dry_sequence_breakers samplers n_probs timings_per_token grammar json_schema """
)


class Ollama(Dialect):
    name = "ollama"
    knows: ClassVar = {
        "/v1/chat/completions": CHAT + "reasoning",
        "/v1/completions": """model prompt frequency_penalty max_tokens presence_penalty seed stop stream stream_options
            temperature top_p suffix""",
        "/v1/embeddings": "model input dimensions encoding_format",
        "/v1/audio/transcriptions": "file model language prompt response_format",
    }

    def __init__(self) -> None:
        super().__init__()
        self.models = [self.model, "small:latest", "own-system:latest", "unloaded:latest"]
        self.loaded = True
        self.stays = True  # whether a model stays in memory after its request
        self.sizes = True  # whether it tells the windows of the models in memory
        self.remote = False  # whether its models are in Ollama's cloud
        self.fails: dict[str, Answer] = {}  # what it says to a `load`, or to a `count` with cutting forbidden
        self.system = ""
        self.capabilities = ["completion", "tools", "thinking"]
        self.thinks = True  # whether its model does
        self.efforts = EFFORTS

    def openai(self, _: str, body: dict[str, Any]) -> Answer | None:
        effort = body.get("reasoning_effort")
        if effort not in (None, "none") and not self.thinks:
            message = f'"{body["model"]}" does not support thinking'
            return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        if effort is None or effort in self.efforts:
            return None
        known = ", ".join(f'"{it}"' for it in self.efforts[:-1])
        message = f'invalid reasoning value: "{effort}" (must be {known}, or "{self.efforts[-1]}")'
        return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

    def has(self, model: str) -> bool:
        names = {it.lower() for it in self.models}
        return model.lower() in names or f"{model.lower()}:latest" in names

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
                return 200, {"version": "0.32.15"}
            case "/v1/models":
                return 200, {"object": "list", "data": [listed("ollama", it) for it in self.models]}
            case "/api/ps" if self.memory.room:
                it = self.memory
                told = {"loads": it.loads, "failed": it.failed, "given_up": it.given_up, "loading": it.loading}
                return 200, {"models": [loaded(name, self.context) for name in it.models], **told}
            case "/api/ps":
                there = self.models if self.loaded and not self.remote else []
                return 200, {"models": [loaded(it, self.context if self.sizes else None) for it in there]}
            case "/api/tags":
                return 200, {"models": [tag(it) | {"capabilities": self.capabilities} for it in self.models]}
            case "/api/show" if not self.has(body["model"]):
                return 404, {"error": f"model '{body['model']}' not found"}
            case "/api/show":
                where = {"remote_host": "https://ollama.com:443"} if self.remote else {}
                return 200, shown(self.system, self.context) | where
            case "/api/chat" | "/api/generate" | "/api/embed":
                return self.generate(body)
        return None

    def generate(self, body: dict[str, Any]) -> Answer:
        loads = not any(name in body for name in ("messages", "prompt", "input"))
        if failure := self.fails.get("load" if loads else "count"):
            return failure
        self.loaded = self.stays
        head = {"model": body.get("model"), "created_at": MOMENT}
        if loads:
            return 200, head | {"response": "", "done": True, "done_reason": "load"}
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
    name = "vllm"
    knows: ClassVar = {
        "/v1/chat/completions": CHAT
        + VLLM
        + """max_completion_tokens n logit_bias tool_choice parallel_tool_calls echo chat_template_kwargs documents
            add_generation_prompt continue_final_message""",
        "/v1/completions": VLLM
        + """model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
            stop stream stream_options suffix temperature top_p""",
        "/v1/embeddings": """model input encoding_format dimensions truncate_prompt_tokens truncation_side
            add_special_tokens""",
        "/v1/rerank": "model query documents top_n truncate_prompt_tokens truncation_side use_activation",
        "/v1/audio/transcriptions": """file model language prompt response_format temperature
            timestamp_granularities[] to_language seed top_p top_k min_p frequency_penalty repetition_penalty
            presence_penalty max_completion_tokens""",
        "/v1/audio/speech": "input model voice response_format speed instructions stream_format",
    }

    def openai(self, path: str, body: dict[str, Any]) -> Answer | None:
        if body.get("suffix"):
            return self.refusal("suffix is only supported for models with FIM completion rendering", "suffix")
        tokens, asked = words(prompt_of(body)), body.get("max_tokens") or 0
        if tokens + asked <= self.context or (self.clips and tokens < self.context):
            return None
        if self.clips and path != "/v1/embeddings":
            return self.refusal(
                f"This model's maximum context length is {self.context} tokens. However, your prompt contains at least "
                f"{self.context + 1} input tokens, which exceeds this limit even without any output tokens. Please "
                f"reduce the length of the input prompt. (parameter=input_tokens, value={self.context + 1})",
                "input_tokens",
            )
        least = self.context - asked + 1
        return self.refusal(
            f"This model's maximum context length is {self.context} tokens. However, you requested {asked} output "
            f"tokens and your prompt contains at least {least} input tokens, for a total of at least "
            f"{self.context + 1} tokens. Please reduce the length of the input prompt or the number of requested "
            f"output tokens. (parameter=input_tokens, value={least})",
            "input_tokens",
        )

    def ranking(self, body: dict[str, Any]) -> dict[str, Any]:
        """Its results hold the documents, as its source says."""
        told = super().ranking(body)
        for it in told["results"]:
            it["document"] = {"text": body["documents"][it["index"]]}
        return {"id": "rerank-1", **told}

    def own(self, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [listed("vllm", self.model, self.context)]}
        if path == "/tokenize" and self.counts:
            tokens = words(prompt_of(body))
            told = {"count": tokens, "max_model_len": self.context, "tokens": list(range(tokens))}
            return 200, told | {"token_strs": None}
        return None if path == "/health" else (404, {"detail": "Not Found"})

    @staticmethod
    def refusal(message: str, param: str) -> Answer:
        return 400, {"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}


class LlamaCpp(Dialect):
    name = "llamacpp"
    knows: ClassVar = {
        "/v1/chat/completions": CHAT
        + LLAMA
        + """max_completion_tokens n logit_bias tool_choice parallel_tool_calls chat_template_kwargs
            add_generation_prompt reasoning_format""",
        "/v1/completions": LLAMA
        + """model prompt frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
            stream stream_options temperature top_p""",
        "/v1/embeddings": "model input encoding_format",
        "/v1/rerank": "model query documents top_n",
    }

    def __init__(self) -> None:
        super().__init__()
        self.vision = False

    def took(self, path: str, body: dict[str, Any]) -> list[str]:
        named = isinstance(body.get("tool_choice"), dict)  # a wrong type to it: a warning in its log
        return [name for name in super().took(path, body) if name != "tool_choice" or not named]

    def repeated(self, body: dict[str, Any]) -> str:
        last = (body.get("messages") or [{}])[-1]
        return str(last.get("content") or "") if last.get("role") == "assistant" else ""

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
            meta = {"n_vocab": 49152, "n_ctx": self.context, "n_ctx_train": 8192, "n_embd": 576}
            return 200, {"object": "list", "data": [listed("llamacpp", self.model) | {"meta": meta}]}
        if path == "/props":
            return 200, {
                "default_generation_settings": {"n_ctx": self.context},
                "total_slots": self.slots,
                "modalities": {"vision": self.vision, "video": False, "audio": False},
                "chat_template_caps": {"supports_tools": True, "supports_preserve_reasoning": False},
                "is_sleeping": False,
            }
        if path == "/v1/chat/completions/input_tokens" and self.counts:
            return 200, {"input_tokens": words(body["messages"])}
        if path == "/tokenize" and self.counts:
            return 200, {"tokens": list(range(words(body["content"])))}
        return None


DIALECTS = {"ollama": Ollama, "vllm": Vllm, "llamacpp": LlamaCpp}
ENGINES = tuple(DIALECTS)
