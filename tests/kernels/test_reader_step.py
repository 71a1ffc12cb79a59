"""A reader as one kernel against its parts in plain torch: interpreted on a CPU with one program, on a GPU with all."""

from __future__ import annotations

import inspect
import threading
from functools import wraps

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from vas_engine.model import CausalLM
from vas_engine.values import HeadConfig, Support, ValueConfig, ValueNetwork

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: F401  the interpreter puts its own functions where it finds this name
from vas_engine.kernels import reader_step as kernel
from vas_engine.kernels.reader_step import unfit

from benchmarks.reader_step import ReaderStep

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
HEADS = {
    "plain": (HeadConfig("plain", mean=0.5, std=2.0),),
    "bounded": (HeadConfig("plain"), HeadConfig("bounded", bounds=(-1.0, 3.0))),
    "distributional": (HeadConfig("of5", support=Support(-2.0, 1.0, 5)), HeadConfig("plain")),
}
# The interpreter is NumPy, which warns of the infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poison():
    """Scratch that a phase reads before another wrote it is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def base_model(dtype=torch.float32, kv_heads: int = 2, head_dim: int = 16, backend: str = "reference") -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=4096,
    )  # fmt: skip
    return CausalLM.load(LlamaForCausalLM(config), device=DEVICE, dtype=dtype, attention_backend=backend)


def reader(lm: CausalLM, heads: str = "plain", share: int = 2, width: int = 40, **changes) -> ValueNetwork:
    torch.manual_seed(1)
    layer = lm.layers[0]
    options = {
        "kind": "reader", "heads": HEADS[heads], "states": (1, 3), "width": width, "layers": (2, 0),
        "queries": share * layer.kv_heads, "head_dim": layer.head_dim, "mlp": 72, "head_hidden": 48,
    } | changes  # fmt: skip
    config = ValueConfig(hidden_size=lm.hidden_size, vocab_size=lm.vocab_size, **options)
    network = ValueNetwork(config).requires_grad_(False)
    network.heads.output.weight.mul_(10)  # values that differ
    for part in (network.heads.hidden, network.heads.output):
        if part is not None:
            part.bias.normal_()
    return network.bind(lm)


def compare(case: ReaderStep, tolerance: float, **launch) -> None:
    """Values and tilts by relative norm; winners where rounding cannot have changed them."""
    (wanted, tilts), (found, tilt) = case.parts(), case.whole(**launch)
    scored = int(case.offsets[-1])
    for name in ("values", "utilities"):
        a, b = (getattr(result, name)[:scored].double() for result in (found, wanted))
        assert (a - b).norm() <= tolerance * max(1.0, float(b.norm())), name
    assert wanted.values[:scored].std(0).min() > 0.01, "values that do not differ prove nothing"
    filled = torch.arange(tilt.shape[1], device=tilt.device) < case.selection.count[:, None]
    assert (tilt - tilts)[filled].norm() <= 3 * tolerance * max(1.0, float(tilts[filled].norm()))
    if tolerance < 1e-3:
        assert torch.equal(found.winners.column, wanted.winners.column)
        assert torch.equal(found.winners.token_id, wanted.winners.token_id)
        assert torch.equal(found.row, wanted.row)
        for name in ("log_prob", "tilted_log_prob", "kl"):
            torch.testing.assert_close(
                getattr(found.winners, name), getattr(wanted.winners, name), atol=1e-4, rtol=1e-4
            )


EDGES = [0, 1, 15, 16, 17, 33], [3, 1, 0, 6, 2, 5]
"""An empty prefix, one token, ends at and beside those of blocks; a sequence that is plain."""


@pytest.mark.parametrize("heads", list(HEADS))
def test_equals_its_parts(heads: str) -> None:
    lm = base_model()
    network = reader(lm, heads)
    assert unfit(network, lm) is None
    compare(ReaderStep(lm, network, *EDGES, padding=4), 1e-5)


@given(
    groups=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    share=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([8, 12, 20]),
    block_size=st.sampled_from([1, 3, 16]),
    changes=st.sampled_from([{}, {"head_norm": False}, {"activation": "silu"}, {"activation": "relu", "layers": (1,)}]),
    splits=st.sampled_from([None, 1, 3]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape_equals_its_parts(groups, kv_heads, share, head_dim, block_size, changes, splits, padding, seed):
    groups = [*groups, (5, 2)]
    lm = base_model(kv_heads=kv_heads, head_dim=head_dim)
    network = reader(lm, share=share, **changes)
    contexts, counts = zip(*groups, strict=True)
    compare(ReaderStep(lm, network, contexts, counts, block_size, padding, seed), 1e-5, splits=splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    lm = base_model(dtype)
    network = reader(lm)
    assert unfit(network, lm) is None
    compare(ReaderStep(lm, network, *EDGES), 2e-2, splits=2)


def test_launches_of_other_numbers_of_programs_count_elsewhere() -> None:
    """One that left the count between multiples of the next one's programs would let some of those pass too early."""
    lm = base_model()
    case = ReaderStep(lm, reader(lm), *EDGES)
    case.whole(programs=1)
    assert case._reader.arrivals.nonzero().tolist() == [[1, 0]]


# -- many programs -----------------------------------------------------------------------------------------------


def share_among(programs: int, monkeypatch: pytest.MonkeyPatch, skipped: int | None = None) -> list[int]:
    """Several programs under the interpreter, which runs one after another: each goes up to the next barrier, the last
    one first, so that none finds what only a barrier would have brought it.

    Args:
        skipped: a barrier that is left out, counted from 0.

    Returns:
        The barriers that each program has come to, once the kernel has run.
    """
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    run, goes, stands = kernel._run.rewrite(), [threading.Semaphore(0) for _ in range(programs)], threading.Semaphore(0)
    met, alive, errors, own = [0] * programs, [True] * programs, [], threading.local()

    def meet(*_) -> None:
        met[own.program] += 1
        if met[own.program] - 1 != skipped:
            stands.release()
            goes[own.program].acquire()

    def one(program: int, arguments: dict) -> None:
        own.program = program
        goes[program].acquire()
        try:
            run(**arguments)
        except BaseException as error:  # of whatever sort: the others wait
            errors.append(error)
        alive[program] = False
        stands.release()

    @wraps(run)
    def all_at_once(**arguments) -> None:
        if interpreter_builder.grid_idx[0] < programs - 1:
            return
        threads = [threading.Thread(target=one, args=(program, arguments)) for program in range(programs)]
        for thread in threads:
            thread.start()
        while any(alive):
            for program in reversed(range(programs)):
                if alive[program]:
                    interpreter_builder.set_grid_idx(program, 0, 0)
                    goes[program].release()
                    stands.acquire()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    all_at_once.__signature__ = inspect.signature(run)
    monkeypatch.setitem(InterpretedFunction.rewritten_fn, kernel._run.fn, all_at_once)
    monkeypatch.setattr(kernel, "_meet", meet)
    return met


@pytest.mark.skipif(HAS_GPU, reason="of the interpreter")
@pytest.mark.parametrize("programs", [2, 7])
def test_programs_share_the_work(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = base_model()
    case = ReaderStep(lm, reader(lm), *EDGES, padding=4)
    met = share_among(programs, monkeypatch)
    compare(case, 1e-5, splits=2, programs=programs)
    assert met == [2 + 2 * 6] * programs


@pytest.mark.skipif(HAS_GPU, reason="of the interpreter")
@pytest.mark.parametrize("skipped", [None, *range(8)])
def test_every_barrier_is_needed(skipped: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = base_model()
    case = ReaderStep(lm, reader(lm, layers=(1,)), [40, 33, 7], [5, 20, 16], padding=2)
    share_among(3, monkeypatch, skipped)
    if skipped is None:
        compare(case, 1e-5, splits=2, programs=3)
    else:
        with pytest.raises(AssertionError, match="values"):
            compare(case, 1e-5, splits=2, programs=3)


# -- what does not fit -------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_why() -> None:
    lm = base_model()
    reasons = {
        "feed-forward": reader(lm, mlp=0),
        "linear heads": reader(lm, head_hidden=0),
        "16 bytes": reader(lm, width=41),
        "'action', not a reader": reader(lm, kind="action", layers=(), queries=0, head_dim=0, mlp=0),
    }
    for reason, network in reasons.items():
        assert reason in unfit(network, lm)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    mistral = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8)
    windowed = CausalLM.load(MistralForCausalLM(mistral), device=DEVICE, attention_backend="reference")
    assert unfit(reader(windowed), windowed) == "a sliding window"
    neox = GPTNeoXConfig(**sizes | {"hidden_size": 32}, num_attention_heads=2, rotary_pct=0.5)
    partly = CausalLM.load(GPTNeoXForCausalLM(neox), device=DEVICE, attention_backend="reference")
    assert unfit(reader(partly, share=1), partly) == "another rotation of queries"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize(("contexts", "rows"), [([1000], 21), ([8000, 0, 500, 17] * 8, 21), ([300] * 40, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_programs_at_once(contexts: list[int], rows: int, dtype: torch.dtype) -> None:
    """Many programs, many times over and in a graph: the same bits each time."""
    lm = base_model(dtype, kv_heads=4, head_dim=64, backend="triton")
    network = reader(lm, width=640, mlp=1280, head_hidden=640, layers=(0, 1, 2))
    case = ReaderStep(lm, network, contexts, [rows] * len(contexts), padding=3)
    compare(case, 2e-2 if dtype == torch.bfloat16 else 1e-4)
    compare(case, 2e-2 if dtype == torch.bfloat16 else 1e-4, programs=5)
    scored = int(case.offsets[-1])
    with torch.inference_mode():
        first, _ = case.whole()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, _ = case.whole()
        for _ in range(50):
            found.values.fill_(torch.nan)
            graph.replay()
            assert torch.equal(found.values[:scored], first.values[:scored])
