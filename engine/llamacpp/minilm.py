"""Write all-MiniLM-L6-v2 as the file that llama.cpp reads, from the Python package that holds it.

    minilm.py MODEL.ZIP OUT.GGUF

The weights are copied as they are, 32 bits each. The names of the tensors and of the metadata are llama.cpp's for a
BERT encoder, and its WordPiece tokenizer wants a mark before each word in place of BERT's mark within one. This program
needs only the standard library, because it runs once, while the image is built.
"""

import json
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ALIGNMENT = 32  # bytes
F32 = 0  # of the tensors' types
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # of the metadata's types
NORMAL, CONTROL = 1, 3  # of the tokens' types
MEAN = 1  # of the ways to make one vector of all tokens'
FORMS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}

NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with zipfile.ZipFile(source) as package, target.open("wb") as out:
        config = json.loads(package.read("config.json"))
        metadata = list(described(config, json.loads(package.read("tokenizer.json"))))
        with package.open("model.safetensors") as weights:
            convert(weights, metadata, out)


def convert(weights: IO[bytes], metadata: list[tuple[str, int, Any]], out: IO[bytes]) -> None:
    """Write the whole file. The tensors keep the order in which the source has them."""
    (length,) = struct.unpack("<Q", weights.read(8))
    tensors = {name: it for name, it in json.loads(weights.read(length)).items() if name != "__metadata__"}
    ordered = sorted(tensors.items(), key=lambda it: it[1]["data_offsets"][0])
    kept = [(renamed, it) for name, it in ordered if (renamed := rename(name))]
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(kept), len(metadata)))
    for key, kind, value in metadata:
        out.write(text(key) + struct.pack("<I", kind) + encoded(kind, value))
    offset = 0
    for name, it in kept:
        shape = it["shape"][::-1]
        out.write(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, F32, offset))
        offset += padded(it["data_offsets"][1] - it["data_offsets"][0])
    out.write(bytes(padded(out.tell()) - out.tell()))
    for name, it in ordered:
        size = it["data_offsets"][1] - it["data_offsets"][0]
        data = weights.read(size)
        if rename(name):
            if it["dtype"] != "F32":
                sys.exit(f"{name} has the type {it['dtype']}, and not F32")
            out.write(data.ljust(padded(size), b"\0"))


def rename(name: str) -> str | None:
    """Return llama.cpp's name of a tensor, or None for one that it does not use."""
    part, _, kind = name.rpartition(".")
    if part in NAMES:
        return f"{NAMES[part]}.{kind}"
    words = part.split(".", 3)
    if words[:2] == ["encoder", "layer"] and words[3] in LAYER:
        return f"blk.{words[2]}.{LAYER[words[3]]}.{kind}"
    return None


def described(config: dict[str, Any], tokenizer: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """Yield the metadata: name, type, value."""
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {it["content"]: it["id"] for it in tokenizer["added_tokens"]}
    yield "general.architecture", STRING, "bert"
    yield "general.name", STRING, "all-MiniLM-L6-v2"
    yield "bert.context_length", UINT32, config["max_position_embeddings"]
    yield "bert.embedding_length", UINT32, config["hidden_size"]
    yield "bert.feed_forward_length", UINT32, config["intermediate_size"]
    yield "bert.block_count", UINT32, config["num_hidden_layers"]
    yield "bert.attention.head_count", UINT32, config["num_attention_heads"]
    yield "bert.attention.layer_norm_epsilon", FLOAT32, config["layer_norm_eps"]
    yield "bert.attention.causal", BOOL, False
    yield "bert.pooling_type", UINT32, MEAN
    yield "tokenizer.ggml.model", STRING, "bert"
    yield "tokenizer.ggml.token_type_count", UINT32, config["type_vocab_size"]
    yield "tokenizer.ggml.tokens", ARRAY, (STRING, [spelled(it, special) for it in vocabulary])
    yield "tokenizer.ggml.token_type", ARRAY, (INT32, [CONTROL if it in special else NORMAL for it in vocabulary])
    for name, token in {"bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "seperator": "[SEP]", "unknown": "[UNK]",
                        "padding": "[PAD]", "mask": "[MASK]"}.items():  # fmt: skip  # "seperator" is how it is spelled
        yield f"tokenizer.ggml.{name}_token_id", UINT32, special[token]


def spelled(token: str, special: dict[str, int]) -> str:
    """Return a token in llama.cpp's spelling: "##ing" is "ing", and "play", which begins a word, is "▁play"."""
    if token in special:
        return token
    return token[2:] if token.startswith("##") else "\N{LOWER ONE EIGHTH BLOCK}" + token


def encoded(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(encoded(inner, it) for it in values)
    return struct.pack(FORMS[kind], value)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


if __name__ == "__main__":
    main()
