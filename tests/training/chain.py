"""A decision problem small enough to solve: a random language model of few tokens and a short horizon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vas_engine.model.lm import CausalLM
from vas_engine.training.rollouts import Header, Rollout, Rollouts

VOCABULARY, EOS, HORIZON = 6, 0, 4
PROMPT = (1, 2)


def build_lm() -> CausalLM:
    """A random Llama; its logits are spread enough to matter and end a third or so of the responses early."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return CausalLM.load(LlamaForCausalLM(config), device="cpu", dtype="float32")


def reward(response: tuple[int, ...]) -> float:
    """Depends on order and on how it ends: not a sum over tokens."""
    total = sum((2.0 if place % 2 else -1.0) * (token == 3) for place, token in enumerate(response))
    total += 1.5 * (4 in response and 5 in response)
    return total + (3.0 if response and response[-1] == EOS else 0.0)


@dataclass
class Solution:
    """Exact values (γ = 1) and probabilities of reaching every response prefix."""

    values: dict[tuple[int, ...], float]
    reach: dict[tuple[int, ...], float]
    policy: dict[tuple[int, ...], torch.Tensor]


@torch.no_grad()
def solve(lm: CausalLM) -> Solution:
    """Dynamic programming over all prefixes, from the longest to the empty one."""
    levels: list[list[tuple[int, ...]]] = [[()]]
    policy: dict[tuple[int, ...], torch.Tensor] = {}
    reach = {(): 1.0}
    for _ in range(HORIZON):
        open_ = [prefix for prefix in levels[-1] if not prefix or prefix[-1] != EOS]
        tokens = torch.tensor([[*PROMPT, *prefix] for prefix in open_])
        logits = lm.dense(tokens, logits=True).logits[:, -1].double()
        levels.append([])
        for prefix, probabilities in zip(open_, logits.softmax(-1), strict=True):
            policy[prefix] = probabilities
            for token in range(VOCABULARY):
                child = (*prefix, token)
                reach[child] = reach[prefix] * float(probabilities[token])
                levels[-1].append(child)
    values: dict[tuple[int, ...], float] = {}
    for level in reversed(levels):
        for prefix in level:
            if prefix in policy:
                children = [values[(*prefix, token)] for token in range(VOCABULARY)]
                values[prefix] = float(policy[prefix] @ torch.tensor(children, dtype=torch.float64))
            else:
                values[prefix] = reward(prefix)
    return Solution(values, reach, policy)


def sample(lm: CausalLM, solution: Solution, count: int, seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for index in range(count):
        response: tuple[int, ...] = ()
        while response in solution.policy:
            token = torch.multinomial(solution.policy[response], 1, generator=generator)
            response = (*response, int(token))
        reason = "stop" if response[-1] == EOS else "length"
        rewards = {"points": reward(response), "length": float(len(response))}
        rollouts.append(Rollout("", "", list(PROMPT), list(response), reason, index, 0, rewards))
    return Rollouts(Header(lm.fingerprint(), {}, {name: {"bounds": None} for name in rewards}), rollouts)


@torch.no_grad()
def predict(lm: CausalLM, network, prefixes: list[tuple[int, ...]]) -> torch.Tensor:
    """V of the network after each response prefix, [prefixes, heads]."""
    width = max(map(len, prefixes)) + len(PROMPT)
    tokens = torch.zeros(len(prefixes), width, dtype=torch.int64)
    lengths = torch.tensor([len(PROMPT) + len(prefix) for prefix in prefixes])
    for row, prefix in enumerate(prefixes):
        tokens[row, : lengths[row]] = torch.tensor([*PROMPT, *prefix])
    values = network.heads.mean(network.train_values(lm, tokens, lengths))
    return values[torch.arange(len(prefixes)), lengths - 1].double()
