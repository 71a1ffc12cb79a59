"""The peers pick exactly the tokens that full recomputation picks, whatever the batch, padding and k."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
)

from benchmarks.peers import (
    AllAtOnceValueProcessor,
    OneAtATimeValueProcessor,
    SharedCacheValueProcessor,
    ValueProcessor,
)
from vas_engine.errors import InvalidArgumentError, UnsupportedModelError

VOCAB = 97
PAD = 0
PROMPTS = [[5, 9, 17, 33, 2, 71, 8], [44, 3, 60], [12, 80, 7, 7, 91]]
FORMS = [OneAtATimeValueProcessor, AllAtOnceValueProcessor, SharedCacheValueProcessor]
WEIGHT = 3.0


def llama_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
    }
    return LlamaConfig(**settings | changes)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture(scope="module", params=["rotary", "learned positions"])
def backbone(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(1)
    if request.param == "rotary":
        return LlamaModel(llama_config(hidden_size=16, num_hidden_layers=3)).eval()
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2Model(config).eval()


@pytest.fixture(scope="module")
def head() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(16, 1)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def value(backbone: PreTrainedModel, head: nn.Module, tokens: list[int]) -> float:
    """V of one unpadded sequence, recomputed whole."""
    hidden = backbone(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state
    return head(hidden[0, -1].float()).item()


class Recomputing(LogitsProcessor):
    """The same function, one uncached and unpadded forward for every value."""

    def __init__(self, backbone, head, mask, num_candidates, baseline) -> None:
        self.backbone, self.head, self.baseline = backbone, head, baseline
        self.starts = (mask == 0).sum(1).tolist()
        self.num_candidates = num_candidates

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tilted = scores.clone()
        for row, start in enumerate(self.starts):
            prefix = input_ids[row, start:].tolist()
            tokens = scores[row].topk(min(self.num_candidates, VOCAB)).indices.tolist()
            tokens = [t for t in tokens if scores[row, t] > -torch.inf]
            values = torch.tensor([value(self.backbone, self.head, [*prefix, t]) for t in tokens])
            centre = values.mean()
            if self.baseline == "state":
                centre = value(self.backbone, self.head, prefix)
            tilted[row, tokens] += WEIGHT * (values - centre)
        return tilted


def generate(base, prompts: list[list[int]], processor: LogitsProcessor | None, **options) -> torch.Tensor:
    ids, mask = padded(prompts)
    torch.manual_seed(7)
    return base.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([processor] if processor else []),
        **options,
    )[:, ids.shape[1] :]


def peer(form, backbone, head, mask, k: int, baseline: str = "candidate-mean") -> ValueProcessor:
    return form(backbone, head, mask, weight=WEIGHT, num_candidates=k, baseline=baseline)


SAMPLING = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 0}}


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_full_recomputation(form, k, sampling, base, backbone, head) -> None:
    _, mask = padded(PROMPTS)
    for baseline in ("candidate-mean", "state"):
        expected = generate(base, PROMPTS, Recomputing(backbone, head, mask, k, baseline), **sampling)
        tokens = generate(base, PROMPTS, peer(form, backbone, head, mask, k, baseline), **sampling)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_tilt_changes_what_is_generated(form, base, backbone, head) -> None:
    # Otherwise the equalities above would hold for a processor that does nothing.
    _, mask = padded(PROMPTS)
    plain = generate(base, PROMPTS, None, do_sample=False)
    tilted = generate(base, PROMPTS, peer(form, backbone, head, mask, 20), do_sample=False)
    assert not torch.equal(tilted, plain)


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_full_recomputation(form, base, backbone, head) -> None:
    ids, mask = padded(PROMPTS)
    processor = peer(form, backbone, head, mask, 9)
    generator = torch.Generator().manual_seed(3)
    for step in range(6):
        processor(ids, torch.randn(3, VOCAB, generator=generator))
        prefixes = [row[mask_row == 0].numel() for row, mask_row in zip(ids, mask, strict=False)]
        for row, start in enumerate(prefixes):
            prefix = ids[row, start:].tolist()
            expected = [value(backbone, head, [*prefix, t]) for t in processor.candidates[row].tolist()]
            torch.testing.assert_close(processor.values[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        # Row 0 goes on with a candidate every time, the others with tokens of the tail every second time.
        following = processor.candidates[:, step % 9].clone()
        following[1:] = torch.where(torch.tensor(step % 2 == 0), following[1:], 96 - step)
        ids = torch.cat([ids, following[:, None]], dim=1)
        mask = nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_leaves_its_prefix_is_computed_anew(form, backbone, head) -> None:
    ids, mask = padded(PROMPTS)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    processor = peer(form, backbone, head, mask, 5)
    processor(ids, logits)
    other = ids.clone()
    other[2, -2] = 55  # row 0 is as before
    longer = torch.cat([other, torch.tensor([[3], [4], [6]])], dim=1)
    processor(longer, logits)
    prefix = longer[2, 2:].tolist()
    expected = [value(backbone, head, [*prefix, t]) for t in processor.candidates[2].tolist()]
    torch.testing.assert_close(processor.values[2], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_more_candidates_than_tokens_and_banned_tokens(form, base, backbone, head) -> None:
    ids, mask = padded(PROMPTS)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    logits[:, 10:] = -torch.inf
    expected = Recomputing(backbone, head, mask, 500, "candidate-mean")(ids, logits)
    tilted = peer(form, backbone, head, mask, 500)(ids, logits)
    torch.testing.assert_close(tilted, expected, rtol=1e-4, atol=1e-4)
    assert torch.isneginf(tilted[:, 10:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_outside_the_candidates_keep_their_logits(form, backbone, head) -> None:
    ids, mask = padded(PROMPTS)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(6))
    changed = peer(form, backbone, head, mask, 20)(ids, logits) != logits
    assert changed.sum(1).tolist() == [20, 20, 20]


def test_bad_arguments_name_themselves(backbone, head) -> None:
    _, mask = padded(PROMPTS)
    with pytest.raises(InvalidArgumentError, match="num_candidates=0"):
        peer(AllAtOnceValueProcessor, backbone, head, mask, 0)
    with pytest.raises(InvalidArgumentError, match="did you mean 'state'"):
        peer(AllAtOnceValueProcessor, backbone, head, mask, 3, baseline="stat")
    with pytest.raises(InvalidArgumentError, match="pad on the left"):
        peer(AllAtOnceValueProcessor, backbone, head, mask.flip(1), 3)
    twice = torch.ones(6, 7, dtype=torch.long)
    with pytest.raises(InvalidArgumentError, match="3 rows"):
        peer(AllAtOnceValueProcessor, backbone, head, mask, 3)(twice, torch.zeros(6, VOCAB))


def test_a_windowed_value_model_is_refused(head) -> None:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        AllAtOnceValueProcessor(MistralModel(config), head, torch.ones(1, 3))
