"""Requests through vLLM with the plugin, in an interpreter that has vLLM: a job as JSON on stdin, the result on stdout.

    python vllm_worker.py        Model Runner V1, the whole of vLLM
    python vllm_worker.py v2     the processor alone through V2's interface, rows moved and slots recycled by hand:
                                 Runner V2 itself needs a GPU

Job: {"model": folder, "values": {name: folder}, "engine": {vllm.LLM's arguments},
      "calls": [{"prompts": [[ids]], "params": [{vllm.SamplingParams' arguments}]}]}
Result: {"calls": [[[token ids] of each completion] of each prompt], or {"error": text}], "preemptions": n}
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints goes to stderr
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if sys.argv[1:] == ["v2"]:
        json.dump(_run_v2(json.load(sys.stdin)), answers)
        return answers.flush()
    import vllm

    from vas_engine.integrations.vllm import engine_args

    job = json.load(sys.stdin)
    llm = vllm.LLM(
        job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        disable_log_stats=False,
        **{"enforce_eager": True, **job["engine"]},
        **engine_args(job["values"]),
    )
    calls = [_call(vllm, llm, call) for call in job["calls"]]
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    json.dump({"calls": calls, "preemptions": preemptions}, answers)
    answers.flush()


def _call(vllm, llm, call: dict) -> list | dict:
    from vllm.exceptions import VLLMValidationError

    prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
    try:
        params = [vllm.SamplingParams(detokenize=False, **options) for options in call["params"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except VLLMValidationError as error:
        return {"error": str(error)}
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def _run_v2(job: dict) -> dict:
    """Two slots for all requests: one at the front of the batch is replaced when it ends, another is preempted once,
    and every other step the rows change places."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

    from vas_engine.integrations.vllm import ValueLogitsProcessor, register

    register()  # as vLLM does by the entry point, before it makes the model
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    settings = SimpleNamespace(
        model=job["model"],
        tokenizer=job["model"],
        revision=None,
        dtype=torch.float32,
        head_dtype=torch.float32,
        hf_config=model.config,
        get_vocab_size=lambda: model.config.vocab_size,
    )
    config = SimpleNamespace(
        additional_config={"vas_values": job["values"]}, model_config=settings, speculative_config=None
    )
    with set_current_vllm_config(config):
        make_logits = LogitsProcessor(model.config.vocab_size)
    make_logits._get_logits = lambda states, head, bias, skip: head(states)  # their product needs a running engine
    slots = 2
    states = LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=slots,
        vocab_size=model.config.vocab_size,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, 128, dtype=torch.int32)),
        prompt_len=SimpleNamespace(np=np.zeros(slots, np.int32)),
        prefill_len=SimpleNamespace(np=np.zeros(slots, np.int32)),
        total_len=SimpleNamespace(gpu=torch.zeros(slots, dtype=torch.int32)),
    )
    processor = ValueLogitsProcessor(config, states)
    call = job["calls"][0]
    waiting = [
        SimpleNamespace(index=i, params=SamplingParams(**options), prompt=prompt, tokens=list(prompt), preempted=False)
        for i, (prompt, options) in enumerate(zip(call["prompts"], call["params"], strict=True))
    ]
    results: list = [None] * len(waiting)
    running: dict[int, SimpleNamespace] = {}

    def enter(slot: int, request: SimpleNamespace) -> None:
        running[slot] = request
        states.all_token_ids.gpu[slot, : len(request.tokens)] = torch.tensor(request.tokens, dtype=torch.int32)
        states.prompt_len.np[slot], states.prefill_len.np[slot] = len(request.prompt), len(request.tokens)
        assert processor.add_request(slot, request.params) == bool(request.params.extra_args)

    step = 0
    while waiting or running:
        for slot in set(range(slots)) - running.keys():
            if waiting:
                enter(slot, waiting.pop(0))
        order = sorted(running, reverse=bool(step % 2))
        with torch.no_grad():
            states_of = [model.model(torch.tensor([running[s].tokens])).last_hidden_state[0, -1] for s in order]
            logits = make_logits(model.lm_head, torch.stack(states_of))
        mapping = torch.tensor(order)
        context = LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=np.array(order),
            expanded_local_pos=torch.zeros(len(order), dtype=torch.int64),
            input_ids=torch.tensor([running[s].tokens[-1] for s in order]),
            pos=torch.tensor([len(running[s].tokens) - 1 for s in order]),
            seq_lens_upper_bound_np=np.array([len(running[s].tokens) for s in order]),
        )
        left = processor.apply(logits.clone(), context)
        for row, (slot, before) in enumerate(zip(order, logits, strict=True)):
            request = running[slot]
            if not request.params.extra_args:
                assert torch.equal(left[row], before)
            request.tokens.append(int(left[row].argmax()))
            states.all_token_ids.gpu[slot, len(request.tokens) - 1] = request.tokens[-1]
            made = len(request.tokens) - len(request.prompt)
            if made == request.params.max_tokens:
                results[request.index] = [request.tokens[len(request.prompt) :]]
                del running[slot]
            elif made == 5 and not request.preempted:
                request.preempted = True
                waiting.append(running.pop(slot))
        step += 1
    # All have gone through, and no more pages are held than the last step's requests need.
    assert all(len(getattr(reader, "_sequences", ())) <= slots for reader, _ in processor._models)
    return {"calls": [results], "preemptions": len(results)}


if __name__ == "__main__":
    main()
