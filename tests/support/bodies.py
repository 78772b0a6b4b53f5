"""Bodies that are refused, and the field that each refusal names."""

import json
from typing import Any

from tests.support.attacks import BODY
from tests.support.processes import MESSAGES


def chat(extra: str) -> bytes:
    return BODY[:-1].encode() + b"," + extra.encode() + b"}"


def parts(*contents: Any) -> bytes:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, *contents]},
    ]
    return json.dumps({"messages": messages}).encode()


AT = "messages[1].content[1]"
BODIES: dict[str, tuple[bytes, str | None]] = {
    # JSON that parsers read differently, or not at all
    "empty": (b"", None),
    "depth 100,000": (chat(f'"x":{"[" * 100_000}{"]" * 100_000}'), None),
    "depth 1,000": (chat(f'"x":{"[" * 1000}{"]" * 1000}'), None),
    "depth 1,000 of objects": (chat('"x":' + '{"a":' * 999 + "{}" + "}" * 999), None),
    "an integer of 5,000 digits": (chat(f'"seed":{"9" * 5000}'), None),
    "NaN": (chat('"temperature":NaN'), None),
    "Infinity": (chat('"temperature":Infinity'), None),
    "1e400": (chat('"temperature":1e400'), None),
    "a lone surrogate": (chat('"user":"\\ud800"'), None),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY.encode(), None),
    "UTF-16": (BODY.encode("utf-16"), None),
    "UTF-32": (BODY.encode("utf-32"), None),
    "broken UTF-8": (chat('"user":"').replace(b'"user":"', b'"user":"\xff"'), None),
    "two objects": (BODY.encode() * 2, None),
    "a comment": (BODY.encode() + b"//", None),
    "a name twice": (chat('"messages":[{"role":"user","content":"x"}]'), "messages"),
    "a name twice, escaped": (chat('"m\\u006fdel":"a","model":"b"'), "model"),
    "a name twice, deep inside": (chat('"tools":[{"function":{"name":"a", "name":"b"}}]'), "name"),
    "a name twice, spaced": (chat('"n" : 1, "n" : 2'), "n"),
    # amounts
    "a million answers": (chat('"n":1000000'), "n"),
    "no answers": (chat('"n":0'), "n"),
    "half an answer": (chat('"n":0.5'), "n"),
    "best of a million": (chat('"best_of":1000000'), "best_of"),
    # fields that steer the engine
    **{
        f"the field {field}": (chat(f'"{field}":{value}'), field)
        for field, value in {
            "cache_salt": '"x"',
            "priority": "-1",
            "request_id": '"x"',
            "kv_transfer_params": '{"remote_host": "x"}',
            "vllm_xargs": '{"x": 1}',
            "n_discard": "-1",
            "slot_id": "0",
            "id_slot": "0",
            "n_keep": "-1",
            "n_cmpl": "99",
            "cache_prompt": "false",
            "lora": '[{"id": 0, "scale": 1}]',
            "chat_template": '"{{ x }}"',
            "keep_alive": "-1",
            "options": '{"num_ctx": 1000000}',
        }.items()
    },
    # numbers that engines read differently
    "a limit as text": (chat('"max_tokens":"5"'), "max_tokens"),
    "a limit of half a token": (chat('"max_tokens":5.5'), "max_tokens"),
    "no limit, said by 0": (chat('"max_tokens":0'), "max_tokens"),
    "no limit, said by -1": (chat('"max_completion_tokens":-1'), "max_completion_tokens"),
    "a number of answers that is true": (chat('"n":true'), "n"),
    "a seed of 65 bits": (chat(f'"seed":{2**64}'), "seed"),
    "a seed of 65 bits, negative": (chat(f'"seed": -{2**63 + 1}'), "seed"),
    "a seed of 300 digits": (chat(f'"seed":{"9" * 300}'), "seed"),
    "65 bits in a list": (chat(f'"stop_token_ids":[1,{2**64}]'), "stop_token_ids[1]"),
    # names that some engines read as other names
    **{
        f"the name {name}": (chat(f'"{name}":{value}'), name)
        for name, value in {
            "Messages": "[]",
            "me\u017f\u017fage\u017f": "[]",
            "Model": '"other/model:1b"',
            "MODEL": '"x"',
            "Max_Tokens": "9",
            "max_to\u212aens": "9",
            "Stream": "true",
            "STREAM_OPTIONS": "{}",
            "N": "99",
            "KEEP_ALIVE": "-1",
            "_debug_render_only": "true",
            "_Debug_Render_Only": "true",
            "_debug_render_only ": "null",
            "_anything": "1",
        }.items()
    },
    "a name in capitals, escaped": (chat('"\\u004dodel":"x"'), "Model"),
    **{
        f"{where} in capitals": (json.dumps({"messages": MESSAGES} | body).encode(), where)
        for where, body in {
            "messages[0].Content": {"messages": [{"role": "user", "content": "x", "Content": "y"}]},
            "messages[0].ROLE": {"messages": [{"role": "user", "content": "x", "ROLE": "system"}]},
            "messages[0]._x": {"messages": [{"role": "user", "content": "x", "_x": 1}]},
            "messages[0].content[0].Text": {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "Text": "y"}]}]
            },
            "messages[0].content[0].image_url.URL": {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,", "URL": "http://x/"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.Arguments": {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "", "Arguments": ""}}]}
                ]
            },
            "tools[0].Function": {"tools": [{"type": "function", "function": {}, "Function": {}}]},
            "tools[0].function.Name": {"tools": [{"function": {"name": "f", "Name": "g"}}]},
            "response_format.Type": {"response_format": {"type": "text", "Type": "json_object"}},
            "response_format.json_schema.Schema": {"response_format": {"json_schema": {"schema": {}, "Schema": {}}}},
            "stream_options.Include_Usage": {"stream": True, "stream_options": {"Include_Usage": False}},
            "reasoning.Effort": {"reasoning": {"effort": "low", "Effort": "high"}},
        }.items()
    },
    # media that the engine would fetch
    **{
        f"a picture at {url}": (parts({"type": "image_url", "image_url": {"url": url}}), f"{AT}.image_url")
        for url in (
            "http://169.254.169.254/latest/meta-data",
            "https://example.com/x.png",
            "file:///etc/passwd",
            "ftp://example.com/x",
            "//example.com/x.png",
            " data:image/png;base64,AAAA",
            "DATA:image/png;base64,AAAA",
            "gopher://engine:8080/",
            "",
        )
    },
    "a picture as a string": (parts({"type": "image_url", "image_url": "http://x/"}), f"{AT}.image_url"),
    "a picture without a URL": (parts({"type": "image_url", "image_url": None}), f"{AT}.image_url"),
    "a picture in a part of another type": (parts({"type": "text", "image_url": "http://x/"}), f"{AT}.image_url"),
    "a film": (parts({"type": "video_url", "video_url": {"url": "https://x/"}}), f"{AT}.video_url"),
    "a sound": (parts({"type": "audio_url", "audio_url": {"url": "file:///x"}}), f"{AT}.audio_url"),
    "a sound's data as a URL": (
        parts({"type": "input_audio", "input_audio": {"data": "http://x/"}}),
        f"{AT}.input_audio",
    ),
    "a file's data as a URL": (parts({"type": "file", "file": {"file_data": "file:///etc/passwd"}}), f"{AT}.file"),
    "another caller's picture": (
        parts({"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "x"}),
        f"{AT}.uuid",
    ),
    "a pickled tensor": (parts({"type": "image_embeds", "image_embeds": "AAAA"}), f"{AT}.image_embeds"),
}
