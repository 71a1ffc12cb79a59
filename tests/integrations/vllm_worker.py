"""Requests through vLLM with the plugin, in an interpreter that has vLLM: a job as JSON on stdin, the result on stdout.

    python vllm_worker.py v1     Model Runner V1
    python vllm_worker.py v2     Model Runner V2, its kernels interpreted

Job: {"model": folder, "values": {name: folder}, "engine": {vllm.LLM's arguments},
      "calls": [{"prompts": [[ids]], "params": [{vllm.SamplingParams' arguments}]}]}
Result: {"calls": [[[token ids] of each completion] of each prompt], or {"error": text}], "preemptions": n,
         "held": sequences whose pages a value model still holds}
"""

from __future__ import annotations

import json
import os
import sys


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
        import triton_cpu  # noqa: F401
    import vllm

    from vas_engine.integrations.vllm import engine_args

    job = json.load(sys.stdin)
    _allow_async_scheduling()
    llm = vllm.LLM(
        job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        disable_log_stats=False,
        **{"enforce_eager": True, "async_scheduling": False, **job["engine"]},
        **engine_args(job["values"]),
    )
    assert llm.llm_engine.vllm_config.use_v2_model_runner == (sys.argv[1:] == ["v2"])
    calls = [_call(vllm, llm, call) for call in job["calls"]]
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    json.dump({"calls": calls, "preemptions": preemptions, "held": llm.collective_rpc(_count_held)[0]}, answers)
    answers.flush()


def _allow_async_scheduling() -> None:
    """vLLM's default, which it turns off on CPUs: the next step is scheduled before the last one's tokens are read."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def keep(config) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    current_platform.check_and_update_config = keep


def _count_held(worker) -> int:
    """Most sequences that a value model holds pages of."""
    from vas_engine.integrations.vllm import ValueLogitsProcessor

    runner = worker.model_runner
    batch = getattr(runner, "input_batch", None)  # V1's
    processors = batch.logitsprocs.non_argmax_invariant if batch else runner.sampler.logits_processors
    (ours,) = (each for each in processors if isinstance(each, ValueLogitsProcessor))
    return max(len(getattr(reader, "_sequences", ())) for reader, _ in ours._models)


def _call(vllm, llm, call: dict) -> list | dict:
    from vllm.exceptions import VLLMValidationError

    prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
    for options in call["params"]:
        if "logit_bias" in options:  # JSON has made texts of its keys
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    try:
        params = [vllm.SamplingParams(detokenize=False, **options) for options in call["params"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except VLLMValidationError as error:
        return {"error": str(error)}
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


if __name__ == "__main__":
    main()
