"""``report.html``: curves and pictures of a run in one self-contained file."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import write_text
from .packages import pip_install
from .run import Run
from .train import PARTS

STYLE = """body { font: 15px system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; vertical-align: top }
figure { display: inline-block; width: 48%; min-width: 320px; margin: 0.5% }
table { border-collapse: collapse } td, th { padding: 0.2em 0.8em; text-align: left; border-bottom: 1px solid #ddd }
.alarm { background: #fde8e4; border-left: 4px solid #c33; padding: 0.5em 1em; margin: 1em 0 }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }"""


def write_report(run: Run) -> None:
    """Draw the report of what ``metrics.jsonl`` holds so far. Raises ValueError when it holds nothing."""
    rows = run.metrics()
    if not rows:
        raise ValueError(f"{run.folder} has no metrics yet; train at least one iteration first")
    training = [row for row in rows if "reward" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    figures = []
    if training:
        figures += [figure(title, draw, training) for title, draw in CURVES]
    if any(row.get(name) for row in training for name in UNJUDGED):
        figures.insert(1, figure("Share of training images without a score", unjudged_curve, training))
    if training and len(training[-1].get("rewards", ())) > 1:
        figures.insert(1, figure("Each reward of training images", each_reward_curve, training))
    if evaluations and evaluations[-1]["evaluation"]:
        figures.insert(0, figure("Held-out rewards", held_out_curve, evaluations))
    pictures = [picture(path.stem, path.read_bytes()) for path in first_and_last(run.folder / "samples")]
    body = [
        f"<h1>{html.escape(run.config.name)}</h1>",
        f"<p>{html.escape(str(run.config.method['name']))} on {html.escape(str(run.config.model['name']))}, "
        f"{len(training)} iterations</p>",
        alarms(rows),
        warnings(rows),
        table(evaluations),
        statistics_table(evaluations),
        *pictures,
        *figures,
        "<h2>Configuration</h2><pre>" + html.escape(run.config.to_json()) + "</pre>",
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.config.name)}</title><style>{STYLE}</style>"
    write_text(run.folder / "report.html", page + "\n".join(body))


def first_and_last(folder: Path) -> list[Path]:
    """The sample pictures before training and of the last evaluation."""
    steps = sorted(folder.glob("step_*.png"))
    found = [folder / "before.png", folder / "after.png" if (folder / "after.png").exists() or not steps else steps[-1]]
    return [path for path in found if path.exists()]


def alarms(rows: Sequence[dict[str, Any]]) -> str:
    """What the guard against gaming said."""
    found = [(row["iteration"], alarm) for row in rows for alarm in row.get("alarms", ())]
    lines = [f"<li>iteration {number}: {html.escape(alarm)}</li>" for number, alarm in found]
    return f'<div class="alarm"><b>The reward is being gamed</b><ul>{"".join(lines)}</ul></div>' if found else ""


def warnings(rows: Sequence[dict[str, Any]]) -> str:
    """What else was to be seen to, each once: a server that is down says the same in every iteration."""
    found: dict[str, list[int]] = {}
    for row in rows:
        for warning in row.get("warnings", ()):
            found.setdefault(warning, []).append(row["iteration"])
    lines = [
        f"<li>iteration {first}{f' and {len(more)} more' if more else ''}: {html.escape(warning)}</li>"
        for warning, (first, *more) in found.items()
    ]
    return f'<div class="alarm"><b>Warnings</b><ul>{"".join(lines)}</ul></div>' if found else ""


def statistics_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """How the look of held-out images has drifted, whatever they show."""
    known = [row["statistics"] for row in evaluations if row.get("statistics")]
    if not known:
        return ""
    lines = [
        f"<tr><td>{name}</td><td>{first:.3f}</td><td>{last:.3f}</td><td>{100 * (last / first - 1):+.0f} %</td></tr>"
        for name, first in known[0].items()
        if first and (last := known[-1].get(name)) is not None
    ]
    return f"<table><tr><th>held-out images</th><th>before</th><th>after</th><th></th></tr>{''.join(lines)}</table>"


def table(evaluations: Sequence[dict[str, Any]]) -> str:
    """First and last evaluation side by side."""
    if not evaluations or not evaluations[-1]["evaluation"]:
        return ""
    first, last = evaluations[0], evaluations[-1]
    lines = [
        f"<tr><td>{html.escape(name)}</td><td>{measured(first, name)}</td><td>{measured(last, name)}</td></tr>"
        for name in last["evaluation"]
    ]
    head = f"<tr><th>held-out mean of {last['evaluation_images']} images</th><th>before</th><th>after</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def measured(row: dict[str, Any], name: str) -> str:
    """Three digits and of how many images, unless of all; a dash where none could be scored."""
    value, missing = row["evaluation"].get(name), row.get("evaluation_missing", {}).get(name, 0)
    some = f" (of {round((1 - missing) * row['evaluation_images'])})" if missing else ""
    return "-" if value is None else f"{value:.3f}{some}"


def picture(title: str, png: bytes) -> str:
    """An embedded image with its caption."""
    data = base64.b64encode(png).decode()
    return f'<figure><figcaption>{html.escape(title)}</figcaption><img src="data:image/png;base64,{data}"></figure>'


def figure(title: str, draw: Callable[[Any, Sequence[dict[str, Any]]], None], rows: Sequence[dict[str, Any]]) -> str:
    """One embedded plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(f"the report needs matplotlib; get it with:  {pip_install('matplotlib')}") from None
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    axes.set_xlabel("iteration")
    draw(axes, rows)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return picture(title, buffer.getvalue())


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """One number per row."""
    return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float)


def held_out_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean of each reward at each evaluation."""
    for name in rows[-1]["evaluation"]:
        known = [row for row in rows if name in row["evaluation"]]
        axes.plot(
            column(known, "iteration"), column([row["evaluation"] for row in known], name), "o-", label=plain(name)
        )
    axes.legend()


def each_reward_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean of each trained reward."""
    for name in rows[-1]["rewards"]:
        known = [row for row in rows if name in row.get("rewards", ())]  # runs of earlier versions have none at first
        axes.plot(
            column(known, "iteration"), column([row["rewards"][name] for row in known], "mean"), label=plain(name)
        )
    axes.legend()


UNJUDGED = {"unscored": "could not be scored", "skipped": "people passed over"}


def unjudged_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Why images have no score; runs of earlier versions do not tell."""
    for name, label in UNJUDGED.items():
        known = [row for row in rows if name in row]
        axes.plot(column(known, "iteration"), column(known, name), label=label)
    axes.legend()


def plain(name: str) -> str:
    """A reward's name for a legend: matplotlib takes what is between two $ for a formula."""
    return (name if len(name) <= 40 else f"{name[:20]}...{name[-17:]}").replace("$", r"\$")


def reward_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean training reward with the spread of its images."""
    x, mean, spread = column(rows, "iteration"), column(rows, "reward"), column(rows, "reward_std")
    axes.plot(x, mean)
    axes.fill_between(x, mean - spread, mean + spread, alpha=0.2)


def credit_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean and spread of each step's credit, over the whole run."""
    steps = np.arange(len(rows[0]["step_credit"]))
    quarter = max(1, len(rows) // 4)
    for name, part in (("first quarter", rows[:quarter]), ("last quarter", rows[-quarter:])):
        mean = np.mean([row["step_credit"] for row in part], 0)
        spread = np.mean([row["step_credit_std"] for row in part], 0)
        axes.errorbar(steps, mean, spread, fmt="o-", capsize=3, alpha=0.8, label=name)
    axes.legend()
    axes.set_xlabel("denoising step")


def one(*names: str) -> Callable[[Any, Sequence[dict[str, Any]]], None]:
    """A plot of some columns."""

    def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
        for name in names:
            axes.plot(column(rows, "iteration"), column(rows, name), label=name)
        if len(names) > 1:
            axes.legend()

    return draw


def time_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Where the seconds of an iteration go."""
    axes.stackplot(column(rows, "iteration"), *(column(rows, f"seconds_{part}") for part in PARTS), labels=PARTS)
    axes.legend()


CURVES = (
    ("Reward of training images, with spread", reward_curve),
    ("Credit per denoising step (for DenseGRPO the reward gain)", credit_curve),
    ("KL to the untrained model", one("kl")),
    ("Fraction of clipped transitions", one("clip_fraction")),
    ("Gradient norm", one("grad_norm")),
    ("Spread of rewards inside groups", one("group_std")),
    ("Seconds per iteration", time_curve),
)
