"""What a contest found: table, JSON, Parquet and plots, in one folder that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.estimate import Estimate
from vas_engine.evaluation.frontier import Contest, Point, plain_json
from vas_engine.evaluation.headline import Headline
from vas_engine.files import replacing, write_json
from vas_engine.prompts import read_prompts

__all__ = ["Evaluation", "Section", "check_out", "save", "table"]


@dataclass(frozen=True)
class Section:
    """Methods after one objective, beside plain sampling, best-of-n and the exact optimum.

    Attributes:
        name: of the objective.
        optimum: (KL, score) of the exact optimum, from the pool.
        points: plain sampling first.
    """

    name: str
    objective: dict[str, float]
    points: list[Point]
    optimum: tuple[list[float], list[float]]
    headlines: list[Headline] = field(default_factory=list)

    @property
    def best(self) -> list[Point]:
        return [point for point in self.points if point.method.startswith("best-of-n")]

    @property
    def curves(self) -> dict[str, list[Point]]:
        """Method -> its points by strength, those of best-of-n left out."""
        found: dict[str, list[Point]] = {}
        for point in self.points[1:]:
            if point not in self.best:
                found.setdefault(point.method, []).append(point)
        return {m: sorted(points, key=lambda p: p.strength or 0.0) for m, points in found.items()}


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        settings: of the contest.
        sections: one for each objective.
        composed: rewards that are composed.
        fronts: kind -> points, to be compared in all of these rewards at once.
    """

    settings: dict[str, Any]
    rewards: list[str]
    sections: list[Section]
    composed: list[str] = field(default_factory=list)
    fronts: dict[str, list[Point]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain_json(asdict(self))

    @property
    def points(self) -> list[Point]:
        """All points, each once."""
        every = [
            *(p for section in self.sections for p in section.points),
            *(p for f in self.fronts.values() for p in f),
        ]
        return list({point.label: point for point in every}.values())


# -- what people read ----------------------------------------------------------------------------------------------


def table(evaluation: Evaluation) -> str:
    """The measurements as text."""
    parts = [_section(section, evaluation.rewards) for section in evaluation.sections]
    if evaluation.fronts:
        parts.append(_fronts(evaluation))
    parts.append(
        "± 95 % interval over prompts. KL: nats per response, exact along samples; ≤ upper bound; ~ by log-ratios.\n"
        "efficiency: nats of the exact optimum at that score over those spent (blank: the pool does not reach it).\n"
        "At best-of-n's score: perplexity over plain sampling's; FLOPs and time of a token over best-of-n's.\n"
        "FLOPs of matrices, prompts included, for each delivered token. d-n: different n-grams of a response's tokens."
    )
    return "\n\n".join(parts)


def _section(section: Section, rewards: Sequence[str]) -> str:
    others = [name for name in rewards if name not in section.objective]
    head = [
        f"after {section.name}",
        *section.objective,
        *others,
        "KL",
        "efficiency",
        "perplexity",
        "d-1",
        "d-2",
        "d-3",
        "tokens",
        "FLOPs/token",
    ]
    rows = [
        [
            point.label,
            *(_estimate(point.rewards[name]) for name in (*section.objective, *others)),
            _kl(point),
            _estimate(point.efficiency, 2),
            f"{point.perplexity:.2f}",
            *(f"{share:.2f}" for share in point.distinct),
            f"{point.response_tokens:.0f}",
            f"{point.flops_per_token:.3g}",
            f"{point.tokens_per_second:,.0f}",
            _training(point),
        ]
        for point in section.points
    ]
    text = _render([[*head, "tokens/s", "training"], *rows])
    return f"{text}\n\n{_headlines(section.headlines)}" if section.headlines else text


def _headlines(lines: Sequence[Headline]) -> str:
    head = ["at the score of", "", "by", "strength", "KL", "efficiency", "perplexity", "FLOPs", "time"]
    rows = []
    for line in sorted(lines, key=lambda line: line.n):
        found = [
            f"{line.strength:.3g}",
            f"{line.kl:.2f}",
            "" if math.isnan(line.efficiency) else f"{line.efficiency:.2f}",
        ]
        found += [f"x{line.perplexity_ratio:.2f}", _part(line.flops_ratio), _part(line.time_ratio)]
        missed = ["not reached", f"at most {line.best:.3f}", *[""] * 4]
        rows.append([f"best of {line.n}", f"{line.target:.3f}", line.method, *(found if line.reached else missed)])
    return _render([head, *rows])


def _part(ratio: float) -> str:
    """What is spent, of what best-of-n spends."""
    return f"1/{ratio:.1f}" if ratio >= 1 else f"x{1 / ratio:.1f}"


def _fronts(evaluation: Evaluation) -> str:
    rows = [
        [
            f"{'* ' if point in pareto(points, evaluation.composed) else '  '}{point.label}",
            *(_estimate(point.rewards[name]) for name in evaluation.rewards),
            _kl(point),
            _estimate(point.efficiency, 2),
            f"{point.perplexity:.2f}",
            f"{point.flops_per_token:.3g}",
            f"{point.tokens_per_second:,.0f}",
        ]
        for points in evaluation.fronts.values()
        for point in points
    ]
    head = ["compositions", *evaluation.rewards, "KL", "efficiency", "perplexity", "FLOPs/token", "tokens/s"]
    return (
        _render([head, *rows])
        + "\n* none of its kind has more of one and no less of the others of: "
        + ", ".join(evaluation.composed)
        + ""
    )


def pareto(points: Sequence[Point], rewards: Sequence[str]) -> list[Point]:
    """Those that no other point beats in one reward without losing in another."""

    def means(point: Point) -> list[float]:
        return [point.rewards[name].mean for name in rewards]

    def beaten(point: Point) -> bool:
        own = means(point)
        return any(
            all(a >= b for a, b in zip(means(other), own, strict=True)) and means(other) != own for other in points
        )

    return [point for point in points if not beaten(point)]


def _estimate(estimate: Estimate, digits: int = 3) -> str:
    if math.isnan(estimate.mean):
        return ""
    if math.isnan(estimate.low):
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def _kl(point: Point) -> str:
    mark = {"bound": "≤ ", "log-ratio": "~ "}.get(point.kl_kind, "")
    return mark + _estimate(point.kl, 2)


def _training(point: Point) -> str:
    parts = []
    if "rollouts" in point.training:
        parts.append(f"{point.training['rollouts']:,.0f} rollouts")
    if "seconds" in point.training:
        parts.append(f"{point.training['seconds']:,.0f} s")
    return ", ".join(parts)


def _render(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def render(line: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(lines[0]), rule, *(render(line) for line in lines[1:])])


# -- files ---------------------------------------------------------------------------------------------------------


def check_out(out: str | Path) -> Path:
    """The folder that is to be made; it must not exist, or be empty.

    Raises:
        InvalidArgumentError: it holds something.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidArgumentError("out", str(out), "exists already; choose a new folder")
    return path


def save(out: str | Path, evaluation: Evaluation, contest: Contest) -> Path:
    """Write ``evaluation.json``, ``points.parquet``, ``responses.parquet`` and the plots.

    Raises:
        InvalidArgumentError: the folder holds something.
    """
    path = check_out(out)
    with replacing(path) as folder:
        folder.mkdir(parents=True)
        write_json(folder / "evaluation.json", evaluation.to_dict())
        _save_points(folder / "points.parquet", evaluation)
        _save_responses(folder / "responses.parquet", contest)
        for section in evaluation.sections:
            suffix = f"_{section.name}" if len(evaluation.sections) > 1 else ""
            plot_kl(section, folder / f"kl{suffix}.png")
            plot_flops(section, folder / f"flops{suffix}.png")
        if evaluation.fronts:
            plot_fronts(evaluation, folder / "pareto.png")
    return path


def _save_points(path: Path, evaluation: Evaluation) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = []
    for point in evaluation.points:
        record = point.to_dict()
        row: dict[str, Any] = {}
        for name, value in record.items():
            if name == "rewards":
                for reward, estimate in value.items():
                    row |= _columns(f"reward.{reward}", estimate)
            elif name in ("score", "kl", "efficiency"):
                row |= _columns(name, value)
            elif name == "distinct":
                row |= {f"distinct_{n}": share for n, share in enumerate(value, start=1)}
            elif isinstance(value, dict):
                row[name] = json.dumps(value, ensure_ascii=False)
            else:
                row[name] = value
        rows.append(row)
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def _columns(name: str, estimate: dict[str, Any]) -> dict[str, Any]:
    return {name: estimate["mean"], f"{name}.low": estimate["low"], f"{name}.high": estimate["high"]}


def _save_responses(path: Path, contest: Contest) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    prompts = [prompt.text for prompt in read_prompts(contest.prompts)]
    rows: list[dict[str, Any]] = []
    for label, found in contest.runs.items():
        pools = contest.found[label].pools
        columns = {f"reward.{name}": [r for pool in pools[name] for r in pool] for name in pools}
        for place, response in enumerate(found.responses):
            rows.append(
                {
                    "label": label,
                    "prompt_index": response.prompt,
                    "prompt": prompts[response.prompt],
                    "response": response.text,
                    "response_ids": response.token_ids,
                    "finish_reason": response.finish_reason,
                    "log_prob": response.log_prob,
                    "kl": response.kl,
                    **{name: column[place] for name, column in columns.items()},
                }
            )
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


# -- plots ---------------------------------------------------------------------------------------------------------


def plot_kl(section: Section, path: Path) -> None:
    """Score against KL, as PNG: methods, best-of-n and the exact optimum."""
    with _figure(path) as [axis]:
        axis.plot(*section.optimum, "k-", linewidth=1, label="exact optimum")
        axis.plot([0.0], [section.points[0].score.mean], "ko", label="base")
        for points, style, label in _styled(section):
            kl = [point.kl.mean for point in points]
            axis.plot(kl, [point.score.mean for point in points], style, label=label)
            low, high = ([getattr(p.score, end) for p in points] for end in ("low", "high"))
            axis.fill_between(kl, low, high, alpha=0.15)
        axis.set(xlabel="KL to the frozen model (nats per response)", ylabel=f"mean {section.name}")
        # Rewards near the base grow with the root of the divergence.
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))


def plot_flops(section: Section, path: Path) -> None:
    """Score against model FLOPs per delivered token (logarithmic), as PNG."""
    with _figure(path) as [axis]:
        base = section.points[0]
        axis.plot([base.flops_per_token], [base.score.mean], "ko", label="base")
        for points, style, label in _styled(section):
            axis.plot([p.flops_per_token for p in points], [p.score.mean for p in points], style, label=label)
        axis.set(xlabel="model FLOPs per delivered token", ylabel=f"mean {section.name}", xscale="log")


def plot_fronts(evaluation: Evaluation, path: Path) -> None:
    """Every two of the composed rewards, as PNG; lines join each kind's Pareto front."""
    pairs = list(combinations(evaluation.composed, 2))
    with _figure(path, len(pairs)) as axes:
        for axis, (first, second) in zip(axes, pairs, strict=True):
            for label, points in evaluation.fronts.items():
                [dots] = axis.plot(*_means(points, first, second), "o", markersize=4)
                front = sorted(pareto(points, [first, second]), key=lambda p: p.rewards[first].mean)
                axis.plot(*_means(front, first, second), "-", color=dots.get_color(), label=label)
            axis.set(xlabel=f"mean {first}", ylabel=f"mean {second}")


def _means(points: Sequence[Point], *rewards: str) -> list[list[float]]:
    return [[point.rewards[name].mean for point in points] for name in rewards]


def _styled(section: Section) -> Iterator[tuple[list[Point], str, str]]:
    for index, (method, points) in enumerate(section.curves.items()):
        # Colours come again after ten.
        yield points, "o^vD"[index // 10 % 4] + "-", method
    if section.best:
        yield section.best, "s--", "best-of-n (KL: upper bound)"


@contextmanager
def _figure(path: Path, panels: int = 1) -> Iterator[Any]:
    """Axes of a figure that is saved in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(7 * panels, 4.5), layout="constrained", squeeze=False)
    try:
        yield axes[0]
        for axis in axes[0]:
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
