"""Backends of paged attention: the C++ extension on a CPU, plain torch anywhere."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any, Protocol

import torch

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.kernels import reference
from vas_engine.model.batch import AttentionBatch

_extension: Any = None
with suppress(ImportError):  # built without a compiler: the reference serves
    _extension = importlib.import_module("vas_engine._attention")

BACKENDS = ("auto", "cpp", "reference")
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
        """q [R, H, D]; k, v [R, KVH, D] or None (a reader: pages only) -> [R, H, D]. Slotted rows are
        written first."""

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
    """Attention of grouped rows over pages, nothing written; see
    ``kernels.reference.candidate_attention``."""
    if resolve_backend(backend, q.device, k_pages.dtype) == "reference":
        return reference.candidate_attention(
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


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``name`` means here; one that cannot serve is an :class:`InvalidArgumentError`."""
    if name not in BACKENDS:
        raise InvalidArgumentError("attention_backend", name, nearest(name, BACKENDS))
    can_cpp = has_extension() and device.type == "cpu" and dtype in DTYPE_CODES
    if name == "auto":
        return "cpp" if can_cpp else "reference"
    if name == "cpp" and not can_cpp:
        why = "build it with `python setup.py build_ext --inplace`" if not has_extension() else "it serves CPUs only"
        raise InvalidArgumentError("attention_backend", name, f"{why}, or ask for 'reference'")
    return name


def make_layer(k_pages: torch.Tensor, v_pages: torch.Tensor, backend: str = "auto") -> PagedLayer:
    """Pages [num_blocks, block_size, KVH, D] bound to a backend."""
    if resolve_backend(backend, k_pages.device, k_pages.dtype) == "cpp":
        return CppLayer(k_pages, v_pages)
    return ReferenceLayer(k_pages, v_pages)
