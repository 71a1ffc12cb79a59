"""Decoding by vLLM in an interpreter of its own; started by benchmarks.decode, with that interpreter.

    python vllm_worker.py MODEL_FOLDER MAX_MODEL_LEN MAX_NUM_SEQS [VALUE_FOLDER]

One JSON object a line: on stdin {"prompts": [[ids]], "new_tokens": n, "temperature": t, "seed": s, "extra_args": ...},
on stdout first {"versions": {...}}, then for each request {"seconds": s, "tokens": n}. Imports nothing of this
repository; with a value, vLLM finds the plugin by its entry points.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TextIO


def main() -> None:
    folder, max_model_len, max_num_seqs, *values = sys.argv[1:]
    answers = _private_stdout()
    # vLLM reads these when it is imported: no second process, no network, a KV cache of 1 GiB.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import vllm

    llm = vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=int(max_model_len),
        max_num_seqs=int(max_num_seqs),
        enable_prefix_caching=False,
        additional_config={"vas_values": {"reward": values[0]}} if values else {},
    )
    _answer(answers, {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}})
    for line in sys.stdin:
        _answer(answers, _generate(vllm, llm, json.loads(line)))


def _generate(vllm, llm, request: dict) -> dict:
    params = [
        vllm.SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["new_tokens"],
            ignore_eos=True,
            detokenize=False,
            seed=request["seed"] + index if request["extra_args"] else None,
            extra_args=request["extra_args"],
        )
        for index in range(len(request["prompts"]))
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(out.outputs[0].token_ids) for out in outputs)}


def _private_stdout() -> TextIO:
    """The stdout we were given; whatever else prints from now on goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _answer(stream: TextIO, record: dict) -> None:
    stream.write(json.dumps(record) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
