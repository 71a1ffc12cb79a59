"""A decision problem small enough to solve: a random language model of few tokens and a short horizon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vas_engine.model.lm import CausalLM
from vas_engine.training.rollouts import Header, Rollout, Rollouts
from vas_engine.values.config import HeadConfig, Support, ValueConfig
from vas_engine.values.heads import Heads

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


def sample(
    lm: CausalLM, solution: Solution, count: int, seed: int = 0, strength: float = 0.0, every: int = 0
) -> Rollouts:
    """Responses of the model, or of its policy tilted by ``strength`` times the exact values, with log-ratios; with
    rewards of their beginnings, ``every`` so many tokens.

    Every response comes as often as it should, up to one (systematic sampling): the returns of few rollouts are
    then as good as those of many.
    """
    policy = {prefix: _tilted(solution, prefix, strength) for prefix in solution.policy}
    ends = [prefix for prefix in solution.values if prefix not in policy]
    chances = torch.stack([torch.stack([policy[e[:i]][e[i]] for i in range(len(e))]).prod() for e in ends])
    generator = torch.Generator().manual_seed(seed)
    marks = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    chosen = torch.searchsorted(chances.cumsum(0) / chances.sum(), marks)[torch.randperm(count, generator=generator)]
    rollouts = []
    for index, place in enumerate(chosen.tolist()):
        response = ends[place]
        reason = "stop" if response[-1] == EOS else "length"
        rewards = {"points": reward(response), "length": float(len(response))}
        steps = [(response[:i], token) for i, token in enumerate(response)]
        ratios = [float((policy[prefix][token] / solution.policy[prefix][token]).log()) for prefix, token in steps]
        given = {"log_ratio": sum(ratios), "log_ratios": ratios} if strength else {}
        if every:
            parts = [response[:cut] for cut in range(every, len(response), every)]
            given |= {"partial_rewards": {"points": list(map(reward, parts)), "length": [float(len(p)) for p in parts]}}
        rollouts.append(Rollout("", "", list(PROMPT), list(response), reason, index, 0, rewards, **given))
    settings = {"partial_rewards": every, "max_tokens": HORIZON} if every else {}
    return Rollouts(Header(lm.fingerprint(), settings, {name: {"bounds": None} for name in rewards}), rollouts)


def _tilted(solution: Solution, prefix: tuple[int, ...], strength: float) -> torch.Tensor:
    values = torch.tensor([solution.values[(*prefix, token)] for token in range(VOCABULARY)])
    return (solution.policy[prefix].log() + strength * values).softmax(-1)


class ExactValue(torch.nn.Module):
    """The exact values as a value, to teach with; one head, which may give them as a distribution over two atoms."""

    def __init__(self, solution: Solution, support: Support | None = None) -> None:
        super().__init__()
        head = HeadConfig("points", "points", support=support)
        self.config = ValueConfig(kind="action", heads=(head,), hidden_size=32, vocab_size=6, states=(2,), width=1)
        self.heads = Heads(self.config, 1)
        self.solution, self.states = solution, ()

    def train_values(self, lm, tokens, lengths, branches=None):
        width = len(PROMPT)
        rows = tokens[:, None].expand(-1, tokens.shape[1], -1)
        texts = [[row[: p + 1] for p, row in enumerate(sequence)] for sequence in rows.tolist()]
        if branches is not None:
            pairs = zip(tokens.tolist(), branches.places.tolist(), branches.token_ids.tolist(), strict=True)
            for text, (row, places, candidates) in zip(texts, pairs, strict=True):
                text += [[*row[: p + 1], token] for p, group in zip(places, candidates, strict=True) for token in group]
        # What is no state (padding, half a prompt) has no value.
        values = [[self.solution.values.get(tuple(text[width:]), 0.0) for text in line] for line in texts]
        found = torch.tensor(values)
        if self.heads.configs[0].support is None:
            return found[..., None]
        return self.heads.two_hot(0, found).clamp_min(1e-9).log()


def unexplained(lm: CausalLM, network, solution: Solution, ends: int | None = None) -> float:
    """Share of the exact values' variance that the network misses, by how often states are reached."""
    prefixes = [p for p in solution.values if ends is None or (p and p[-1] == ends)]
    exact = torch.tensor([solution.values[p] for p in prefixes], dtype=torch.float64)
    weight = torch.tensor([solution.reach[p] for p in prefixes], dtype=torch.float64)
    weight /= weight.sum()
    found = predict(lm, network, prefixes)[:, 0]
    mean = weight @ exact
    return float((weight @ (found - exact).square()) / (weight @ (exact - mean).square()))


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
