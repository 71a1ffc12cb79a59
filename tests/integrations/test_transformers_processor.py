"""ValueLogitsProcessor: the guided policy inside transformers' own loop, batched, padded, row by row."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, set_seed

from benchmarks.peers import SharedCacheValueProcessor
from tests.engine.test_distribution import EOS as WORLD_EOS
from tests.engine.test_distribution import HORIZON, PROMPT
from tests.integrations.conftest import EOS, PAD, PROMPTS, bound, guided_llm, padded, plain_model
from tests.oracle import chi_squared_p, enumerate_policy, guided_policy
from vas_engine import InvalidArgumentError, NonFiniteError, SamplingParams
from vas_engine.integrations.transformers import ValueLogitsProcessor
from vas_engine.model import CausalLM
from vas_engine.values.artifact import save_value

WEIGHTS = {"kind": 2.0}
FORMS = [
    {},
    {"tail": "drop"},
    {"baseline": "candidate-mean"},
    {"advantage_clip": 0.3, "tail": "drop"},
    {"num_candidates": 1},
    {"num_candidates": 31},
]


def processor(model, mask, **options) -> ValueLogitsProcessor:
    return ValueLogitsProcessor(model, {"kind": bound("model", model)}, WEIGHTS, mask, **options)


def generate(model, guide, inputs, **options) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    sequences = model.generate(**inputs, logits_processor=LogitsProcessorList([guide]), **options)
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f"{v}" for v in f.values()) or "default")
def test_greedy_tokens_are_the_engines(model, form: dict) -> None:
    form = {"num_candidates": 8, **form}
    params = SamplingParams(temperature=0.0, max_tokens=12, values=WEIGHTS, **form)
    llm = guided_llm(model, {"kind": bound("model", model)})
    expected = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    inputs = padded(PROMPTS)
    rows = generate(model, processor(model, inputs["attention_mask"], **form), inputs).tolist()
    assert [row[: len(tokens)] for row, tokens in zip(rows, expected, strict=True)] == expected
    assert all(set(row[len(tokens) :]) <= {PAD} for row, tokens in zip(rows, expected, strict=True))


def test_scores_are_the_guided_policy_wherever_the_rows_go(model) -> None:
    """Rows that go on with a candidate, with a token of the tail, or that have ended; each step against the oracle."""
    lm = CausalLM.load(copy.deepcopy(model))
    net = bound("model", model)
    params = SamplingParams(values=WEIGHTS, num_candidates=5, temperature=0.7, top_k=9)
    base = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)])
    inputs = padded(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    guide = processor(model, mask, base=base, num_candidates=5)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        policy = torch.softmax(guide(ids, logits).double(), -1)
        for row in range(3):
            prefix = ids[row][mask[row].bool()].tolist()
            if EOS in prefix:
                continue
            expected = guided_policy(lm, {"kind": (net, 0)}, params, prefix)
            torch.testing.assert_close(policy[row], expected, rtol=1e-3, atol=1e-5)
        token = policy.argmax(1)
        token[step % 3] = torch.randint(EOS, (), generator=generator)
        token[2] = EOS if step == 3 else token[2]
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def test_all_candidates_of_all_rows_are_one_forward_and_ended_rows_cost_nothing(model, monkeypatch) -> None:
    inputs = padded(PROMPTS)
    guide = processor(model, inputs["attention_mask"], num_candidates=4, eos_token_id=[EOS, 5, 6, 7, 8, 9, 10])
    value = guide.values.models["kind"]
    rows: list[int] = []
    score = value.score

    def counted(tokens, *rest):
        rows.append(len(tokens))
        return score(tokens, *rest)

    monkeypatch.setattr(value, "score", counted)
    ids = inputs["input_ids"]
    logits = torch.zeros(3, 31).scatter_(1, torch.tensor([[1, 2, 3, 4]] * 3), 5.0)
    guide(ids, logits)
    guide(torch.cat([ids, torch.tensor([[1], [5], [2]])], 1), logits)
    assert rows == [sum(map(len, PROMPTS)) + 3 * 4, 2 * 4]


@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_frequencies_follow_the_guided_policy(world, tail: str) -> None:
    net = world.network("model")
    params = SamplingParams(values={"ones": 1.3, "ended": -1.5}, num_candidates=3, temperature=0.8, tail=tail)
    expected = enumerate_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, PROMPT, HORIZON, {WORLD_EOS})
    model = plain_model(world.lm)
    guide = ValueLogitsProcessor(
        model, {"": net}, dict(params.values), num_candidates=3, tail=tail,
        base=LogitsProcessorList([TemperatureLogitsWarper(0.8)]),
    )  # fmt: skip
    set_seed(4)
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long)}
    rows = generate(
        model, guide, inputs, do_sample=True, top_k=0, max_new_tokens=HORIZON, num_return_sequences=1200,
        pad_token_id=WORLD_EOS,
    ).tolist()  # fmt: skip
    counts = Counter(tuple(row[: row.index(WORLD_EOS) + 1] if WORLD_EOS in row else row) for row in rows)
    assert chi_squared_p(counts, expected, 1200) > 1e-4
    plain = enumerate_policy(world.lm, {}, SamplingParams(temperature=0.8), PROMPT, HORIZON, {WORLD_EOS})
    assert chi_squared_p(counts, plain, 1200) < 1e-4


def test_tokens_are_those_of_the_correct_port_of_the_papers_processor(model) -> None:
    """benchmarks/peers.py, the same method on a cache of transformers."""
    ours = bound("model", model)
    twin = bound("model", model)
    theirs = twin.lm_of_values.model
    backbone = type(theirs)(copy.deepcopy(theirs.config)).eval()
    backbone.load_state_dict(theirs.state_dict())
    backbone.set_attn_implementation("eager")
    inputs = padded(PROMPTS)
    peer = SharedCacheValueProcessor(
        backbone.model, lambda hidden: twin.heads.mean(twin.heads(hidden)),
        inputs["attention_mask"], weight=2.0, num_candidates=8,
    )  # fmt: skip
    guide = ValueLogitsProcessor(
        model, {"kind": ours}, WEIGHTS, inputs["attention_mask"], num_candidates=8, baseline="candidate-mean"
    )
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        set_seed(6)
        expected = generate(model, peer, inputs, **sampling)
        guide._seen, guide._caches = None, [type(cache)(cache.value) for cache in guide._caches]
        set_seed(6)
        assert torch.equal(generate(model, guide, inputs, **sampling), expected)


def test_beams_and_a_second_call_are_refused(model) -> None:
    inputs = padded(PROMPTS)
    with pytest.raises(InvalidArgumentError, match="use no beams"):
        generate(model, processor(model, inputs["attention_mask"]), inputs, num_beams=3)
    mask = inputs["attention_mask"].repeat_interleave(4, 0)
    with pytest.raises(InvalidArgumentError, match="num_beams=1"):
        generate(model, processor(model, mask), inputs, num_beams=4)
    guide = processor(model, inputs["attention_mask"])
    generate(model, guide, inputs, max_new_tokens=2)
    with pytest.raises(InvalidArgumentError, match="one processor a call"):
        generate(model, guide, inputs, max_new_tokens=2)


def test_bad_arguments_and_values_are_named(model, tmp_path) -> None:
    save_value(tmp_path / "reader", bound("reader", model))
    with pytest.raises(InvalidArgumentError, match="kind 'reader'"):
        ValueLogitsProcessor(model, {"kind": tmp_path / "reader"}, WEIGHTS)
    with pytest.raises(InvalidArgumentError, match="did you mean 'kind'"):
        ValueLogitsProcessor(model, {"kind": bound("model", model)}, {"kid": 1.0})
    with pytest.raises(InvalidArgumentError, match="pad on the left"):
        processor(model, torch.tensor([[1, 1, 0]]))
    net = bound("model", model)
    with torch.no_grad():
        net.heads.output.bias.fill_(float("nan"))
    guide = ValueLogitsProcessor(model, {"kind": net}, WEIGHTS)
    with pytest.raises(NonFiniteError):
        guide(torch.tensor([[1, 2]]), torch.zeros(1, 31))
