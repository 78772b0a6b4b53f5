"""vLLM, 0.30.0 and 0.32.0. The uses of OpenAI's parameters were seen there (tests/recordings/vllm); those of its own
fields were read in its source, except what is in the recordings. Its sleep mode was read there too (0.32, and the
pages of its documentation), and never run."""

from http import HTTPStatus

from gateway.dialects.asking import Engine, Prompt, Window, as_count, as_list, as_object, uncounted
from gateway.dialects.dialect import Dialect, JsonStyle, Sleeper, Use, Ways, Word, uses
from gateway.dialects.rerank_fields import fit_documents
from gateway.dialects.sounds import fit_transcription
from gateway.errors import EngineError

_WORDS = (
    Word("currently busy and cannot accept new requests", "full"),
    Word("enginecore encountered an issue", "died"),
    Word("enginedeaderror", "died"),
    Word("'detail': 'not found'", "unsupported"),  # an endpoint that the model's kind doesn't have
    Word(
        "is not a multimodal model",
        "caller",
        "messages",
        "The model takes only text, and cannot read images or audio.",
    ),
    Word(
        "tool-call-parser",
        "unsupported",
        "tools",
        "The engine is not set up for tool calls. Ask its operator to set VLLM_TOOL_PARSER.",
    ),
    Word("grammar error", "caller"),
    Word(
        "reasoning_config",
        "caller",
        "thinking_token_budget",
        "The engine is not set up for 'thinking_token_budget'. Leave it out.",
    ),
    Word("untrusted chat template", "caller", "chat_template", "The engine accepts no chat template in a request."),
    Word("does not support transcriptions", "unsupported", "model", "The model behind this name does not transcribe."),
    Word("suffix is", "caller", "suffix"),
    Word("stop cannot", "caller", "stop"),
    Word("matryoshka", "caller", "dimensions"),
    Word("prompt cannot be empty", "caller"),
    Word("must pass at least one prompt", "caller", "prompt"),
    Word("out of vocabulary", "caller", "prompt"),
)


async def _window(engine: Engine, prompt: Prompt) -> Window:
    for entry in as_list(await engine.ask("models"), "data"):
        if entry.get("id") == prompt.model:
            return Window(as_count(entry.get("max_model_len")))
    return Window(None)


async def _count_messages(engine: Engine, prompt: Prompt) -> int | None:
    names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    body = {name: prompt.fields[name] for name in names if name in prompt.fields}
    return as_count(as_object(await engine.ask("/tokenize", body | {"model": prompt.model})).get("count"))


async def _count_text(engine: Engine, prompt: Prompt) -> int | None:
    if not isinstance(prompt.content, str):
        return await uncounted(engine, prompt)
    told = await engine.ask("/tokenize", {"prompt": prompt.content, "model": prompt.model})
    return as_count(as_object(told).get("count"))


async def _asleep(engine: Engine) -> bool:
    return as_object(await engine.ask("/is_sleeping")).get("is_sleeping") is True


async def _sleep(engine: Engine) -> None:
    """Level 1 moves the weights to the host's memory, and discards the KV cache."""
    await _tell(engine, "/sleep?level=1&mode=wait")


async def _wake(engine: Engine) -> None:
    await _tell(engine, "/wake_up")


async def _tell(engine: Engine, path: str) -> None:
    told = await engine.ask(path, {}, patient=True)
    if told.status == HTTPStatus.NOT_FOUND:
        raise EngineError(f"{path}: 404. vLLM needs VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode for that.")
    if told.status != HTTPStatus.OK:
        raise EngineError(f"{path}: {told.status}")


_LIMITS: dict[str, Use] = {"max_completion_tokens": "as max_tokens"}
_PROMPT = uses(taken="truncate_prompt_tokens truncation_side add_special_tokens")
_GENERATION = _PROMPT | uses(
    taken="""structured_outputs stop_token_ids bad_words allowed_token_ids skip_special_tokens prompt_logprobs
        return_token_ids return_prompt_text""",
    ignored="guided_json guided_regex guided_choice guided_grammar",  # older versions took them
)

_CHAT = Ways(
    parameters=uses(
        taken="""messages model stream stream_options max_tokens max_completion_tokens temperature top_p n stop seed
            frequency_penalty presence_penalty logit_bias logprobs top_logprobs response_format tools tool_choice
            parallel_tool_calls reasoning_effort""",
        ignored="""verbosity modalities audio prediction web_search_options functions function_call user
            safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier store metadata
            moderation""",
    ),
    extras=_GENERATION | uses(taken="echo chat_template_kwargs documents add_generation_prompt continue_final_message"),
    count=_count_messages,
)
_COMPLETION = Ways(
    parameters=uses(
        taken="""prompt model stream stream_options max_tokens temperature top_p n stop seed frequency_penalty
            presence_penalty logit_bias logprobs echo""",
        ignored="best_of user",
    )
    | {"suffix": "refused"},
    extras=_GENERATION | _LIMITS,
    count=_count_text,
)
_EMBEDDING = Ways(
    parameters=uses(taken="input model encoding_format dimensions", ignored="user"),
    extras=_PROMPT,
    count=_count_text,
)

_RERANK = Ways(  # read in its source
    parameters=uses(taken="model query documents top_n", ignored="return_documents max_tokens_per_doc"),
    extras=uses(taken="truncate_prompt_tokens truncation_side use_activation"),
    count=uncounted,
    fit=fit_documents,
)

_TRANSCRIPTION = Ways(  # read in its source
    parameters=uses(
        taken="file model language prompt response_format temperature timestamp_granularities[]",
        ignored="chunking_strategy include[] known_speaker_names[] known_speaker_references[] keywords[] languages[]",
    ),
    extras=uses(
        taken="""to_language seed top_p top_k min_p frequency_penalty repetition_penalty presence_penalty
            max_completion_tokens"""
    ),
    count=uncounted,
    fit=fit_transcription("json", "verbose_json"),
)
_SPEECH = Ways(  # read in vLLM-Omni's documentation; an engine without it answers 404
    parameters=uses(taken="input model voice response_format speed instructions stream_format"),
    count=uncounted,
)

VLLM = Dialect(
    name="vllm",
    url="http://127.0.0.1:8000/v1",
    model="meta-llama/Llama-3.1-8B-Instruct",
    health="/health",
    endpoints={
        "chat": _CHAT,
        "completion": _COMPLETION,
        "embedding": _EMBEDDING,
        "rerank": _RERANK,
        "transcription": _TRANSCRIPTION,
        "speech": _SPEECH,
    },
    sampling=uses(
        taken="""top_k min_p ignore_eos repetition_penalty length_penalty min_tokens use_beam_search
            include_stop_str_in_output include_reasoning thinking_token_budget"""
    )
    | {"n_predict": "as max_tokens"},
    roles=dict.fromkeys(("system", "developer", "user", "assistant", "tool", "function"), "taken"),
    parts={
        "text": "taken",
        "image_url": "taken",
        "input_audio": "taken",
        "refusal": "taken",
        "file": "refused",
        "any other": "refused",
    },
    reasoning={"reasoning": "taken", "reasoning_content": "taken"},
    control={
        "cache_salt": (),  # whose prefix cache is shared: the operator's to say
        "priority": (0,),
        "request_id": (),  # was another caller's, who then got its tokens or its abort
        "kv_transfer_params": ({},),  # which host to fetch a cache from
        "ec_transfer_params": ({},),
        "vllm_xargs": ({},),  # anything at all, for plugins
        "logits_processors": ([],),  # names Python code
        "prompt_embeds": ([],),  # a pickled tensor (CVE-2025-62164)
        "chat_template": (),  # a program that runs in the engine's front end (CVE-2025-61620)
        "mm_processor_kwargs": ({},),  # arguments for the loading code: sizes without bounds
        "media_io_kwargs": ({},),
    },
    refuses_nothing=True,
    words=_WORDS,
    too_long=(
        "maximum context length",
        "the model's context length is only",  # older versions
        "max_tokens must be at least 1, got 0",  # of a prompt as long as the context: a request can't say 0
    ),
    window=_window,  # what it works on at a time it tells nowhere: its memory decides
    slots=256,
    learns_slots=True,
    sleeper=Sleeper(asleep=_asleep, sleep=_sleep, wake=_wake),
    # In each chunk: when its API server lags, one chunk has several tokens.
    counts={"include_usage": True, "continuous_usage_stats": True},
    long_limits="left out",  # refused by 0.30; without a limit it makes what fits
    continues={"add_generation_prompt": False, "continue_final_message": True},
    resumes={
        "text": ("message", "anew"),
        "reasoning": ("thought", "anew"),
        "json": ("rest", "thought", "anew"),
        "calls": ("anew", "arguments"),
    },
    think_tags=("<think>\n", "</think>"),  # seen with a template and a parser as Qwen3 has them
    json_style=JsonStyle(
        space=r"[ \n\r\t]*",
        space_before_comma=True,
        required_first=False,
        asks=lambda grammar: {"structured_outputs": {"grammar": grammar}},
    ),
)
