"""A reader over the candidates of a step: by its parts, as the engine's steps run them, and as one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from vas_engine.kernels import function
from vas_engine.kernels.reference import SelectionTensors, ValueSettings, ValueTilt

from benchmarks.gpu_decode import MODELS, dummy_model
from vas_engine.engine.cost import network_config
from vas_engine.model import AttentionBatch, CausalLM
from vas_engine.values import ValueNetwork
from vas_engine.values.network import place_features


@cache
def base_and_reader(shape: str, device: torch.device) -> tuple[CausalLM, ValueNetwork]:
    """The reader that goes with a shape, bound to a base of those layers that it looks at and no others."""
    config = network_config(MODELS[shape], "reader")
    looks = len(config.layers)
    base = dummy_model(replace(MODELS[shape], layers=looks), device, positions=2**14)
    lm = CausalLM.load(base, device=device)
    torch.manual_seed(1)
    config = config.replace(layers=range(looks), states=(looks // 2, looks))
    return lm, ValueNetwork(config).requires_grad_(False).bind(lm)


@cache
def compiled_reader(shape: str, device: torch.device) -> ValueNetwork:
    """That reader once more, through torch.compile."""
    lm, reader = base_and_reader(shape, device)
    compiled = ValueNetwork(reader.config).requires_grad_(False).bind(lm)
    compiled.load_state_dict(reader.state_dict())
    compiled.compile()
    return compiled


class ReaderStep:
    """Random numbers of a step, and both ways to what they lead to.

    Args:
        lm: the base model, of any backend. network: a reader bound to it.
        contexts: tokens of each sequence so far. counts: candidate rows of each; 0 for one that is plain.
        padding: rows behind the last sequence's, as a step of a larger size has them.
    """

    def __init__(
        self,
        lm: CausalLM,
        network: ValueNetwork,
        contexts: Sequence[int],
        counts: Sequence[int],
        block_size: int = 16,
        padding: int = 0,
        seed: int = 0,
    ) -> None:
        self.lm, self.network = lm, network
        device, generator = lm.device, torch.Generator(lm.device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        needed = [max(1, -(-context // block_size)) for context in contexts]
        cache = lm.allocate(sum(needed), block_size)
        for layer in network.config.layers:
            cache.keys[layer].normal_(generator=generator)
            cache.values[layer].normal_(generator=generator)
        blocks = iter(torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)).tolist())
        tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
        for line, count in zip(tables, needed, strict=True):
            line[:count] = torch.tensor([next(blocks) for _ in range(count)], dtype=torch.int32)
        self.tables = tables.to(device)
        rows, width = sum(counts) + padding, max(counts)
        ends = list(accumulate(counts, initial=0))
        self.offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        self.laid = torch.tensor([*ends[:-1], rows], dtype=torch.int32, device=device)
        owner = [s for s, count in enumerate(counts) for _ in range(count)]
        beyond = [0] * padding
        self.owner = torch.tensor([*owner, *([len(counts) - 1] * padding)], device=device)
        self.columns = torch.tensor([*(c for n in counts for c in range(n)), *beyond], dtype=torch.int32, device=device)
        self.positions = torch.tensor([*(contexts[s] for s in owner), *beyond], device=device)
        self.token_ids = torch.randint(lm.vocab_size, (rows,), generator=generator, device=device)
        self.hidden = normal(len(contexts), len(network.states) * lm.hidden_size, dtype=lm.dtype)
        filled = torch.tensor([count or width for count in counts], device=device)
        tail = torch.where(torch.arange(len(counts), device=device) % 2 == 0, filled - 1, -1)
        self.selection = SelectionTensors(
            torch.randint(lm.vocab_size, (len(counts), width), generator=generator, device=device),
            (2 * normal(len(counts), width)).log_softmax(1).double(),
            normal(len(counts), width).double(),
            filled,
            tail,
            torch.where(tail >= 0, -2.0, -torch.inf).double(),
            torch.ones(len(counts), dtype=torch.bool, device=device),
        )
        asked = (len(counts), len(network.config.heads))
        self.settings = ValueSettings(
            2 * normal(*asked),
            torch.full(asked, 0.7, dtype=torch.float64, device=device),
            normal(*asked),
            torch.arange(len(counts), device=device) % 2 == 1,
            torch.arange(len(counts), device=device) % 3 == 1,
        )
        self.tilt = torch.zeros(len(counts), width, dtype=torch.float64, device=device)
        self._head_tilt = function("value_head_tilt", lm.attention_backend)
        self._reader: object = None

    @torch.inference_mode()
    def parts(self, network: ValueNetwork | None = None) -> tuple[ValueTilt, torch.Tensor]:
        """As `engine.decode` runs them: the result, and the tilt float64 [S, W]; or those of another network."""
        network = network or self.network
        batch = AttentionBatch(
            self.tables, self.laid, self.positions.to(torch.int32), torch.full_like(self.positions, -1),
            self.positions, unslotted=True,
        )  # fmt: skip
        features = network.features(self.token_ids, self.hidden, self.owner, batch)
        weights, tilt = network.served_heads.weights, torch.zeros_like(self.tilt)
        found = self._head_tilt(
            features, weights, self.settings, self.offsets, self.columns, self.selection, tilt, choose=True
        )
        return found, tilt

    @torch.inference_mode()
    def whole(self, **launch: int | None) -> tuple[ValueTilt, torch.Tensor]:
        """The same by `reader_step`, with its `splits` and `programs`."""
        from vas_engine.kernels import reader_step as kernel

        lm, network = self.lm, self.network
        served, cache = network._serving(), lm.cache
        assert cache is not None
        assert network.place_weight is not None
        if self._reader is None:
            pages = [{layer: of[layer] for layer in network.config.layers} for of in (cache.keys, cache.values)]
            self._reader = kernel.Reader.of(list(served.layers), served.heads, *pages)
        states = network._project(self.hidden.unflatten(-1, (-1, lm.hidden_size)), served.state_weight)
        tilt = torch.zeros_like(self.tilt)
        found = kernel.reader_step(
            self._reader, states, self.owner, network._embeddings(), self.token_ids,
            F.linear(place_features(self.positions), network.place_weight),
            kernel.turns(lm.rotate, self.positions, network.config.head_dim, network.config.layers[0], lm.dtype),
            self.tables, self.laid, self.positions.to(torch.int32),
            self.settings, self.offsets, self.columns, self.selection, tilt, **launch,
        )  # fmt: skip
        return found, tilt

    def difference(self, **launch: int | None) -> float:
        """Of the values of both ways, by the norm of the parts'."""
        scored = int(self.offsets[-1])
        wanted, found = (way.values[:scored].double() for way in (self.parts()[0], self.whole(**launch)[0]))
        return float((found - wanted).norm() / wanted.norm())
