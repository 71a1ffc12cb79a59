"""Fine-tuned policies: another model of the same vocabulary, measured against the base it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.dense import log_probs, sequence_kl
from vas_engine.evaluation.measure import Run, run
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["sample_policy"]


def sample_policy(
    base: LLM,
    folder: str | Path,
    prompts: Sequence[str | Prompt],
    params: SamplingParams,
    *,
    samples: int = 16,
    seed: int = 0,
    use_tqdm: bool = False,
    **options: Any,
) -> Run:
    """Sample a fine-tuned model by the engine; divergence and likelihood by dense forwards of both models.

    Args:
        base: the model it was fine-tuned from.
        folder: of the policy, a Hugging Face model.
        params: plain decoding.
        options: for `LLM`.

    Raises:
        InvalidArgumentError: another vocabulary than the base's.
    """
    from vas_engine.llm import LLM

    policy = LLM(str(folder), tokenizer=base.tokenizer, **options)
    if policy.lm.vocab_size != base.lm.vocab_size:
        fix = f"it has {policy.lm.vocab_size} tokens, the base {base.lm.vocab_size}; give a model tuned from this base"
        raise InvalidArgumentError("policy", str(folder), fix)
    [found] = run(policy, prompts, [params], samples=samples, seed=seed, use_tqdm=use_tqdm)
    encoded = [prompt.encode(base.tokenizer) for prompt in read_prompts(list(prompts))]
    prompt_ids = [encoded[response.prompt] for response in found.responses]
    responses = [response.token_ids for response in found.responses]
    likelihoods = log_probs(base.lm, prompt_ids, responses)
    divergences = sequence_kl(policy.lm, base.lm, prompt_ids, responses)
    found.responses = [
        replace(response, log_prob=log_prob, kl=kl)
        for response, log_prob, kl in zip(found.responses, likelihoods, divergences, strict=True)
    ]
    found.kl_kind = "exact"
    return found
