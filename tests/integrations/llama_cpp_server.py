"""llama.cpp's server over a Hugging Face Llama: runs in an interpreter that has llama-cpp-python[server], gguf and
safetensors. Arguments: the model's folder, a file to write, the port."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(folder: Path, file: Path) -> None:
    """Writes a Llama and its tokenizer (words, or pieces with merges) as GGUF."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    write_tokenizer(writer, folder, config)
    for name, weight in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if stem in WHOLE:
            writer.add_tensor(f"{WHOLE[stem]}.{kind}", weight.astype(np.float32))
            continue
        _, _, layer, part = stem.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):  # rotated pairs lie side by side there
            count = heads if part.endswith("q_proj") else kv_heads
            weight = weight.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.{layer}.{LAYER[part]}.{kind}", np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    model = described["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    # Merges come in the order of their rank; llama.cpp merges what scores best.
    merged = ["".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", [])]
    ranks = {token: rank for rank, token in reversed(list(enumerate(merged)))}
    scores = [-float(ranks.get(token, 1e6)) for token in vocabulary]
    kinds = [kind(token, special, model.get("unk_token")) for token in vocabulary]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    ends = config["eos_token_id"]
    end = ends[-1] if isinstance(ends, list) else ends
    writer.add_eos_token_id(end)
    # A template with a start token goes with a space before the first word.
    pieces = bool((described.get("post_processor") or {}).get("special_tokens"))
    # The server leaves the start token out of what it tells: it must be none that a text holds.
    writer.add_bos_token_id(config["bos_token_id"] if pieces else end)
    if pieces:
        writer.add_unk_token_id(0)
    writer.add_add_bos_token(pieces)
    writer.add_add_space_prefix(pieces)


def kind(token: str, special: set[str], unknown: str | None) -> int:
    if token == unknown and token in special:
        return gguf.TokenType.UNKNOWN
    if token in special:
        return gguf.TokenType.CONTROL
    byte = len(token) == 6 and token.startswith("<0x")
    return gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    settings = ModelSettings(model=sys.argv[2], model_alias="tiny", logits_all=True, n_ctx=128, n_threads=1)
    app = create_app(server_settings=ServerSettings(port=int(sys.argv[3])), model_settings=[settings])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
