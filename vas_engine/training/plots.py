"""Pictures of a fit: learning curves, R² by position, calibration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vas_engine.errors import VASError
from vas_engine.files import replacing
from vas_engine.training.report import FitReport, HeadReport

__all__ = ["PLOT_FILE", "can_plot", "save_plots"]

PLOT_FILE = "training.png"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_plots(folder: str | Path, report: FitReport) -> Path:
    """Draw a report into the folder of its value, a row of pictures for each head; whole or not at all.

    Raises:
        VASError: matplotlib is not installed.
    """
    if not can_plot():
        raise VASError('plots need matplotlib: pip install "vas-engine[plot]", or leave them out')
    # Figure and not pyplot: no window system, nothing kept between calls.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6 * len(report.heads)), layout="constrained")
    axes = figure.subplots(len(report.heads), 3, squeeze=False)
    for (name, head), (curve, place, calibration) in zip(report.heads.items(), axes, strict=True):
        _draw_curve(curve, report, name)
        _draw_positions(place, name, head)
        _draw_calibration(calibration, name, head)
    path = Path(folder) / PLOT_FILE
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=110)
    return path


def _draw_curve(axes: Any, report: FitReport, name: str) -> None:
    epochs = [epoch.epoch for epoch in report.epochs]
    axes.plot(epochs, [epoch.r_squared[name] for epoch in report.epochs], "o-", label="held-out R²")
    if report.teacher:
        axes.plot(epochs, [epoch.agreement[name] for epoch in report.epochs], "s-", label="agreement with the teacher")
    axes.axvline(report.best_epoch, color="grey", linestyle=":", label="kept")
    loss = axes.twinx()
    loss.plot(epochs, [epoch.train_loss for epoch in report.epochs], "x--", color="tab:red", label="training loss")
    loss.set_ylabel("training loss")
    axes.set(xlabel="epoch", ylabel="R²", title=f"{name}: learning")
    axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [*axes.get_lines(), *loss.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small")


def _draw_positions(axes: Any, name: str, head: HeadReport) -> None:
    series = [("reward received", head.by_position)]
    if head.branching:
        series.append(("mean of completions, noise taken out", head.branching.by_position))
    for label, bins in series:
        known = [(0.5 * (b.start + b.stop - 1), b.r_squared) for b in bins if b.r_squared is not None]
        axes.plot(*zip(*known, strict=True), "o-", label=label) if known else None
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="tokens of the response so far", ylabel="held-out R²", title=f"{name}: by position")
    axes.legend(fontsize="small")


def _draw_calibration(axes: Any, name: str, head: HeadReport) -> None:
    predicted = [b.predicted for b in head.calibration]
    received = [b.received for b in head.calibration]
    axes.errorbar(predicted, received, [2 * b.error for b in head.calibration], fmt="o", capsize=2, label="± 2 errors")
    ends = [min(predicted + received), max(predicted + received)]
    axes.plot(ends, ends, color="grey", linewidth=0.8, label="calibrated")
    axes.set(xlabel="predicted", ylabel="received", title=f"{name}: calibration")
    axes.legend(fontsize="small")
