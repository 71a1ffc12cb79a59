"""What torch.compile makes for the device that is here, beside what is run eagerly: a GPU's code, or a CPU's."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.engine.conftest import drain, engine_on, tokens
from vas_engine.engine.engine import Engine
from vas_engine.model import AttentionBatch, CausalLM
from vas_engine.model.graphs import Graphs
from vas_engine.params import SamplingParams

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BLOCK, STATES = 16, (0, 1, 2)
pytestmark = [pytest.mark.gpu, *([] if HAS_GPU else [pytest.mark.slow])]


def base(dtype: torch.dtype) -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    return CausalLM.load(LlamaForCausalLM(config), device=DEVICE, dtype=dtype)


def states_and_logits(lm: CausalLM, rows: int, captured: bool = False) -> torch.Tensor:
    """Of a prompt of so many tokens, float32 side by side; as a CUDA graph or not."""
    blocks = -(-rows // BLOCK)
    lm.allocate(blocks, BLOCK)
    batch = AttentionBatch.from_sequences([range(blocks)], [range(rows)], [True], BLOCK, DEVICE)
    ids = torch.arange(rows, device=DEVICE) * 37 % 1000
    found = []

    def work() -> None:
        out = lm.forward(ids, batch, STATES)
        found.append([*(out.hidden[index] for index in STATES), lm.logits(out.last_hidden)])

    with torch.inference_mode():
        if captured:
            Graphs(DEVICE).capture(work)()
        else:
            work()
        return torch.cat([part.float() for part in found[-1]], 1)


@pytest.mark.filterwarnings("error:.*CUDA graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_are_as_near_to_float32_as_eager_ones(dtype: torch.dtype) -> None:
    exact, eager, compiled = base(torch.float32), base(dtype), base(dtype)
    compiled.compile(STATES)
    for rows in (1, 2, 16, 17, 300, 1344):
        truth, plain = states_and_logits(exact, rows), states_and_logits(eager, rows)
        for captured in (False, True):
            found = states_and_logits(compiled, rows, captured)
            if dtype == torch.float32:
                torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
            else:
                assert (found - truth).norm() < 1.3 * (plain - truth).norm()


@pytest.mark.filterwarnings("error:.*CUDA graph")
def test_compiled_engines_choose_the_tokens_of_eager_ones_on_a_cpu() -> None:
    def build(device: str, backend: str, **options) -> Engine:
        return engine_on(device, backend, {"r": ("reader", None), "s": ("side", None)}, **options)

    def found(running: Engine) -> dict:
        for i in range(5):
            params = SamplingParams(
                values={"r": 1.5, "s": -1.0} if i % 2 else {}, num_candidates=6, seed=i, max_tokens=6 + i,
                temperature=float(i > 1), ignore_eos=True,
            )  # fmt: skip
            running.add_request(str(i), list(range(1, 3 + 2 * i)), params)
        return tokens(drain(running))

    compiled = build(DEVICE.type, "triton" if HAS_GPU else "cpp", graphs=True)
    scorers = list(compiled.guide.scorers.values())
    compiled.lm.compile([index for scorer in scorers for index in scorer.states])
    for scorer in scorers:
        scorer.compile()
    assert found(compiled) == found(build("cpu", "cpp"))
    assert compiled.stats.graph_steps > 5
