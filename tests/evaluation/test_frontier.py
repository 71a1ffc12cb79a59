import math

import pytest

from tests.evaluation.conftest import PROMPTS, TableValue, word_model
from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.frontier import Contest, Setting
from vas_engine.evaluation.methods import sweep
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.training.rewards import FunctionReward

WORTH = {"": -1.0, "<s>": 0.5, "a": 1.0, "b": 0.0, "c": 2.0, "d": -2.0}


@pytest.fixture(scope="module")
def known(base):
    """One token a response, and its exact value: here the exact tilt is the optimum."""
    table = [[WORTH[word] for word in ("<s>", "", "a", "b", "c", "d")]]
    value = TableValue(base.lm, table)
    return LLM(word_model(), values={"worth": value}, tokenizer=base.tokenizer, device="cpu", dtype="float32")


def worth() -> FunctionReward:
    return FunctionReward("worth", lambda _, response: WORTH[response.strip()])


def test_the_exact_value_is_efficient(known):
    """Exact values and all tokens as candidates: efficiency 1 at every weight, of either sign."""
    base = SamplingParams(max_tokens=1, num_candidates=6, skip_special_tokens=False)
    contest = Contest(known, PROMPTS, [worth()], base, samples=600, pool=1000)
    points = contest.measure(sweep(known, "vas", "worth", "worth", [-2.0, 2.0], contest.scales["worth"], base))
    for point in points:
        assert point.kl_kind == "exact"
        assert point.kl.mean > 0.02
        assert point.efficiency.mean == pytest.approx(1.0, abs=0.1)
        assert point.optimum_kl == pytest.approx(point.kl.mean, rel=0.1)
    scores = [point.score.mean for point in points]
    assert scores == sorted(scores)


def test_a_wrong_value_is_not_efficient(known):
    """The same nats, after something else."""
    other = dict(zip(WORTH, [*list(WORTH.values())[2:], *list(WORTH.values())[:2]], strict=True))
    decoy = FunctionReward("decoy", lambda _, response: other[response.strip()])
    base = SamplingParams(max_tokens=1, num_candidates=6, skip_special_tokens=False)
    contest = Contest(known, PROMPTS, [decoy], base, samples=200, pool=500)
    [point] = contest.measure(sweep(known, "vas", "worth", "decoy", [1.0], contest.scales["decoy"], base))
    assert point.kl.mean > 0.02
    assert point.efficiency.mean < 0.6


def test_best_of_n_by_one_reward_and_by_a_sum(llm, reward):
    length = FunctionReward("length", lambda _, response: float(len(response)))
    contest = Contest(llm, PROMPTS, [reward, length], SamplingParams(max_tokens=6), pool=40)
    base = contest.base({"a": 1.0})
    assert (base.kl.mean, base.kl_kind) == (0.0, "exact")
    one, four, forty = contest.best_of_n([1, 4, 40], {"a": 1.0}, "a")
    assert one.rewards["a"].mean == pytest.approx(base.rewards["a"].mean)
    assert one.perplexity == pytest.approx(base.perplexity)
    assert one.distinct == pytest.approx(base.distinct)
    assert four.rewards["a"].mean > one.rewards["a"].mean
    assert (four.kl.mean, four.kl_kind) == (pytest.approx(math.log(4) - 0.75), "bound")
    # What four responses cost, over the tokens of the one that is kept.
    for name in ("flops_per_token", "seconds_per_token", "model_rows_per_token"):
        spent = getattr(four, name) * four.response_tokens
        assert spent == pytest.approx(4 * getattr(base, name) * base.response_tokens)
    # The best of all forty is known: one response for each prompt (or several alike).
    assert forty.rewards["a"].mean == pytest.approx(sum(max(pool) for pool in contest.plain.pools["a"]) / 4)
    [by_sum] = contest.best_of_n([4], {"a": 1.0, "length": -1.0}, "sum")
    assert by_sum.rewards["length"].mean < four.rewards["length"].mean
    assert by_sum.score.mean == pytest.approx(by_sum.rewards["a"].mean - by_sum.rewards["length"].mean)


def test_arguments_that_cannot_work(llm, reward):
    base = SamplingParams(max_tokens=2)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        Contest(llm, [], [reward], base)
    with pytest.raises(InvalidArgumentError, match="pool"):
        Contest(llm, PROMPTS, [reward], base, pool=0)
    contest = Contest(llm, PROMPTS, [reward], base, samples=2, pool=4)
    with pytest.raises(InvalidArgumentError, match="use 1 to 4"):
        contest.best_of_n([5], {"a": 1.0})
    with pytest.raises(InvalidArgumentError, match="no reward of this name"):
        contest.base({"b": 1.0})
    setting = Setting("w", "vas", base.replace(values={"v": 1.0}, num_candidates=4), {"a": 1.0})
    contest.measure([setting])
    with pytest.raises(InvalidArgumentError, match="measured already"):
        contest.measure([setting])
