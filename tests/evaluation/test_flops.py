import pytest

from tests.evaluation.conftest import word_model
from vas_engine.evaluation.flops import decoding_flops, matrix_weights, model_flops
from vas_engine.model.lm import CausalLM
from vas_engine.values.config import default_config
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel

# Two layers of: queries and output 32 x 32, keys and values 32 x 16, gate, up and down 32 x 32.
LAYERS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32)
VOCABULARY = 6 * 32


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.load(word_model(), device="cpu", dtype="float32")


def test_a_language_model(lm):
    assert model_flops(lm, rows=10, tokens=3) == 2 * (LAYERS * 10 + VOCABULARY * 3)


def test_a_tied_vocabulary_counts_once_a_token():
    model = word_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lm = CausalLM.load(model, device="cpu", dtype="float32")
    assert model_flops(lm, rows=10, tokens=3) == 2 * (LAYERS * 10 + VOCABULARY * 3)


def test_a_side_network(lm):
    """Its candidates' embeddings come from a table, its state's projection is made once a token."""
    network = ValueNetwork(default_config("side", lm, ["v"])).bind(lm)
    width, states = network.config.width, len(network.config.states) * 32
    place = network.place_weight.numel()
    layers = sum(w.numel() for w in network.layers.parameters() if w.ndim > 1)
    heads = width * width + width
    found = decoding_flops(lm, [network], model_rows=10, tokens=3, value_rows=63, prompt_rows=7)
    by_hand = (place + layers + heads) * (63 + 7) + states * width * 3
    assert found - model_flops(lm, 10, 3) == 2 * by_hand


def test_a_lookahead_head_projects_every_candidate(lm):
    network = ValueNetwork(default_config("lookahead", lm, ["v"])).bind(lm)
    found = decoding_flops(lm, [network], model_rows=70, tokens=3, value_rows=63, prompt_rows=7)
    assert found - model_flops(lm, 70, 3) == 2 * matrix_weights(network) * 63


def test_a_value_model(lm):
    """The paper's own count: a forward of the value model for each candidate, and over the prompt."""
    value = ValueModel.create(word_model(), lm, ["v"])
    found = decoding_flops(lm, [value], model_rows=10, tokens=3, value_rows=63, prompt_rows=7)
    assert found - model_flops(lm, 10, 3) == 2 * (LAYERS + 32) * 70
