"""Blockwise best-of-K (controlled decoding; Mudgal et al. 2023): draw K blocks, keep the one of the highest value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from vas_engine import arguments
from vas_engine.evaluation.best_of_n import best_of_n_kl_bound
from vas_engine.evaluation.growing import Growing, finished_run, plant
from vas_engine.evaluation.measure import Meter, Run
from vas_engine.outputs import CompletionOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.sampling.noise import fork_seed

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["blockwise"]


def blockwise(
    llm: LLM,
    prompts: Sequence[str | Prompt],
    weights: Mapping[str, float],
    blocks: int,
    block_tokens: int,
    params: SamplingParams,
    *,
    samples: int = 16,
    seed: int = 0,
    use_tqdm: bool = False,
) -> Run:
    """Responses grown block by block.

    The base draws K blocks of M tokens, the one whose end has the highest weighted sum of values stays, and so on.
    Its divergence is not known; each block's is at most that of best-of-K, which gives the bound.

    Args:
        weights: value -> weight in the sum; only their ratios (and signs) matter.
        blocks: K. block_tokens: M.
        params: plain decoding: max_tokens and the like.

    Raises:
        InvalidArgumentError: fewer than one block or token, or values that are not loaded.
    """
    for name, number in (("blocks", blocks), ("block_tokens", block_tokens)):
        arguments.integer(name, number, 1)
    longest = params.max_tokens or llm.max_model_len
    responses = plant(llm, prompts, samples, seed)
    # A weight of 0 has the value computed and steers nothing: one row of the network a token.
    watched = params.replace(n=blocks, values=dict.fromkeys(weights, 0.0))
    bound = best_of_n_kl_bound(blocks)
    meter, number, sequences = Meter(llm), 0, 0
    with tqdm(total=len(responses), desc="blockwise", unit="response", disable=not use_tqdm) as bar:
        while growing := [response for response in responses if response.finish_reason is None]:
            settings = [
                watched.replace(
                    max_tokens=min(block_tokens, _room(llm, response, longest)), seed=fork_seed(response.seed, number)
                )
                for response in growing
            ]
            outputs = llm.generate([response.all_ids for response in growing], settings, use_tqdm=False)
            for response, output in zip(growing, outputs, strict=True):
                best = max(output.outputs, key=lambda block: _worth(block, weights))
                response.token_ids += best.token_ids
                response.log_prob += best.cumulative_logprob
                response.kl += bound
                if best.finish_reason == "stop":
                    response.finish_reason = "stop"
                elif _room(llm, response, longest) < 1:
                    response.finish_reason = "length"
                bar.update(response.finish_reason is not None)
            number += 1
            sequences += len(growing) * blocks
    return finished_run(llm, responses, meter, weights, sequences, "bound")


def _worth(block: CompletionOutput, weights: Mapping[str, float]) -> float:
    return sum(weight * block.values[name][-1] for name, weight in weights.items())


def _room(llm: LLM, response: Growing, longest: int) -> int:
    """Tokens that may still come."""
    return min(longest - len(response.token_ids), llm.max_model_len - len(response.all_ids))
