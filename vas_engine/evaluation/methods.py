"""Ways to follow a value that are settings of this engine, under the names they are known by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.evaluation.frontier import Setting
from vas_engine.evaluation.log_probability import LogProbability
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig
from vas_engine.values.scorer import check_tilt

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["METHODS", "Method", "check_settings", "grid", "log_name", "steered_rewards", "sweep", "with_logs"]

LOG_PREFIX = "log "


@dataclass(frozen=True)
class Method:
    """A published method as settings of the engine.

    Attributes:
        source: where it comes from, and what it is here.
        changes: of plain SamplingParams, the weights aside.
        of_logs: the value is replaced by its logarithm (see `LogProbability`).
    """

    source: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    of_logs: bool = False


METHODS = {
    "vas": Method("Han et al. 2024: weight times the advantage of the 20 best candidates, the tail kept"),
    "qsharp": Method(
        "Zhou et al. 2025 (Q#): log E[exp(w R)] of a distributional head, the exact tilt for any weight",
        {"tilt": "optimal"},
    ),
    "args": Method(
        "Khanov et al. 2024 (ARGS): log-probability plus weight times value over the 10 best tokens, sampled; "
        "the value stands in for the reward of the unfinished text",
        {"num_candidates": 10, "tail": "drop"},
    ),
    "args-greedy": Method("the same, the best token taken", {"num_candidates": 10, "tail": "drop", "temperature": 0.0}),
    "fudge": Method(
        "Yang and Klein 2021 (FUDGE): probability times the attribute's probability to the weight, over 200 tokens; "
        "the value of a bounded head, brought to [0, 1], is that probability",
        {"num_candidates": 200, "tail": "drop"},
        of_logs=True,
    ),
}


def sweep(
    llm: LLM,
    method: str,
    value: str,
    reward: str,
    strengths: Sequence[float],
    scale: float,
    base: SamplingParams,
    changes: Mapping[str, Any] | None = None,
) -> list[Setting]:
    """One method and value along its weights.

    Args:
        method: of `METHODS`. value: name of a loaded value. reward: that it is about.
        strengths: nats per standard deviation of the reward; for FUDGE, the exponent itself.
        scale: that standard deviation.
        base: what all methods share.
        changes: further settings of the method's, in place of its own.
    """
    if method not in METHODS:
        raise InvalidArgumentError("method", method, nearest(method, METHODS))
    chosen = METHODS[method]
    settings = {**chosen.changes, **(changes or {})}
    settings["num_candidates"] = min(settings.get("num_candidates", base.num_candidates), llm.lm.vocab_size)
    label = method if len(_heads(llm)) == 1 else f"{method} {value}"
    weighted = log_name(value) if chosen.of_logs else value
    return [
        Setting(
            f"{label} {strength:g}",
            label,
            base.replace(values={weighted: strength if chosen.of_logs else strength / scale}, **settings),
            {reward: 1.0},
            strength,
        )
        for strength in strengths
    ]


def grid(
    values: Mapping[str, str],
    strengths: Sequence[Mapping[str, float]],
    scales: Mapping[str, float],
    base: SamplingParams,
    changes: Mapping[str, Any] | None = None,
) -> list[Setting]:
    """Compositions of several values: every combination of strengths with at least one that is not zero.

    Args:
        values: reward -> name of the value that steers it.
        strengths: reward -> nats per standard deviation, for each combination.
        scales: those standard deviations.
    """
    settings = []
    for combination in strengths:
        weights = {reward: strength / scales[reward] for reward, strength in combination.items() if strength}
        if not weights:
            continue
        params = base.replace(values={values[reward]: weight for reward, weight in weights.items()}, **(changes or {}))
        text = ", ".join(f"{reward} {strength:+g}" for reward, strength in combination.items())
        settings.append(Setting(text, "composition", params, weights))
    return settings


def check_settings(llm: LLM, settings: Iterable[Setting]) -> None:
    """Whether they can run with the values that are loaded.

    Raises:
        InvalidArgumentError: one that cannot.
    """
    for setting in settings:
        setting.params.check(vocab_size=llm.lm.vocab_size, value_names=llm.value_names)
        try:
            check_tilt(setting.params, llm.engine.guide.heads)
        except InvalidArgumentError as error:
            raise InvalidArgumentError("tilt", error.value, f"{error.fix}, or leave out {setting.method!r}") from None


def steered_rewards(llm: LLM, rewards: Sequence[str]) -> dict[str, str]:
    """Value name -> the reward it is about: the one of its own name, else the one that its head was trained on.

    Raises:
        InvalidArgumentError: a value about none of the rewards.
    """
    found = {}
    for name, head in _heads(llm).items():
        reward = next((r for r in (name, head.reward, head.name) if r in rewards), None)
        if reward is None:
            fix = f"it is about the reward {head.reward!r}; give --reward {head.reward}=SPEC"
            raise InvalidArgumentError("--value", name, fix)
        found[name] = reward
    return found


def with_logs(values: Any) -> Any:
    """The same values, and beside each the network of its logarithms, which FUDGE follows.

    Args:
        values: {name: folder}.

    Raises:
        InvalidArgumentError: a folder without a name.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgumentError("--value", values, "for fudge write NAME=FOLDER")
    return {**values, **{LOG_PREFIX + name: LogProbability(folder) for name, folder in values.items()}}


def log_name(value: str) -> str:
    """Name of a value's logarithm."""
    return LOG_PREFIX + value


def _heads(llm: LLM) -> dict[str, HeadConfig]:
    """Value name -> its head, logarithms of values left out."""
    guide = llm.engine.guide
    logs = [network.columns for network in guide.networks if isinstance(network.scorer, LogProbability)]
    left_out = {name for columns in logs for name in guide.value_names[columns]}
    return {name: head for name, head in guide.heads.items() if name not in left_out}
