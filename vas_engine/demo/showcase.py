"""The demonstration: a frozen model is sampled, two values are trained on its samples, and it follows them."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vas_engine import LLM, SamplingParams, arguments
from vas_engine.demo import model_path
from vas_engine.demo.corpus import OPENINGS
from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.frontier import Contest, Point, Setting, plain_json
from vas_engine.files import write_json
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.fit import FitConfig, fit, head_for
from vas_engine.training.network import make_network
from vas_engine.training.report import save_report
from vas_engine.training.rewards import load_rewards
from vas_engine.training.rollouts import Rollouts
from vas_engine.values.artifact import save_value
from vas_engine.values.config import KINDS

Say = Callable[[str], None]

SHOWN_SEED = 3
COMPOSED = "composition"
PARTIAL_REWARDS = 8
"""Tokens between the beginnings that are scored too."""
CONSISTENCY = 15.0
"""Of V's steps: less than is best with more of them, for a length is only decided where a text ends."""
ONE_THREAD = 5_000_000
"""Parameters under which torch gets one thread: a second one gains little on products this small, and on a machine
with other work each of them would wait for it."""


@dataclass(frozen=True)
class ShowcaseConfig:
    """Settings of the demonstration; the defaults end within three minutes on two cores.

    Attributes:
        model: folder or hub name; None is the model that ships with the package.
        prompts: openings to sample from; the first ``eval_prompts`` of them are measured.
        rewards: two descriptions ``name=spec`` as `vas collect` takes them.
        kind: of the value network; both rewards are heads of one network.
        samples: responses per prompt to train on.
        pool: plain responses per measured prompt, the pool that best-of-n draws from.
        guided_samples: responses per measured prompt and setting.
        strengths: weights in nats per standard deviation of the reward, so that they suit any reward.
        shown: strength of the texts that are shown and of the combinations of both rewards.
        best_of: sizes n, at most ``pool``.
    """

    model: str | None = None
    prompts: Sequence[str] = OPENINGS
    rewards: Sequence[str] = ("mood=vader", "length")
    kind: str = "side"
    samples: int = 192
    max_tokens: int = 112
    epochs: int = 5
    eval_prompts: int = 8
    pool: int = 128
    guided_samples: int = 16
    strengths: Sequence[float] = (2.0, 4.0, 8.0, 16.0)
    shown: float = 4.0
    best_of: Sequence[int] = (4, 16, 64, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.rewards) != 2:
            raise InvalidArgumentError("rewards", list(self.rewards), "give exactly two, each as name=spec")
        if not self.prompts:
            raise InvalidArgumentError("prompts", [], "give at least one opening")
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise InvalidArgumentError(
                    "prompts", prompt, "the demo goes on with texts; give openings, no conversations"
                )
        arguments.choice("kind", self.kind, [kind for kind in KINDS if kind != "model"])
        if max(self.best_of) > self.pool:
            raise InvalidArgumentError("best_of", max(self.best_of), f"use at most pool={self.pool}")


@dataclass(frozen=True)
class Row:
    """One way to decode, measured.

    Attributes:
        label: what the table shows.
        target: the one reward it is after; None for plain sampling and compositions.
        rewards: mean of each reward.
        errors: half of each mean's 95 % interval; NaN where one prompt does not tell.
        kl: nats per response; exact and measured, or the upper bound log n - (n-1)/n of best-of-n.
        kl_is_upper_bound: which of the two.
        tokens_per_second: of responses that are kept.
        model_rows: rows of the base model per kept token.
        value_rows: rows of the value network per kept token.
    """

    label: str
    target: str | None
    rewards: dict[str, float]
    errors: dict[str, float]
    kl: float
    kl_is_upper_bound: bool
    tokens_per_second: float
    model_rows: float
    value_rows: float


@dataclass
class Showcase:
    """All that the demonstration found; ``to_dict`` is what ``--json`` prints.

    Attributes:
        deviations: standard deviation of each reward under the frozen model; strength x is the weight x / deviation.
        r_squared: of the values, on held-out texts.
        seconds: of each part.
    """

    model: str
    reward_names: list[str]
    deviations: dict[str, float] = field(default_factory=dict)
    r_squared: dict[str, float] = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; a number that is not known is None."""
        return plain_json(asdict(self))


def run_showcase(config: ShowcaseConfig, out: Path, say: Say, use_tqdm: bool = True) -> Showcase:
    """Collect, train, show, measure; leaves rollouts, the value, ``showcase.json`` and ``frontier.png`` in ``out``.

    Args:
        config: what to do.
        out: a new or empty folder, or one of an earlier run of the same settings (its rollouts are used again).
        say: takes the headings and texts, a line at a time.
        use_tqdm: progress bars on stderr.
    """
    clock = _Clock()
    model = config.model or str(model_path())
    rewards = load_rewards(list(config.rewards))
    names = [reward.name for reward in rewards]
    result = Showcase(config.model or "the shipped demo model", names)

    say("1/5  Loading the frozen model")
    llm = LLM(model, max_num_seqs=256, max_num_batched_tokens=8192)
    say(f"     {result.model}: {llm.lm.num_parameters:,} parameters; nothing below changes a single one")

    if llm.lm.num_parameters < ONE_THREAD:
        torch.set_num_threads(1)

    say(f"2/5  Sampling {len(config.prompts) * config.samples:,} texts from it, to learn values from")
    settings = CollectConfig(config.samples, config.max_tokens, config.seed, partial_rewards=PARTIAL_REWARDS)
    rollouts = collect(llm, list(config.prompts), rewards, out / "rollouts", settings, use_tqdm=use_tqdm)
    clock.lap(result, "collect")

    say(f"3/5  Training one {config.kind} network with two heads: {names[0]} and {names[1]}")
    heads = [head_for(rollouts, name) for name in names]
    network = make_network(llm.lm, config.kind, heads, tokenizer=llm.tokenizer, seed=config.seed)
    course = FitConfig(epochs=config.epochs, batch_tokens=1024, seed=config.seed, consistency=CONSISTENCY)
    report = fit(llm.lm, network, rollouts, course, use_tqdm=use_tqdm)
    save_value(out / "value", network)
    save_report(out / "value", report)
    result.r_squared = {name: head.r_squared for name, head in report.heads.items()}
    for name, head in report.heads.items():
        say(
            f"     {name}: R² {head.r_squared:.2f} on held-out texts, {head.r_squared_last_quarter:.2f} near their ends"
        )
    clock.lap(result, "train")

    guided = LLM(model, values=str(out / "value"), max_num_seqs=256, max_num_batched_tokens=8192)
    scale = result.deviations = _deviations(rollouts, names)
    say("4/5  One prompt, one seed, steered each way")
    result.texts = _show_texts(guided, config, names, scale, say)
    clock.lap(result, "texts")

    say(f"5/5  Measuring on {min(config.eval_prompts, len(config.prompts))} prompts")
    result.rows = _measure_all(guided, config, rewards, names, scale, use_tqdm)
    clock.lap(result, "measure")
    write_json(out / "showcase.json", result.to_dict())
    return result


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self, result: Showcase, name: str) -> None:
        now = time.perf_counter()
        result.seconds[name], self.last = round(now - self.last, 2), now


def _deviations(rollouts: Rollouts, names: list[str]) -> dict[str, float]:
    table = rollouts.rewards(names)
    return {name: float(column.std()) for name, column in zip(names, table.unbind(1), strict=True)}


def _weights(scale: dict[str, float], strengths: dict[str, float]) -> dict[str, float]:
    return {name: strength / scale[name] for name, strength in strengths.items() if strength}


def _show_texts(
    llm: LLM, config: ShowcaseConfig, names: list[str], scale: dict[str, float], say: Say
) -> list[dict[str, str]]:
    first, second = names
    strength = config.shown
    wishes = {
        "plain": {},
        f"more {first}": {first: strength},
        f"less {first}": {first: -strength},
        f"more {second}": {second: strength},
        f"less {second}": {second: -strength},
        f"more {first}, more {second}": {first: strength, second: strength},
    }
    prompt = config.prompts[0]
    params = [
        SamplingParams(seed=config.seed + SHOWN_SEED, max_tokens=config.max_tokens, values=_weights(scale, wish))
        for wish in wishes.values()
    ]
    outputs = llm.generate([prompt] * len(params), params, use_tqdm=False)
    texts = []
    for label, output in zip(wishes, outputs, strict=True):
        text = prompt + output.outputs[0].text
        texts.append({"label": label, "text": text})
        say(f"\n     {label.upper()}\n       {text}")
    say("")
    return texts


def _measure_all(
    llm: LLM,
    config: ShowcaseConfig,
    rewards: list[Any],
    names: list[str],
    scale: dict[str, float],
    use_tqdm: bool,
) -> list[Row]:
    base = SamplingParams(max_tokens=config.max_tokens)
    contest = Contest(
        llm,
        config.prompts[: config.eval_prompts],
        rewards,
        base,
        samples=config.guided_samples,
        pool=config.pool,
        seed=config.seed,
        use_tqdm=use_tqdm,
    )

    def guided(label: str, method: str, wish: dict[str, float]) -> Setting:
        weights = _weights(scale, wish)
        return Setting(label, method, base.replace(values=weights), weights)

    first, second = names
    settings = [
        guided(f"guided, {name} x{strength:g}", name, {name: strength})
        for name in names
        for strength in config.strengths
    ]
    for up, down in itertools.product((config.shown, -config.shown), repeat=2):
        label = f"guided, {first} x{up:g} and {second} x{down:g}"
        settings.append(guided(label, COMPOSED, {first: up, second: down}))
    points: list[tuple[str | None, Point]] = [(None, contest.base({first: 1.0}))]
    points += [(None if p.method == COMPOSED else p.method, p) for p in contest.measure(settings)]
    points += [(name, p) for name in names for p in contest.best_of_n(config.best_of, {name: 1.0}, name)]
    return [_row(target, point) for target, point in points]


def _row(target: str | None, point: Point) -> Row:
    return Row(
        "plain" if point.method == "base" else point.label,
        target,
        {name: estimate.mean for name, estimate in point.rewards.items()},
        {name: (estimate.high - estimate.low) / 2 for name, estimate in point.rewards.items()},
        point.kl.mean,
        point.kl_kind == "bound",
        point.tokens_per_second,
        point.model_rows_per_token,
        point.value_rows_per_token,
    )


# -- what people look at ----------------------------------------------------------------------------------------


def table(result: Showcase) -> str:
    """The measurements as a text table."""
    first, second = result.reward_names
    head = ["", first, second, "KL (nats)", "tokens/s", "model rows/token", "value rows/token"]
    lines = [head]
    for row in result.rows:
        means = [_with_error(row.rewards[n], row.errors[n]) for n in (first, second)]
        bound = "at most " if row.kl_is_upper_bound else ""
        lines.append(
            [
                row.label,
                *means,
                f"{bound}{row.kl:.2f}",
                f"{row.tokens_per_second:,.0f}",
                f"{row.model_rows:.1f}",
                f"{row.value_rows:.1f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def render(line: list[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(head), rule, *(render(line) for line in lines[1:])])


def _with_error(mean: float, error: float) -> str:
    """A single prompt leaves some errors unknown."""
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ±{error:.2f}"


def curves(result: Showcase, name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Reward against KL: "guided" and "best-of-n", each as (KL, reward), from the plain point on."""
    plain = result.rows[0].rewards[name]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for label, bound in (("guided", False), ("best-of-n", True)):
        rows = sorted((r for r in result.rows if r.target == name and r.kl_is_upper_bound is bound), key=lambda r: r.kl)
        found[label] = ([0.0, *(r.kl for r in rows)], [plain, *(r.rewards[name] for r in rows)])
    return found


def save_plot(result: Showcase, path: Path) -> None:
    """Reward against KL, a panel per reward, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, result.reward_names, strict=True):
        for (label, (kl, reward)), style in zip(curves(result, name).items(), ("o-", "s--"), strict=True):
            bound = " (KL: upper bound)" if label == "best-of-n" else ""
            axis.plot(kl, reward, style, label=label + bound)
        axis.set(xlabel="KL to the frozen model (nats per text)", ylabel=f"mean {name}", title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def terminal_plot(result: Showcase, width: int = 78, height: int = 16) -> str:
    """The first reward's curves drawn in characters; colours only where stdout is a terminal."""
    import plotext

    name = result.reward_names[0]
    plotext.clear_figure()
    plotext.plotsize(width, height)
    for (label, (kl, reward)), marker in zip(curves(result, name).items(), ("o", "x"), strict=True):
        plotext.plot(kl, reward, label=label, marker=marker)
    plotext.title(f"mean {name} against KL to the frozen model (nats)")
    drawn = plotext.build()
    return drawn if sys.stdout.isatty() else plotext.uncolorize(drawn)
