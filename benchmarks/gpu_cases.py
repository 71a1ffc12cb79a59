"""Cases of the kernels around attention and selection: what they are given, what must move, what is right.

A case makes its inputs, runs a function over them, and names the tensors that have the result, so that all kernels are
measured and compared with their reference in one way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vas_engine.kernels import reference
from vas_engine.kernels.reference import HeadWeights, SelectionTensors, ValueSettings

from vas_engine.values import HeadConfig, Heads, ValueConfig

VOCABULARY = 1000
"""Of tables and selections, whose lines are what counts."""
BLOCK_SIZE = 16
"""Tokens a page."""
CHECKED_ROWS = 16
"""Of each chunk of a prompt."""


class Case(ABC):
    """A kernel and its sizes.

    Attributes:
        reference: what is right.
        bytes: that must move. flops: that must be done.
    """

    reference: Callable[..., Any]
    bytes: Any
    flops: Any

    @abstractmethod
    def inputs(self, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of a run."""

    @abstractmethod
    def results(self, run: Callable[..., Any], given: dict[str, Any]) -> Iterable[Tensor]:
        """What a run makes of them, to be compared."""

    def prepare(self, run: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
        """As a graph has it, where that is more."""
        return given


@dataclass(frozen=True)
class HeadCase(Case):
    """Heads, tilt and draw over `rows` candidates of each request; a hidden layer as wide as the features, or none."""

    requests: int
    rows: int
    width: int = 512
    hidden: int = 0

    reference = staticmethod(reference.value_head_tilt)

    @property
    def bytes(self) -> int:
        """That must move: features in float32, weights."""
        return 4 * (self.requests * self.rows * self.width + self.hidden * (self.width + 1) + self._last)

    @property
    def flops(self) -> int:
        return 2 * self.requests * self.rows * (self.hidden * self.width + self._last)

    @property
    def _last(self) -> int:
        return self.hidden or self.width

    def inputs(self, device: torch.device, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        config = ValueConfig(
            "lookahead", (HeadConfig(),), self.width, VOCABULARY, (1,), width=self.width, head_hidden=self.hidden
        )
        heads = Heads(config, self.width).requires_grad_(False).to(device)
        shape = (self.requests, self.rows)
        log_probs = torch.randn(shape, dtype=torch.float64, device=device).log_softmax(1)
        column = torch.arange(self.rows, dtype=torch.int32, device=device)
        one = torch.ones(self.requests, 1, device=device)
        no = torch.zeros(self.requests, dtype=torch.bool, device=device)
        selection = SelectionTensors(
            token_ids=column.long().expand(shape).contiguous(),
            log_probs=log_probs,
            noise=torch.rand_like(log_probs),
            count=torch.full((self.requests,), self.rows, device=device),
            tail=torch.full((self.requests,), self.rows - 1, device=device),
            tail_log_mass=log_probs[:, -1].contiguous(),
            finite=~no,
        )
        return {
            "features": torch.randn(self.requests * self.rows, self.width, device=device),
            "weights": HeadWeights.of(heads),
            "settings": ValueSettings(one, one.double(), torch.zeros_like(one), no, no.clone()),
            "row_offsets": torch.arange(self.requests + 1, dtype=torch.int32, device=device) * self.rows,
            "columns": column.repeat(self.requests),
            "selection": selection,
            "tilt": torch.zeros_like(log_probs),
        }

    def results(self, run: Callable[..., Any], given: dict[str, Any]) -> Iterable[Tensor]:
        found = run(**{**given, "tilt": given["tilt"].clone()})
        return found.values, found.winners.log_prob, found.winners.tilted_log_prob


@dataclass(frozen=True)
class InputCase(Case):
    """What `rows` candidates of each request start from: a state, an embedding and a place, summed."""

    requests: int
    rows: int
    width: int = 512

    reference = staticmethod(reference.candidate_input)
    flops = 0

    @property
    def bytes(self) -> int:
        """That must move in float32: three lines a row, of which the state's is one a request."""
        return 4 * self.width * self.requests * (3 * self.rows + 1)

    def inputs(self, device: torch.device, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        rows = self.requests * self.rows
        return {
            "states": torch.randn(self.requests, self.width, device=device),
            "state_index": torch.arange(rows, device=device) // self.rows,
            "table": torch.randn(VOCABULARY, self.width, device=device),
            "token_ids": torch.randint(VOCABULARY, (rows,), device=device),
            "places": torch.randn(rows, self.width, device=device),
        }

    def results(self, run: Callable[..., Any], given: dict[str, Any]) -> Iterable[Tensor]:
        return (run(**given),)


@dataclass(frozen=True)
class CommitCase(Case):
    """Keys and values of the winners, one of `rows` rows a request, of all layers to their pages; by default of 8B."""

    requests: int
    rows: int
    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    reference = staticmethod(reference.kv_commit)
    flops = 0

    @property
    def bytes(self) -> int:
        """That must move in bfloat16: keys and values, read and written."""
        return 2 * 2 * 2 * self.layers * self.requests * self.kv_heads * self.head_dim

    def inputs(self, device: torch.device, seed: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        one = (self.kv_heads, self.head_dim)

        def layers(*shape: int) -> list[Tensor]:
            options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
            return [torch.randn(*shape, *one, **options) for _ in range(self.layers)]

        first = torch.arange(self.requests, device=device)
        return {
            "keys": layers(self.requests * self.rows),
            "values": layers(self.requests * self.rows),
            "key_pages": layers(self.requests, BLOCK_SIZE),
            "value_pages": layers(self.requests, BLOCK_SIZE),
            "rows": first * self.rows + seed % self.rows,
            "slots": first.flip(0) * BLOCK_SIZE + seed % BLOCK_SIZE,
        }

    def results(self, run: Callable[..., Any], given: dict[str, Any]) -> Iterable[Tensor]:
        pages = {name: [page.clone() for page in given[name]] for name in ("key_pages", "value_pages")}
        run(**{**given, **pages})
        return [*pages["key_pages"], *pages["value_pages"]]

    def prepare(self, run: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
        """As a graph has it: the tensors' addresses are on the device already."""
        if run is self.reference:
            return given
        from vas_engine.kernels.kv_commit import address_table

        names = ("keys", "values", "key_pages", "value_pages")
        return {**given, "addresses": address_table(*(given[name] for name in names))}


@dataclass(frozen=True)
class PrefillCase(Case):
    """Attention of chunks of `rows` tokens that end prompts of `context` tokens; by default of 8B."""

    requests: int
    context: int
    rows: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    reference = staticmethod(reference.candidate_attention)

    @property
    def bytes(self) -> int:
        """That must move in bfloat16: the prompts, queries and results, once."""
        prompts = 2 * self.requests * self.context * self.kv_heads * self.head_dim
        return 2 * (prompts + 2 * self.requests * self.rows * self.heads * self.head_dim)

    @property
    def flops(self) -> int:
        seen = self.rows * self.context - self.rows * (self.rows - 1) // 2
        return 4 * self.requests * seen * self.heads * self.head_dim

    def inputs(self, device: torch.device, seed: int) -> dict[str, Any]:
        lens = torch.arange(self.context - self.rows + 1, self.context + 1, dtype=torch.int32, device=device)
        own = {"prefix_lens": lens.repeat(self.requests), "scale": self.head_dim**-0.5}
        return paged_inputs(self, BLOCK_SIZE, device, seed) | own

    def results(self, run: Callable[..., Any], given: dict[str, Any]) -> Iterable[Tensor]:
        """Of the last rows of each chunk: the reference writes down every pair of rows and tokens."""
        count = min(self.rows, CHECKED_ROWS)
        last = torch.arange(self.requests * self.rows, device=given["q"].device).unflatten(0, (self.requests, -1))
        picked = last[:, -count:].flatten()
        if run is not self.reference:
            return (run(**given)[picked],)
        offsets = torch.arange(self.requests + 1, dtype=torch.int32, device=picked.device) * count
        part = {"q": given["q"][picked], "prefix_lens": given["prefix_lens"][picked], "group_offsets": offsets}
        return (run(**{**given, **part}),)


def paged_inputs(case: Any, block_size: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Random queries and pages; blocks lie scattered, as they do after a while of serving."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-case.context // block_size)
    pages = (case.requests * blocks, block_size, case.kv_heads, case.head_dim)
    rows = case.requests * case.rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    order = torch.randperm(pages[0], generator=torch.Generator().manual_seed(seed))
    return {
        "q": normal(rows, case.heads, case.head_dim),
        "k_pages": normal(*pages),
        "v_pages": normal(*pages),
        "block_tables": order.view(case.requests, blocks).to(device, torch.int32),
        "group_offsets": torch.arange(0, rows + 1, case.rows, dtype=torch.int32, device=device),
    }


def check(case: Case, run: Callable[..., Any], given: dict[str, Any]) -> None:
    """Compares with the reference; ValueError above one hundredth of the norm."""
    for found, wanted in zip(case.results(run, given), case.results(case.reference, given), strict=True):
        error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
        if not error < 1e-2:
            raise ValueError(f"{case}: differs from the reference by {error:.3g} of its norm")
