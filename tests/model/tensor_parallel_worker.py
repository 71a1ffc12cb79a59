"""One rank of `test_tensor_parallel`: argument 1 is a folder; what it finds goes to rank-R-of-N.json in there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.integrations.test_documentation import examples
from vas_engine import LLM, SamplingParams
from vas_engine.errors import UnsupportedModelError, VASError
from vas_engine.evaluation.likelihood import likelihoods
from vas_engine.model import CausalLM

KINDS = ("action", "reader", "side", "lookahead", "side-lookahead", "model", "odd")
OTHERS = ("qwen3", "mistral", "gemma2", "gpt_neox")
PROMPTS = [[3, 4, 5], [1], [7, 7, 2, 9, 8, 1, 3], [10, 4]]


def observe(folder: Path, size: int) -> dict[str, Any]:
    """Texts, values and likelihoods of a model with a value of every kind, and logits of models of other makes."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"tensor_parallel_size": size, "skip_tokenizer_init": True, "block_size": 4}
    llm = LLM(folder / "base", {kind: folder / kind for kind in KINDS}, kv_cache_memory="2MiB", **options)
    seen: list[torch.Tensor] = []
    run = llm.lm.logits

    def logits(states: torch.Tensor) -> torch.Tensor:
        seen.append(run(states).clone())
        return seen[-1]

    llm.lm.logits = logits  # type: ignore[method-assign]
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    guided = plain.replace(num_candidates=5, n=2)
    params = [guided.replace(values={kind: 2.0}, seed=place) for place, kind in enumerate(KINDS)]
    prompts = [PROMPTS[place % 4] for place in range(len(params))]
    outputs = llm.generate([*prompts, *PROMPTS], [*params, *[plain.replace(seed=5)] * 4], use_tqdm=False)
    logit_rows = torch.cat([part.flatten() for part in seen])
    unseeded = llm.generate(PROMPTS, plain, use_tqdm=False)
    texts = [output.outputs[0].token_ids for output in outputs]
    documented: dict[str, Any] = {"MODEL": str(folder / "text"), "VALUE": str(folder / "kind")}
    if size > 1:
        exec(examples("tensor_parallel.md"), documented)
    different = None
    try:
        llm.generate([[3]], plain.replace(seed=int(os.environ.get("RANK", "0"))), use_tqdm=False)
    except VASError as error:
        different = str(error)
    refused = False
    if size > 1:
        try:
            llm.lm.compile()
        except UnsupportedModelError:
            refused = True
    likely = [likelihoods(llm, [p], [t], q) for p, t, q in zip(prompts, texts, params, strict=False)]
    # Few pages: requests are preempted and begin again.
    few = LLM(folder / "base", {"side": folder / "side"}, kv_cache_memory="64KiB", max_model_len=32, **options)
    squeezed = few.generate(PROMPTS, params[KINDS.index("side")].replace(n=4, max_tokens=20), use_tqdm=False)
    last = {}
    for name in OTHERS:
        lm = CausalLM.load(folder / name, dtype="float32", tensor_parallel_size=size)
        last[name] = lm.dense(torch.tensor([PROMPTS[2]]), logits=True).logits
    save_file({"logits": logit_rows, **last}, folder / f"rank-{os.environ.get('RANK', '0')}-of-{size}.safetensors")
    return {
        "tokens": [[completion.token_ids for completion in output.outputs] for output in outputs],
        "values": [list(output.outputs[0].values.values()) for output in outputs],
        "likelihoods": [found[0].log_prob for found in likely],
        "unseeded": [output.outputs[0].token_ids for output in unseeded],
        "squeezed": [[completion.token_ids for completion in output.outputs] for output in squeezed],
        "preemptions": few.engine.scheduler.num_preemptions,
        "documented": documented["output"].token_ids if size > 1 else [],
        "different": different,
        "compile_refused": refused,
        "heads": [spec.kv_heads for spec in llm.lm.layers],
        "value_heads": {kind: [shape.kv_heads for shape in llm.values[kind].cache_layers] for kind in ("model", "odd")},
        "digest": hashlib.sha256(logit_rows.numpy().tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    (place / f"rank-{rank}-of-{ranks}.json").write_text(json.dumps(observe(place, ranks)))
