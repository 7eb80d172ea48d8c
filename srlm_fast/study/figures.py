"""The plots of a study's page, as SVG files. Matplotlib is the extra `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.study.statistics import Estimate

BLUE, ORANGE, GREY = "#2a6f97", "#d1495b", "#8d99ae"
Series = Mapping[str, tuple[Estimate, Sequence[float]]]
"""model -> (mean over seeds, the value of every seed)."""


def pyplot() -> Any:
    """Matplotlib with our settings: no display, and the same bytes for the same values.

    Raises:
        UserError: when it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plots need Matplotlib: pip install 'srlm-fast[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "srlm-fast", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def models(path: Path, panels: Mapping[str, tuple[Series, Mapping[str, float]]]) -> None:
    """One panel for each measure: means with intervals over the models, single seeds, and lines to compare with.

    Args:
        panels: title -> (values by model, {label: height of a dashed line}).
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.9), squeeze=False)
    for axis, (title, (series, lines)) in zip(axes[0], panels.items(), strict=True):
        places = range(len(series))
        means = [of_model.mean for of_model, _ in series.values()]
        axis.errorbar(places, means, yerr=_halves([e for e, _ in series.values()]), color=BLUE, marker="o", capsize=4)
        for place, (_, values) in zip(places, series.values(), strict=True):
            axis.scatter([place + 0.12] * len(values), values, s=9, color=GREY, zorder=3)
        for label, height in lines.items():
            axis.axhline(height, color=ORANGE, linestyle="--", linewidth=1)
            axis.annotate(
                label, (0.99, height), xycoords=("axes fraction", "data"), color=ORANGE, va="bottom", ha="right"
            )
        axis.set_xticks(places, [name.upper() for name in series])
        axis.set_title(title, fontsize=10)
    _save(plt, figure, path)


def bars(path: Path, panels: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Differences to the first arm, one panel for each measure, one bar for each arm."""
    plt = pyplot()
    n_bars = max(len(values) for values in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 0.9 + 0.3 * n_bars), squeeze=False, sharey=True
    )
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        places = range(len(values))
        found = list(values.values())
        axis.barh(places, [e.mean for e in found], xerr=_halves(found), color=BLUE, capsize=3, height=0.6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(places, list(values))
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", visible=False)
    axes[0][0].invert_yaxis()
    _save(plt, figure, path)


def histograms(path: Path, panels: Mapping[str, Mapping[int, float]]) -> None:
    """Shares of the scores 0 to 5, one panel for each."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 * len(panels), 2.3), squeeze=False, sharey=True)
    for axis, (title, shares) in zip(axes[0], panels.items(), strict=True):
        axis.bar(list(shares), list(shares.values()), color=BLUE)
        axis.set_xticks(range(6))
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", visible=False)
    _save(plt, figure, path)


def _halves(found: Sequence[Estimate]) -> list[float]:
    """Half widths for error bars; 0 where one seed gives none."""
    return [0.0 if e.n == 1 else e.half for e in found]


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
