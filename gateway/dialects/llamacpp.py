"""llama.cpp's server, b11549. The uses of OpenAI's parameters are tried on it in tests/stack/test_parameters.py."""

from collections.abc import Mapping

from gateway.dialects.asking import ANY, Engine, Facts, Prompt, Window, as_count, as_list, as_object, uncounted
from gateway.dialects.dialect import Dialect, JsonStyle, Use, Ways, Word, uses
from gateway.dialects.rerank_fields import fit_documents

_MEDIA = "The model takes only text, and cannot read {}."
# It answers many of a caller's mistakes with 500 (35 of the 237 wrong bodies that were tried; they stand in
# tests/recordings/llamacpp). Ollama passes these words on.
WORDS = (
    Word("image input is not supported", "unable", "messages", _MEDIA.format("images")),
    Word("audio input is not supported", "unable", "messages", _MEDIA.format("audio")),
    Word("video input is not supported", "unable", "messages", _MEDIA.format("video")),
    Word("model does not support multimodal", "unable", "messages", _MEDIA.format("images or audio")),
    Word("failed to parse messages", "caller", "messages"),
    Word("unsupported content[].type", "caller", "messages"),
    Word("non-assistant messages must contain", "caller", "messages"),
    Word("assistant messages at the end of the list", "caller", "messages"),
    Word("jinja exception", "caller", "messages"),  # the chat template's own raise_exception
    Word("failed to parse tools", "caller", "tools"),
    Word("invalid tool_choice", "caller", "tool_choice"),
    Word("grammar constraints with tools", "caller", "grammar"),
    Word("cannot use both json_schema and grammar", "caller", "grammar"),
    Word(
        "failed to parse grammar",
        "caller",
        says="The engine cannot use this grammar or JSON schema: it is malformed, or has too many repetitions.",
    ),
    Word("response_format type must be", "caller", "response_format"),
    Word("unknown reasoning format", "caller", "reasoning_format"),
    Word("top_logprobs requires logprobs", "caller", "top_logprobs"),
    Word("does not support embeddings", "unsupported", says="The model behind this name does not support embeddings."),
    Word("does not support reranking", "unsupported", says="The model behind this name does not rank documents."),
    Word("file not found", "unsupported"),  # no such endpoint: it never says that of a model
)
MOST_REPEATS = 1999  # it refuses 2000 repetitions and more as no grammar


async def _window(engine: Engine, _prompt: Prompt) -> Window:
    settings = as_object(await engine.ask("/props")).get("default_generation_settings")
    return Window(as_count(settings.get("n_ctx")) if isinstance(settings, dict) else None)


async def _models(engine: Engine) -> Mapping[str, Facts]:
    """Return what holds for the one model, whatever it is called. /props tells what its chat template can express."""
    props = as_object(await engine.ask("/props"))
    settings, media, template = (
        value if isinstance(value := props.get(name), dict) else {}
        for name in ("default_generation_settings", "modalities", "chat_template_caps")
    )
    metas = [it.get("meta") for it in as_list(await engine.ask("models"), "data")]
    trained = [as_count(it.get("n_ctx_train")) for it in metas if isinstance(it, dict)]
    can = {
        "vision": media.get("vision"),
        "audio": media.get("audio"),
        "tools": template.get("supports_tools"),
        "thinking": template.get("supports_preserve_reasoning") or template.get("supports_reasoning_effort"),
    }
    found = frozenset({"chat"} | {name for name, told in can.items() if told is True}) if media or template else None
    return {
        ANY: Facts(
            context=as_count(settings.get("n_ctx")),
            trained=trained[0] if trained else None,
            capabilities=found,
            loaded=props.get("is_sleeping") is not True if props else None,
        )
    }


async def _slots(engine: Engine) -> int | None:
    return as_count(as_object(await engine.ask("/props")).get("total_slots"))


async def _count_messages(engine: Engine, prompt: Prompt) -> int | None:
    told = await engine.ask("chat/completions/input_tokens", prompt.fields)
    return as_count(as_object(told).get("input_tokens"))


async def _count_text(engine: Engine, prompt: Prompt) -> int | None:
    if not isinstance(prompt.content, str):
        return await uncounted(engine, prompt)
    told = await engine.ask("/tokenize", {"content": prompt.content, "add_special": True})
    return len(as_object(told).get("tokens") or ()) or None


_LIMITS: dict[str, Use] = {"max_completion_tokens": "as max_tokens"}
_CONSTRAINTS = uses(taken="grammar json_schema")

_CHAT = Ways(
    parameters=uses(
        taken="""messages model stream stream_options max_tokens max_completion_tokens temperature top_p n stop seed
            frequency_penalty presence_penalty logit_bias logprobs top_logprobs response_format tools
            parallel_tool_calls reasoning_effort""",
        ignored="""verbosity modalities audio prediction web_search_options functions function_call user
            safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier store metadata
            moderation""",
    )
    | {"tool_choice": "by the gateway"},
    extras=_CONSTRAINTS | uses(taken="chat_template_kwargs add_generation_prompt reasoning_format"),
    count=_count_messages,
)
_COMPLETION = Ways(
    parameters=uses(
        taken="""prompt model stream stream_options max_tokens temperature top_p n stop seed frequency_penalty
            presence_penalty logit_bias logprobs""",
        ignored="suffix echo best_of user",
    ),
    extras=_CONSTRAINTS | _LIMITS,
    count=_count_text,
)
_EMBEDDING = Ways(
    parameters=uses(taken="input model encoding_format", ignored="dimensions user"),
    count=_count_text,
)

_RERANK = Ways(  # seen on b11549, started with a pooling type that ranks
    parameters=uses(taken="model query documents top_n", ignored="return_documents max_tokens_per_doc"),
    count=uncounted,
    fit=fit_documents,
)

LLAMACPP = Dialect(
    name="llamacpp",
    seeds=True,
    url="http://127.0.0.1:8080/v1",
    model="SmolLM2-135M-Instruct",
    health="/health",
    endpoints={
        "chat": _CHAT,
        "completion": _COMPLETION,
        "embedding": _EMBEDDING,
        "rerank": _RERANK,
        "transcription": None,
        "speech": None,
    },
    sampling=uses(
        taken="""top_k min_p ignore_eos repeat_penalty repeat_last_n typical_p top_n_sigma xtc_probability xtc_threshold
            dynatemp_range dynatemp_exponent mirostat mirostat_tau mirostat_eta dry_multiplier dry_base
            dry_allowed_length dry_penalty_last_n dry_sequence_breakers samplers n_probs timings_per_token"""
    )
    | {"n_predict": "as max_tokens"},
    roles=dict.fromkeys(("system", "developer", "user", "assistant", "tool", "function"), "taken"),
    parts={
        "text": "taken",
        "image_url": "taken",
        "input_audio": "taken",
        "refusal": "as text",
        "file": "refused",
        "any other": "refused",
    },
    reasoning={"reasoning": "as reasoning_content", "reasoning_content": "taken"},
    control={
        "id_slot": (-1,),  # somebody else's slot, and what is cached in it
        "slot_id": (-1,),
        "cache_prompt": (True,),
        "n_keep": (0,),
        "n_discard": (0,),  # negative: writes out of bounds (CVE-2026-21869)
        "n_cache_reuse": (0,),
        "n_cmpl": (1,),  # another name for n
        "lora": ([],),
        "system_prompt": (),  # before the prompts of all callers, in older versions
        "chat_parser": ("",),  # what the server works out itself, and believes
        "chat_format": (),
        "speculative.type": (),
        "speculative.n_min": (),
        "speculative.n_max": (),
        "speculative.p_min": (),
        "speculative.ngram_size_n": (),
        "speculative.ngram_size_m": (),
        "speculative.ngram_m_hits": (),
    },
    most_repeats=MOST_REPEATS,
    follows_each_way=True,
    words=WORDS,
    too_long=("exceed_context_size_error", "too large to process"),  # the latter of embeddings, with a 500
    window=_window,
    models=_models,
    ask_slots=_slots,
    deaf=True,  # tried
    repeats=True,  # tried
    counts_each=True,
    trims=False,  # it appends the assistant's message to the prompt without any template
    resumes={
        "text": ("message", "anew"),
        "reasoning": ("thought", "anew"),
        "json": ("rest", "anew"),
        "calls": ("anew", "arguments"),
    },
    thinks_in="reasoning_content",
    json_style=JsonStyle(
        space=r'"" | " " | "\n"{1,2} [ \t]{0,20}',
        space_before_comma=False,
        required_first=True,
        asks=lambda grammar: {"grammar": grammar},
    ),
)
