"""Responses that methods put together from many requests to the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vas_engine.evaluation.flops import decoding_flops
from vas_engine.evaluation.measure import Meter, Response, Run, networks_of, spelled
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.sampling.noise import fork_seed

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["Growing", "finished_run", "plant"]


@dataclass
class Growing:
    """A response on its way.

    Attributes:
        prompt: its prompt's place in the list. prompt_ids: that prompt. seed: of its own.
        token_ids: chosen so far. log_prob: of them under the base. kl: see `Response`.
        finish_reason: None while it grows.
    """

    prompt: int
    prompt_ids: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    kl: float = 0.0
    finish_reason: str | None = None

    @property
    def all_ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids


def plant(llm: LLM, prompts: Sequence[str | Prompt], samples: int, seed: int) -> list[Growing]:
    """Empty responses, prompt by prompt."""
    encoded = [prompt.encode(llm.tokenizer) for prompt in read_prompts(list(prompts))]
    return [
        Growing(place, ids, fork_seed(fork_seed(seed, place + 1), sample))
        for place, ids in enumerate(encoded)
        for sample in range(samples)
    ]


def finished_run(
    llm: LLM, responses: Sequence[Growing], meter: Meter, values: Iterable[str], sequences: int, kl_kind: str
) -> Run:
    """The run of responses that are done, at the meter's cost.

    Args:
        sequences: that the engine decoded for it, a request's samples counted apart. All rows of the base but those
            of the tokens they went on from (or that were looked ahead to) were prompts, what is grown included.
    """
    networks = networks_of(llm, values)
    lookahead = any(network.input == "lookahead" for network in networks)
    decoded = meter.value_rows if lookahead else meter.tokens - sequences
    return Run(
        [
            Response(
                response.prompt,
                spelled(llm, response.prompt_ids, response.token_ids, str(response.finish_reason)),
                response.token_ids,
                str(response.finish_reason),
                response.log_prob,
                response.kl,
            )
            for response in responses
        ],
        meter.seconds,
        meter.tokens,
        meter.model_rows,
        meter.value_rows,
        decoding_flops(
            llm.lm,
            networks,
            model_rows=meter.model_rows,
            tokens=meter.tokens,
            value_rows=meter.value_rows,
            prompt_rows=max(meter.model_rows - decoded, 0),
        ),
        kl_kind,
    )
