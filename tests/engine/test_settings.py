"""Any settings together: what comes out is what the definition says, whatever runs beside it.

Requests of random settings run in one batch, with prefixes shared, pages that do not suffice and prompts in chunks.
Every token, log-probability, value and divergence is held against full recomputation by tests/oracle.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from vas_engine.kernels.reference import gumbel_noise

from tests.engine.conftest import EOS, KINDS, VOCAB, distributional, llama, network
from tests.oracle import base_log_probs, guided_policy, head_outputs, next_logits
from vas_engine import LLM, SamplingParams
from vas_engine.values.config import HeadConfig

HEADS = (distributional(name="d"), HeadConfig("s"), HeadConfig("b", bounds=(-1.0, 1.5)))
HEAD_PLACES = {f"{kind}.{head.name}": (kind, place) for kind in KINDS for place, head in enumerate(HEADS)}


def networks(lm) -> dict:
    return {kind: network(kind, lm, HEADS, seed=i + 1) for i, kind in enumerate(KINDS)}


def maybe(rng: random.Random, chance: float, **options) -> dict:
    return {name: rng.choice(choices) for name, choices in options.items() if rng.random() < chance}


def settings(rng: random.Random) -> SamplingParams:
    options = {"seed": rng.randrange(2**64), "max_tokens": rng.choice([3, 6]), "n": rng.choice([1, 2, 3])}
    options |= maybe(rng, 0.3, temperature=[0.0, 0.5, 1.7], ignore_eos=[True], min_tokens=[2], stop_token_ids=[[3, 7]])
    options |= maybe(rng, 0.2, top_k=[1, 5], top_p=[0.3, 0.9], min_p=[0.02, 0.2])
    options |= maybe(rng, 0.3, repetition_penalty=[0.7, 1.3], frequency_penalty=[-0.8, 0.8], presence_penalty=[0.8])
    options |= maybe(rng, 0.3, logit_bias=[{rng.randrange(VOCAB): -math.inf, rng.randrange(VOCAB): 3.0}])
    options |= maybe(rng, 0.5, logprobs=[0, 3, VOCAB], report_kl=[True], prune=[False])
    if rng.random() < 0.85:
        tilt = rng.choice(["mean", "mean", "optimal"])
        names = [name for name in HEAD_PLACES if tilt == "mean" or name.endswith(".d")]
        asked = rng.sample(names, rng.choice([1, 2, 3]))
        options |= {"values": {name: rng.choice([2.0, -1.5, 0.5, -4.0, 0.0]) for name in asked}, "tilt": tilt}
        options |= {"baseline": rng.choice(["state", "candidate-mean"]), "tail": rng.choice(["keep", "drop"])}
        options |= {"num_candidates": rng.choice([1, 4, VOCAB])} | maybe(rng, 0.5, advantage_clip=[0.05, 0.5, 2.0])
    return SamplingParams(**options)


class Definition:
    """What section 2 of the design says of one completion, a token at a time."""

    def __init__(self, lm, nets: dict, params: SamplingParams, prompt: list[int], seed: int) -> None:
        self.lm, self.nets, self.params, self.seed = lm, nets, params, seed
        self.prefix, self.prompt_len = list(prompt), len(prompt)
        self.ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})

    def base_and_policy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi0 and log pi of the next token."""
        params = self.params
        if len(self.prefix) - self.prompt_len < params.min_tokens:
            banned = dict.fromkeys(self.ends, -math.inf)
            params = params.replace(logit_bias={**params.logit_bias, **banned})
        base = base_log_probs(next_logits(self.lm, [self.prefix])[0], params, self.prefix, self.prompt_len)
        if not params.values:
            return base, base
        heads = {name: (self.nets[kind], place) for name, (kind, place) in HEAD_PLACES.items()}
        return base, guided_policy(self.lm, heads, params, self.prefix, self.prompt_len).log()

    def value(self, name: str, after: list[int]) -> float:
        kind, place = HEAD_PLACES[name]
        net = self.nets[kind]
        return net.heads.mean(head_outputs(self.lm, net, [[*self.prefix, *after]]))[0, place].item()

    def scores(self, policy: torch.Tensor) -> torch.Tensor:
        if self.params.temperature == 0:
            return policy
        return policy + gumbel_noise(self.seed, len(self.prefix), torch.arange(VOCAB))


def near(number: float):
    return pytest.approx(number, abs=5e-4)


def compare(completion, definition: Definition) -> int:
    """Every token of a completion with the definition."""
    params = definition.params
    total = tilted = divergence = 0.0
    assert completion.values.keys() == (params.values or {}).keys()
    for place, token in enumerate(completion.token_ids):
        base, policy = definition.base_and_policy()
        scores = definition.scores(policy)
        assert scores[token] >= scores.max() - 1e-4, (params, place)
        for name in params.values:
            assert completion.values[name][place] == near(definition.value(name, [token]))
            if place == 0:
                assert completion.prompt_values[name] == near(definition.value(name, []))
        total, tilted = total + base[token].item(), tilted + policy[token].item()
        divergence += torch.where(policy > -math.inf, policy.exp() * (policy - base), 0.0).nansum().item()
        if params.logprobs is not None:
            entries = completion.logprobs[place]
            support = int((base > -math.inf).sum())
            best = set(base.topk(min(params.logprobs, support)).indices.tolist())
            assert set(entries) == best | {token}, (params, place)
            for other, entry in entries.items():
                assert (entry.logprob, entry.tilted_logprob) == (near(base[other].item()), near(policy[other].item()))
        definition.prefix.append(token)
        ended = token in definition.ends or place + 1 == params.max_tokens
        assert ended == (place + 1 == len(completion.token_ids)), (params, place)
    assert completion.cumulative_logprob == near(total)
    if completion.cumulative_tilted_logprob is not None or params.exact or not params.values:
        assert completion.cumulative_tilted_logprob == near(tilted)
    if params.report_kl:
        assert completion.kl == pytest.approx(divergence, abs=5e-4, rel=1e-3)
    return len(completion.token_ids)


@pytest.mark.parametrize("number", range(8))
def test_any_settings_together(lm, number: int) -> None:
    rng = random.Random(number)
    own = llama()
    llm = LLM(
        own.model,
        networks(own),
        skip_tokenizer_init=True,
        device="cpu",
        max_model_len=48,
        max_num_seqs=rng.choice([2, 16]),
        max_num_batched_tokens=rng.choice([40, 512]),
        block_size=rng.choice([1, 4, 16]),
        kv_cache_memory=rng.choice([260_000, 4_000_000]),
    )
    start = [rng.randrange(EOS) for _ in range(17)]
    prompts = [
        start[: rng.choice([0, 16, 17])] + [rng.randrange(EOS) for _ in range(rng.choice([1, 7]))] for _ in range(8)
    ]
    asked = [settings(rng) for _ in prompts]
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    nets = networks(lm)
    for prompt, params, output in zip(prompts, asked, outputs, strict=True):
        for completion in output.outputs:
            compare(completion, Definition(lm, nets, params, prompt, completion.seed))
    llm.engine.scheduler.check()
