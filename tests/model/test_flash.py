"""Prompt chunks by flash-attn: which package, what it is handed. It runs on a GPU only, so here its documented
behaviour, worked out in plain torch, stands in for it; the test marked gpu runs the real one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.model.test_forward import BLOCK, make_sequences
from tests.model.test_triton_backend import step
from vas_engine.errors import InvalidArgumentError
from vas_engine.model import backend, flash
from vas_engine.model.backend import ReferenceLayer, TritonLayer, make_layer, resolve_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def documented(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """`flash_attn_varlen_func` as its docstring says: causal masks are aligned to the bottom right corner, and with a
    window (left, right) query i sees keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() == max_seqlen_q
    assert cu_seqlens_k.diff().max() == max_seqlen_k
    outs = []
    for (a, b), (c, d) in zip(cu_seqlens_q.unfold(0, 2, 1), cu_seqlens_k.unfold(0, 2, 1), strict=True):
        query, key, value = q[a:b].float(), k[c:d].float(), v[c:d].float()
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        end = torch.arange(len(query))[:, None] + len(key) - len(query)
        place = torch.arange(len(key))[None]
        seen = (
            (place <= end) if window_size[0] < 0 else (place <= end + window_size[1]) & (place >= end - window_size[0])
        )
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value))
    return torch.cat(outs).to(q.dtype), None  # flash-attn-4 returns a pair


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (3.0, 7)])
def test_chunks_beside_decodes_equal_the_reference(softcap: float, window: int) -> None:
    """Chunks from the start and from the middle of a prompt, a decode and candidates; only chunks are handed over."""
    sequences = make_sequences([60, 40, 9, 1], seed=2)
    first, second, third, fourth = sequences
    blocks, calls = sum(len(s.table) for s in sequences), []

    def noted(q, *args, **how):
        calls.append(len(q))
        return documented(q, *args, **how)

    pages = [torch.randn(blocks, BLOCK, 2, 8) for _ in range(2)]
    mine, wanted = TritonLayer(*(p.clone() for p in pages), noted), ReferenceLayer(*(p.clone() for p in pages))
    works = [
        (first, list(range(35)), True), (third, [8], True), (second, list(range(3, 38)), True), (fourth, [1] * 9, False)
    ]  # fmt: skip
    batch = step(works, on_host=True)
    q, k, v = (torch.randn(batch.num_rows, heads, 8) for heads in (4, 2, 2))
    for _ in range(2):  # the second layer shares the plan
        got, should = (layer.attend(q, k, v, batch, 0.3, softcap, window) for layer in (mine, wanted))
        torch.testing.assert_close(got, should, rtol=1e-4, atol=1e-4)
    assert calls == [70, 70]
    # A reader's rows all see the same, which is no causal chunk.
    queries = torch.randn(batch.num_rows, 16, 8)
    got, should = (layer.attend(queries, None, None, batch.strict, 0.3, 0.0, window) for layer in (mine, wanted))
    torch.testing.assert_close(got, should, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_which_package_serves(monkeypatch) -> None:
    versions = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise flash.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(flash, "version", version)
    assert flash.installed((9, 0)) == flash.installed() == "flash-attn-4 4.0.0"
    assert flash.installed((8, 0)) == "flash-attn 2.8.3"
    assert flash.installed((7, 5)) is None
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda device: (8, 0))
    assert resolve_backend("auto", CUDA, torch.bfloat16) == "flash-attn"
    assert resolve_backend("auto", CUDA, torch.float32) == resolve_backend("triton", CUDA, torch.bfloat16) == "triton"
    assert resolve_backend("flash-attn", CUDA, torch.float16) == "flash-attn"
    with pytest.raises(InvalidArgumentError, match=r"bfloat16 and float16 on a GPU, not torch\.float32"):
        resolve_backend("flash-attn", CUDA, torch.float32)
    with pytest.raises(InvalidArgumentError, match=r"flash-attn.*(TRITON_INTERPRET|on a GPU)"):
        resolve_backend("flash-attn", CPU, torch.bfloat16)
    del versions["flash-attn"]
    assert resolve_backend("auto", CUDA, torch.bfloat16) == "triton"
    with pytest.raises(InvalidArgumentError, match=r"pip install vas-engine\[flash-attn\]"):
        resolve_backend("flash-attn", CUDA, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (20.0, 100)])
def test_the_real_package_equals_the_reference(softcap: float, window: int) -> None:
    if flash.installed(torch.cuda.get_device_capability()) is None:
        pytest.skip("flash-attn is not installed")
    first, second = make_sequences([700, 300], seed=2)
    pages = [torch.randn(len(first.table) + len(second.table), BLOCK, 8, 128) for _ in range(2)]
    batch = step([(first, list(range(100, 700)), True), (second, list(range(300)), True)], on_host=True)
    q, k, v = (torch.randn(batch.num_rows, heads, 128, device="cuda") for heads in (32, 8, 8))
    exact = ReferenceLayer(*(p.cuda() for p in pages)).attend(q, k, v, batch, 0.09, softcap, window)
    half = [t.bfloat16() for t in (q, k, v)]
    got = make_layer(*(p.cuda().bfloat16() for p in pages), "flash-attn").attend(*half, batch, 0.09, softcap, window)
    assert (got.float() - exact).norm() / exact.norm() < 1e-2
