"""Tiny random base models, networks of every kind over them, and a driver that pages rows like an engine."""

from __future__ import annotations

import copy
import itertools

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from vas_engine.model import AttentionBatch, CausalLM
from vas_engine.values import HeadConfig, Support, ValueConfig, ValueModel, ValueNetwork

VOCAB = 61
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0),
    "gpt_neox": GPTNeoXConfig(**NEOX),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
KINDS = ["action", "reader", "side", "lookahead", "side-lookahead"]
HEADS = (
    HeadConfig("plain", mean=0.5, std=2.0),
    HeadConfig("bounded", bounds=(-1.0, 3.0)),
    HeadConfig("dist", support=Support(-2.0, 2.0, 7)),
)


def random_model(name: str, seed: int = 3, scale: float = 3.0):
    """An eager model whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.requires_grad_(False)


def base_model(name: str, seed: int = 3, dtype: str = "float32") -> CausalLM:
    """The same model, paged."""
    return CausalLM.load(random_model(name, seed), device="cpu", dtype=dtype)


def network_config(kind: str, lm: CausalLM, heads: tuple[HeadConfig, ...] = HEADS) -> ValueConfig:
    """Settings that use everything a kind has; the last layer of the base comes before an earlier one."""
    spec = lm.layers[0]
    extra = {}
    if kind == "reader":
        extra = {
            "layers": (2, 1),
            "queries": 2 * spec.kv_heads,
            "head_dim": spec.head_dim,
            "mlp": 20,
        }
    elif kind.startswith("side"):
        extra = {"depth": 2, "num_heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 20}
    return ValueConfig(
        kind=kind,
        heads=heads,
        hidden_size=lm.hidden_size,
        vocab_size=lm.vocab_size,
        states=(3, 1),
        width=12,
        head_hidden=10,
        **extra,
    )


def randomise(module: torch.nn.Module, seed: int = 5) -> None:
    """Weights so large that no part of a network can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / fan**0.5)


def make_network(kind: str, lm: CausalLM, heads: tuple[HeadConfig, ...] = HEADS):
    """A bound random network; kind "model" gets another random LM of the same vocabulary as backbone."""
    if kind == "model":
        other = CausalLM.load(random_model("llama", seed=8), device="cpu", dtype=lm.dtype)
        network = ValueModel.create(other, lm, heads)
        randomise(network.heads)
        return network.eval()
    network = ValueNetwork(network_config(kind, lm, heads))
    randomise(network)
    return network.bind(lm).eval()


def dense_outputs(network, lm: CausalLM, tokens: list[int]) -> torch.Tensor:
    """Head output [T, O] of all prefixes of one sequence, uncached."""
    with torch.no_grad():
        return network.train_values(lm, torch.tensor([tokens]), torch.tensor([len(tokens)]))[0]


class Driver:
    """Several sequences over pages, fed in chunks, with candidates and commits, as an engine would."""

    def __init__(self, lm: CausalLM, network, prompts: list[list[int]], block_size: int = 4) -> None:
        self.lm, self.network, self.block_size = lm, network, block_size
        blocks = 16
        lm.allocate(blocks * len(prompts), block_size)
        network.allocate(blocks * len(prompts), block_size)
        order = torch.randperm(blocks * len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [order[i * blocks : (i + 1) * blocks] for i in range(len(prompts))]
        self.tokens = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        width = len(network.states) * lm.hidden_size
        self.carry = [torch.zeros(width) for _ in prompts]

    def batch(self, members: list[int], places: list[list[int]], slotted: bool) -> AttentionBatch:
        return AttentionBatch.from_sequences(
            [self.tables[m] for m in members], places, [slotted] * len(members), self.block_size
        )

    def states(self, tokens: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """The base's forward; the network's states side by side, [R, S * H]."""
        out = self.lm.forward(tokens, batch, states=self.network.states)
        parts = [out.hidden[index] for index in self.network.states]
        return torch.cat(parts, -1) if parts else torch.zeros(len(tokens), 0)

    def feed(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """Runs the next ``counts[m]`` known tokens of each member; member -> head output of those rows."""
        members = list(counts)
        places = [list(range(self.done[m], self.done[m] + counts[m])) for m in members]
        tokens = torch.tensor([self.tokens[m][p] for m, ps in zip(members, places, strict=True) for p in ps])
        batch = self.batch(members, places, True)
        after = self.states(tokens, batch)
        start, before = 0, []
        for m in members:
            part = after[start : start + counts[m]]
            before += [self.carry[m], *part[:-1]]
            self.carry[m] = part[-1]
            start += counts[m]
            self.done[m] += counts[m]
        hidden, index = None, None
        if self.network.input != "token":
            hidden = torch.stack(before) if self.network.input == "action" else after
            index = torch.arange(len(tokens))
        output = self.network.score(tokens, hidden, index, batch)
        return dict(zip(members, output.split([counts[m] for m in members]), strict=True))

    def score(self, candidates: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Head outputs of candidates behind each member."""
        members = list(candidates)
        places = [[len(self.tokens[m])] * len(candidates[m]) for m in members]
        tokens = torch.tensor(list(itertools.chain.from_iterable(candidates.values())))
        batch = self.batch(members, places, False)
        owner = [i for i, m in enumerate(members) for _ in candidates[m]]
        hidden, index = None, None
        if self.network.input == "action":
            hidden, index = torch.stack([self.carry[m] for m in members]), torch.tensor(owner)
        elif self.network.input == "lookahead":
            hidden, index = self.states(tokens, batch), torch.arange(len(tokens))
            self.looked = hidden
        output = self.network.score(tokens, hidden, index, batch)
        self.rows = {m: [r for r, i in enumerate(owner) if members[i] == m] for m in members}
        self.candidates = candidates
        return {m: output[rows] for m, rows in self.rows.items()}

    def commit(self, winners: dict[int, int]) -> None:
        """Keeps candidate ``winners[m]`` (its place among the candidates) of each member."""
        rows = torch.tensor([self.rows[m][w] for m, w in winners.items()])
        places = [len(self.tokens[m]) for m in winners]
        slots = torch.tensor(
            [
                self.tables[m][p // self.block_size] * self.block_size + p % self.block_size
                for m, p in zip(winners, places, strict=True)
            ]
        )
        self.network.commit(rows, slots)
        lookahead = self.network.input == "lookahead"
        if lookahead:
            self.lm.commit(rows, slots)
        for m, w in winners.items():
            self.tokens[m].append(self.candidates[m][w])
            self.done[m] += 1
        if lookahead:
            for m, row in zip(winners, rows.tolist(), strict=True):
                self.carry[m] = self.looked[row]
            return
        tokens = torch.tensor([self.tokens[m][-1] for m in winners])
        after = self.states(tokens, self.batch(list(winners), [[p] for p in places], True))
        for m, state in zip(winners, after, strict=True):
            self.carry[m] = state


def sequence(length: int, seed: int) -> list[int]:
    """Random tokens."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_paged_equals_dense(lm: CausalLM, network) -> None:
    """Ragged prompts in chunks, several candidates a member, a commit, and candidates again."""
    driver = Driver(lm, network, [sequence(9, 2), sequence(1, 3), sequence(4, 4)])
    found: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for counts in ({0: 5, 1: 1}, {2: 3, 0: 1}, {0: 3, 2: 1}):
        for member, output in driver.feed(counts).items():
            found[member].append(output)
    # A reader's row in the middle of a prompt sees the same pages as at its end.
    for member, parts in found.items():
        expected = dense_outputs(network, lm, driver.tokens[member])
        torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=TOLERANCE)
    for round_, winners in enumerate([{0: 2, 1: 0, 2: 1}, {2: 0, 0: 1}, None]):
        candidates = {0: sequence(4, 10 + round_), 1: sequence(2, 20), 2: sequence(3 + round_, 30 + round_)}
        for member, output in driver.score(candidates).items():
            for row, token in enumerate(candidates[member]):
                expected = dense_outputs(network, lm, [*driver.tokens[member], token])[-1]
                torch.testing.assert_close(output[row], expected, atol=TOLERANCE, rtol=TOLERANCE)
        if winners:
            driver.commit(winners)
