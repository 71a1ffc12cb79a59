"""Backends of paged attention: the C++ extension on a CPU, Triton kernels on a GPU, plain torch anywhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.kernels import has_triton, interprets, reference
from vas_engine.model import flash
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.graphs import captures

_extension: Any = None
with suppress(ImportError):  # built without a compiler: the reference serves
    _extension = importlib.import_module("vas_engine._attention")

BACKENDS = ("auto", "cpp", "flash-attn", "reference", "triton")
_SEES_NO_SELF = -2  # a slot for the extension: written nowhere, own key not seen
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PagedLayer(Protocol):
    """Pages of one layer with what can be done to them."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> torch.Tensor:
        """q [R, H, D]; k, v [R, KVH, D] or None (a reader: pages only) -> [R, H, D]. Slotted rows are written first."""

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """k, v [n, KVH, D] to slots int64 [n]; slot -1 is left out."""

    def write_rows(self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Rows (int64 [n]) of k, v [R, KVH, D] to slots int64 [n]."""


class ReferenceLayer:
    """Plain torch, any device."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
        self.k_pages, self.v_pages = k_pages, v_pages

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> torch.Tensor:
        if k is not None and v is not None:
            reference.write_pages(k, v, self.k_pages, self.v_pages, batch.slots)
        return reference.candidate_attention(
            q,
            self.k_pages,
            self.v_pages,
            batch.block_tables,
            batch.group_offsets,
            batch.prefix_lens,
            k,
            v,
            batch.see_self if k is not None else None,
            scale=scale,
            softcap=softcap,
            window=window,
            positions=batch.positions,
        )

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        reference.write_pages(k, v, self.k_pages, self.v_pages, slots)

    def write_rows(self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        reference.write_pages(k[rows], v[rows], self.k_pages, self.v_pages, slots)


class CppLayer:
    """The C++ extension, on a CPU. Queries may be of another float dtype than the pages."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
        blocks, size, heads, dim = k_pages.shape
        self.k_pages, self.v_pages = k_pages, v_pages  # kept alive: the extension holds their addresses
        self.dtype, self.shape = k_pages.dtype, (heads, dim)
        code = DTYPE_CODES[k_pages.dtype]
        self.pages = _extension.Pages(k_pages.data_ptr(), v_pages.data_ptr(), code, blocks, size, heads, dim)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> torch.Tensor:
        plan = batch.cache.get("cpp")
        if plan is None:
            plan = batch.cache["cpp"] = _plan(batch)
        rows, heads, dim = q.shape
        if rows != batch.positions.shape[0] or dim != self.shape[1]:
            raise InvalidArgumentError("q", tuple(q.shape), f"needs [{batch.num_rows}, heads, {self.shape[1]}]")
        q, q_row, q_head = _strided(q)
        key, k_row, k_head = self._own(k, rows)
        value, v_row, v_head = self._own(v, rows)
        out = torch.empty((rows, heads, dim), dtype=q.dtype)
        self.pages.attend(
            plan,
            torch.get_num_threads(),
            DTYPE_CODES[q.dtype],
            heads,
            q.data_ptr(),
            q_row,
            q_head,
            0 if key is None else key.data_ptr(),
            k_row,
            k_head,
            0 if value is None else value.data_ptr(),
            v_row,
            v_head,
            out.data_ptr(),
            scale,
            softcap,
            window,
        )
        return out

    def _own(self, given: torch.Tensor | None, rows: int) -> tuple[torch.Tensor | None, int, int]:
        if given is None:
            return None, 0, 0
        if given.shape != (rows, *self.shape):
            raise InvalidArgumentError("k, v", tuple(given.shape), f"need {[rows, *self.shape]}")
        if given.dtype != self.dtype:
            given = given.to(self.dtype)
        return _strided(given)

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        self.write_rows(k, v, torch.arange(k.shape[0]), slots)

    def write_rows(self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        k, k_row, k_head = _strided(k.to(self.dtype))
        v, v_row, v_head = _strided(v.to(self.dtype))
        self.pages.write(k.data_ptr(), k_row, k_head, v.data_ptr(), v_row, v_head, rows.numpy(), slots.numpy())


class TritonLayer:
    """Triton kernels, on a GPU. Queries may be of another float dtype than the pages.

    With a function of flash-attn that one attends for the chunks of prompts which write their keys.

    What work there is follows from the batch once, for all layers: from `batch.host`, where whoever built the batch
    has left its numbers as arrays; without it from shapes, on the device. Neither reads anything back.
    """

    def __init__(
        self, k_pages: torch.Tensor, v_pages: torch.Tensor, function: Callable[..., Any] | None = None
    ) -> None:
        if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
            raise InvalidArgumentError("k_pages, v_pages", tuple(k_pages.shape), "need to be contiguous")
        self.k_pages, self.v_pages, self.flash = k_pages, v_pages, function
        self.decode = importlib.import_module("vas_engine.kernels.candidate_attention")
        self.prefill = importlib.import_module("vas_engine.kernels.paged_prefill")
        self.commit = importlib.import_module("vas_engine.kernels.kv_commit")

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> torch.Tensor:
        rows, heads, dim = q.shape
        kv_heads = self.k_pages.shape[2]
        if rows != batch.num_rows or dim != self.k_pages.shape[3] or heads % kv_heads:
            fix = f"needs [{batch.num_rows}, a multiple of {kv_heads}, {self.k_pages.shape[3]}]"
            raise InvalidArgumentError("q", tuple(q.shape), fix)
        q, k, v = _strided(q)[0], self._own(k, rows), self._own(v, rows)
        pages = (self.k_pages, self.v_pages)
        if k is not None and v is not None and batch.has_slotted and not batch.alone:
            self.commit.write_pages(k, v, *pages, batch.slots)
        out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
        seen = (q, *pages, batch.block_tables, batch.group_offsets, batch.prefix_lens)
        how: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "positions": batch.positions}
        decodes, chunks = self._plan(q, k is not None, batch)
        if decodes is not None:
            # Rows that no other row sees are written by the kernel itself.
            own = {"slots": batch.slots} if batch.alone else {"see_self": batch.see_self}
            self.decode.candidate_attention(
                *seen, k, v, **how, **(own if k is not None else {}), items=decodes, out=out
            )
        if self.flash is not None and isinstance(chunks, flash.Chunks):
            flash.attend(self.flash, q, *pages, chunks, scale, softcap, window, out)
        elif chunks is not None:
            self.prefill.paged_prefill(*seen, **how, items=chunks, out=out)
        return out

    def _own(self, given: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        if given is None:
            return None
        if given.shape != (rows, *self.k_pages.shape[2:]):
            raise InvalidArgumentError("k, v", tuple(given.shape), f"need {[rows, *self.k_pages.shape[2:]]}")
        return _strided(given)[0]

    def _plan(self, q: torch.Tensor, own: bool, batch: AttentionBatch) -> tuple[Any, Any]:
        """Items for candidate_attention and for paged_prefill; None where there are none."""
        shape = (q.shape[1:], self.k_pages.shape[1:], q.dtype, self.k_pages.dtype, own)
        host = _host_numbers(batch)
        key = ("triton", *shape)
        if key not in batch.cache:
            if host is None:
                items = self.decode.plan(q, self.k_pages, batch.block_tables, batch.group_offsets, batch.prefix_lens)
                batch.cache[key] = (items, None)
            else:
                batch.cache[key] = self._plan_on_host(q, own, host, batch.block_tables)
        return batch.cache[key]

    def _plan_on_host(self, q: torch.Tensor, own: bool, host: Any, tables: torch.Tensor) -> tuple[Any, Any]:
        """Groups of more rows than a tile of candidates takes are chunks, if all their keys are in the pages."""
        kv_heads, dim = self.k_pages.shape[2:]
        share = q.shape[1] // kv_heads
        wide = self.decode.is_wide(q.dtype, self.k_pages.dtype)
        counts = np.diff(host.offsets)
        groups = counts.nonzero()[0]
        counts, starts = counts[groups], host.offsets[groups]
        if not len(groups):
            return None, None
        lengths = np.maximum.reduceat(host.prefix_lens, starts)
        chunk = counts * share > self.decode.configuration(counts.max() * share, dim, wide).pairs
        if own:
            chunk &= ~np.logical_or.reduceat(host.slots < 0, starts)
        programs = self.decode.processors(q.device) * self.decode.PROGRAMS_PER_PROCESSOR

        def items(chosen: np.ndarray, launch: Any) -> Any:
            table = self.decode.host_items(
                groups[chosen], counts[chosen], lengths[chosen], share, kv_heads, launch.pairs, programs
            )
            moved = torch.from_numpy(table)
            if q.device.type == "cuda":
                moved = moved.pin_memory().to(q.device, non_blocking=True)
            return self.decode.Items(moved, launch, bool((table[:, 3] > 1).any()))

        decodes = chunks = None
        if not chunk.all():
            most = int(counts[~chunk].max()) * share
            decodes = items(~chunk, self.decode.configuration(most, dim, wide))
        if chunk.any() and self.flash is not None and own and q.dtype == self.k_pages.dtype:
            places = (groups[chunk], starts[chunk].astype(np.int64), counts[chunk], lengths[chunk])
            chunks = flash.plan(*places, tables, self.k_pages.shape[1])
        elif chunk.any():
            chunks = items(chunk, self.prefill.configuration(dim, wide))
        return decodes, chunks

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        self.commit.write_pages(_strided(k)[0], _strided(v)[0], self.k_pages, self.v_pages, slots)

    def write_rows(self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        self.commit.write_pages(_strided(k)[0], _strided(v)[0], self.k_pages, self.v_pages, slots, rows)


def _host_numbers(batch: AttentionBatch) -> Any:
    """The batch's `offsets`, `prefix_lens` and `slots` as arrays; None if they would have to be fetched."""
    if batch.host is not None or batch.unslotted is not None or batch.device.type != "cpu":
        return batch.host
    arrays = {"offsets": batch.group_offsets, "prefix_lens": batch.prefix_lens, "slots": batch.slots}
    return SimpleNamespace(**{name: tensor.numpy() for name, tensor in arrays.items()})


def _strided(given: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The tensor with its row and head strides; copied only when the last axis is not dense."""
    row, head, last = given.stride()
    if last != 1:
        given = given.contiguous()
        row, head, last = given.stride()
    return given, row, head


def _plan(batch: AttentionBatch) -> Any:
    """The extension's view of a batch; arrays that do not fit one another raise ValueError there."""
    arrays = (batch.block_tables, batch.group_offsets, batch.prefix_lens, batch.slots, batch.positions)
    return _extension.Plan(*(array.numpy() for array in arrays))


def candidate_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    group_offsets: torch.Tensor,
    prefix_lens: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    see_self: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    positions: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of grouped rows over pages, nothing written; see ``kernels.reference.candidate_attention``."""
    resolved = resolve_backend(backend, q.device, k_pages.dtype)
    if resolved != "cpp":
        kernels: Any = reference
        if launches(resolved):
            kernels = importlib.import_module("vas_engine.kernels.candidate_attention")
        return kernels.candidate_attention(
            q,
            k_pages,
            v_pages,
            block_tables,
            group_offsets,
            prefix_lens,
            k,
            v,
            see_self,
            scale=scale,
            softcap=softcap,
            window=window,
            positions=positions,
        )
    if positions is None:
        positions = reference.own_positions(prefix_lens, see_self, k is not None)
    slots = torch.full_like(positions, -1)
    if see_self is not None:
        slots[~see_self] = _SEES_NO_SELF
    batch = AttentionBatch(block_tables, group_offsets, prefix_lens, slots, positions)
    return CppLayer(k_pages, v_pages).attend(q, k, v, batch, scale, softcap, window)


def has_extension() -> bool:
    """Whether the C++ attention was built."""
    return _extension is not None and hasattr(_extension, "Pages")


def launches(backend: str) -> bool:
    """Whether a resolved backend runs Triton kernels."""
    return backend in ("flash-attn", "triton")


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``name`` means here; one that cannot serve is an :class:`InvalidArgumentError`."""
    if name not in BACKENDS:
        raise InvalidArgumentError("attention_backend", name, nearest(name, BACKENDS))
    can_cpp = has_extension() and device.type == "cpu" and dtype in DTYPE_CODES
    if name == "auto":
        if device.type == "cuda" and has_triton() and dtype in DTYPE_CODES:
            return "flash-attn" if dtype in flash.DTYPES and flash.installed(_capability(device)) else "triton"
        return "cpp" if can_cpp else "reference"
    if launches(name):
        if not has_triton():
            raise InvalidArgumentError("attention_backend", name, "Triton is missing: `pip install vas-engine[gpu]`")
        if dtype not in DTYPE_CODES:
            raise InvalidArgumentError("attention_backend", name, f"it does not serve {dtype}; ask for 'reference'")
        if device.type != "cuda" and not interprets():
            fix = "its kernels need a GPU; on a CPU they run with TRITON_INTERPRET=1 only, which is for tests"
            raise InvalidArgumentError("attention_backend", name, fix)
    if name == "flash-attn":
        if device.type != "cuda" or dtype not in flash.DTYPES:
            fix = f"it serves bfloat16 and float16 on a GPU, not {dtype} on {device.type}; ask for 'auto'"
            raise InvalidArgumentError("attention_backend", name, fix)
        if flash.installed(_capability(device)) is None:
            fix = "nothing installed serves this GPU: `pip install vas-engine[flash-attn]` (or [flash-attn-4])"
            raise InvalidArgumentError("attention_backend", name, fix)
    if name == "cpp" and not can_cpp:
        why = "build it with `python setup.py build_ext --inplace`" if not has_extension() else "it serves CPUs only"
        raise InvalidArgumentError("attention_backend", name, f"{why}, or ask for 'reference'")
    return name


def make_layer(k_pages: torch.Tensor, v_pages: torch.Tensor, backend: str = "auto") -> PagedLayer:
    """Pages [num_blocks, block_size, KVH, D] bound to a backend."""
    resolved = resolve_backend(backend, k_pages.device, k_pages.dtype)
    if resolved == "flash-attn":
        fits = k_pages.shape[3] <= flash.MAX_HEAD_DIM and k_pages.shape[3] % 8 == 0
        return TritonLayer(k_pages, v_pages, flash.load(k_pages.device) if fits else None)
    made: dict[str, Any] = {"cpp": CppLayer, "reference": ReferenceLayer, "triton": TritonLayer}
    return made[resolved](k_pages, v_pages)


def commit_layers(
    layers: Sequence[PagedLayer],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Rows (int64 [n]) of every layer's k, v [R, KVH, D] to slots int64 [n]; on a GPU in one launch.

    That launch finds the layers by a table that the host sends, which a graph cannot hold: there each layer has its
    own.
    """
    triton_layers = [layer for layer in layers if isinstance(layer, TritonLayer)]
    if triton_layers and len(triton_layers) == len(layers) and not captures(slots.device):
        k_pages, v_pages = [layer.k_pages for layer in triton_layers], [layer.v_pages for layer in triton_layers]
        triton_layers[0].commit.kv_commit(keys, values, k_pages, v_pages, rows, slots)
        return
    for layer, k, v in zip(layers, keys, values, strict=True):
        layer.write_rows(k, v, rows, slots)
