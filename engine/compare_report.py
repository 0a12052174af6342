"""What a comparison leaves: ``comparison.csv`` (every measurement), ``.html`` (all in one file), ``.md``, ``.png``."""

import csv
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checkpoint import SaveError, write_text
from .compare_plan import Comparison, Job
from .compare_statistics import AXES, Curve, Estimate, band, differences, equal_cost, estimate, holm, verdict
from .report import STYLE, picture
from .rewards import members
from .run import HELD_OUT

LEVEL_SHARE = 0.75
"""Tables say when each method has this part of the baseline's gain."""
WIDE = '<figure style="width: 99%">'
READING = (
    "Held-out images come from the same prompts and noise in every run, drawn with the averaged weights; measuring "
    "them is not counted in what a run costs. Values between two measurements are interpolated linearly.",
    "Intervals and bands are 95 % confidence intervals of the mean over seeds (Student's t). Differences are taken "
    'between runs of the same seed. "significant": the interval of the difference excludes 0, also after Holm\'s '
    'correction for all methods of that column; "not after correction": it excludes 0, but among so many methods one '
    'may do so by chance; "within noise": it holds 0.',
    "Iterations, evaluations and seconds are those of whole runs, on average. KL is in its velocity form: the mean "
    "squared difference of velocities to the base model, along ODE paths of held-out prompts from the same noise.",
    "A method drawn dashed is a control: its rewards are shuffled inside each group, so there is nothing to learn.",
)
CLOCKS = {
    "CPU seconds": "CPU seconds are those in which the run's one thread computed; waiting is not counted.",
    "seconds": "Seconds are those on the wall clock; runs that share a GPU slow each other down.",
}
FIXED = ("task", "method", "seed", "iteration", "evaluations", "seconds", "reward", "training_reward", "kl")


class Table(NamedTuple):
    """Texts in rows and columns."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def html(self) -> str:
        """As HTML."""

        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = row("th", self.head) + "".join(row("td", cells) for cells in self.rows)
        return f'<h3>{html.escape(self.title)}</h3><div style="overflow-x: auto"><table>{body}</table></div>'


@dataclass(frozen=True, slots=True)
class Task:
    """The finished runs of one task, and what they are compared by."""

    name: str
    jobs: Mapping[str, Sequence[Job]]
    """Method -> its runs, by seed; methods in the plan's order, only those that have any."""
    curves: Mapping[str, Sequence[Curve]]
    """Likewise."""
    measures: Mapping[str, str]
    """Column -> what it is called: the trained reward first, then the held-out ones."""
    clock: str
    """What its seconds are."""
    cost: Mapping[str, float]
    """Axis -> where methods are compared."""
    budget: Mapping[str, float]
    """Axis -> the plan's budget, 0 for none."""
    baseline: str
    """The first method of the plan."""

    def everything(self) -> list[Curve]:
        """All its runs."""
        return [curve for curves in self.curves.values() for curve in curves]

    def base(self, name: str) -> float:
        """What the untrained model has in a column: the same in each run."""
        return float(self.everything()[0].columns[name][0])

    def is_control(self, method: str) -> bool:
        """Whether its rewards were shuffled."""
        return self.jobs[method][0].run.config.training.shuffle_rewards

    def values(self, method: str, axis: str, name: str) -> Estimate:
        """A column at equal cost, over the method's runs."""
        return estimate([curve.at(axis, self.cost[axis], name) for curve in self.curves[method]])

    def axis_name(self, axis: str) -> str:
        """As the reader sees it."""
        return {"iteration": "iterations", AXES[0]: "model evaluations"}.get(axis, self.clock)


def write_comparison(comparison: Comparison, jobs: Sequence[Job], folder: Path) -> None:
    """Write all files into ``folder`` from the finished ``jobs``, one or more. Raises SaveError."""
    tasks = [make_task(comparison, name, jobs) for name in comparison.tasks if any(job.task == name for job in jobs)]
    write_text(folder / "comparison.csv", measurements_csv(jobs))
    num_planned = len(comparison.tasks) * len(comparison.methods) * len(comparison.seeds)
    remarks = [
        f"{len(jobs)} of {num_planned} planned runs, {len(comparison.seeds)} seeds.",
        *READING,
        CLOCKS[tasks[0].clock],
    ]
    text = [f"# {comparison.name}", "![Curves](comparison.png)"]
    title = html.escape(comparison.name)
    page = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    for task in tasks:
        found = tables(task)
        text += [f"## {task.name}", *(table.markdown() for table in found), level_note(task)]
        page += [f"<h2>{html.escape(task.name)}</h2>", picture("", drawn([task])).replace("<figure>", WIDE)]
        page += [*(table.html() for table in found), f"<p>{html.escape(level_note(task))}</p>", *grids(task)]
    text += ["## How to read this", *remarks]
    page += ["<h2>How to read this</h2>", *(f"<p>{html.escape(remark)}</p>" for remark in remarks)]
    page.append(f"<h2>Plan</h2><pre>{html.escape(comparison.to_json())}</pre>")
    write_text(folder / "comparison.md", "\n\n".join(part.strip() for part in text) + "\n")
    write_text(folder / "comparison.html", "\n".join(page))
    path = folder / "comparison.png"
    try:
        path.write_bytes(drawn(tasks))
    except OSError as problem:
        raise SaveError(f"could not save {path}: {problem}; free some space, then repeat") from problem


def make_task(comparison: Comparison, name: str, jobs: Sequence[Job]) -> Task:
    """The runs of the task ``name`` among ``jobs``."""
    mine = {m: [job for job in jobs if (job.task, job.method) == (name, m)] for m in comparison.methods}
    mine = {method: found for method, found in mine.items() if found}
    curves = {method: [curve_of(job) for job in found] for method, found in mine.items()}
    first = next(iter(mine.values()))[0]
    everything = [curve for found in curves.values() for curve in found]
    budget = {axis: float(getattr(comparison.budget_of(name), axis)) for axis in AXES}
    cost = {axis: equal_cost(everything, axis, budget[axis]) for axis in AXES}
    baseline = next(iter(comparison.methods))
    return Task(name, mine, curves, measures_of(first), first.clock(), cost, budget, baseline)


def measures_of(job: Job) -> dict[str, str]:
    """Column -> title."""
    config = job.run.config
    trained = " + ".join(one.label for one in members(config.rewards))
    labels = [one.label for one in members(config.held_out_rewards, HELD_OUT)]
    return {"reward": f"{trained} (trained)"} | {x: f"{x.removeprefix(HELD_OUT)} (not trained)" for x in labels}


def curve_of(job: Job) -> Curve:
    """The measurements of a run as columns; what could not be scored is NaN."""
    rows = job.rows()
    names = ("iteration", *AXES, "reward", "kl")
    columns = {name: [row[name] for row in rows] for name in names}
    columns |= {label: [row["scores"][label] for row in rows] for label in rows[0]["scores"]}
    arrays = {k: np.array([np.nan if v is None else v for v in values], dtype=float) for k, values in columns.items()}
    return Curve(job.method, job.seed, arrays)


def measurements_csv(jobs: Sequence[Job]) -> str:
    """One line per measurement; ``reward`` is the trained one on held-out prompts, then one column per label."""
    lines = [(job, row) for job in jobs for row in job.rows()]
    labels = dict.fromkeys(label for _, row in lines for label in row["scores"])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*FIXED, *labels], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for job, row in lines:
        writer.writerow({"task": job.task, "method": job.method, "seed": job.seed} | row | row["scores"])
    return buffer.getvalue()


def tables(task: Task) -> list[Table]:
    """What each method reached, and how it differs from the baseline."""
    places = [(axis, name) for name in task.measures for axis in AXES]
    titles = [f"{task.measures[name]} at {amount(task.cost[axis])} {task.axis_name(axis)}" for axis, name in places]
    found = [reached_table(task, places, titles)]
    others = [method for method in task.curves if method != task.baseline]
    if others and task.baseline in task.curves:
        columns = [difference_column(task, others, *place) for place in places]
        rows = [[method, *(column[i] for column in columns)] for i, method in enumerate(others)]
        found.append(Table(f"Difference to {task.baseline}, seed by seed", ["method", *titles], rows))
    return found


def reached_table(task: Task, places: Sequence[tuple[str, str]], titles: Sequence[str]) -> Table:
    """Means with 95 % confidence intervals; a row for the base model first."""
    level, spent = level_of(task), ("iteration", *AXES)
    scores = [f"{task.base(name):.3f}" for _, name in places]
    rows = [["base model", "-", *("0" for _ in spent), *scores, "0", *("-" for _ in spent)]]
    for method, curves in task.curves.items():
        ends = [amount(estimate([curve.end(name) for curve in curves]).mean) for name in spent]
        values = [shown(task.values(method, *place)) for place in places]
        kl = shown(task.values(method, AXES[0], "kl"), number)
        costs = [cost_of_level(curves, axis, level) for axis in spent]
        rows.append([method, str(len(curves)), *ends, *values, kl, *costs])
    until = "-" if level is None else f"{level:.3f}"
    head = ["method", "runs", "iterations", "model evaluations", task.clock, *titles]
    head += [f"KL at {amount(task.cost[AXES[0]])} model evaluations"]
    head += [f"{task.axis_name(axis)} to reach {until}" for axis in spent]
    return Table("What was reached: mean ± half of the 95 % confidence interval", head, rows)


def level_of(task: Task) -> float | None:
    """Most of the way from the base model to where the baseline ends, so that other methods get there, too."""
    if task.baseline not in task.curves:
        return None
    base, end = task.base("reward"), task.values(task.baseline, AXES[0], "reward").mean
    return base + LEVEL_SHARE * (end - base) if end > base else None


def cost_of_level(curves: Sequence[Curve], axis: str, level: float | None) -> str:
    """What it cost to reach ``level``, or how many runs did."""
    if level is None:
        return "-"
    found = estimate([curve.cost_of(axis, level, "reward") for curve in curves])
    if found.num_runs < len(curves):
        return f"{found.num_runs} of {len(curves)} runs reached it" if found.num_runs else "not reached"
    return shown(found, amount)


def difference_column(task: Task, others: Sequence[str], axis: str, name: str) -> list[str]:
    """Method minus baseline with its interval and what it means, for each of ``others``."""
    baseline = task.curves[task.baseline]
    found = [differences(task.curves[m], baseline, axis, task.cost[axis], name) for m in others]
    corrected = holm([difference.p for difference in found])
    return [
        f"{shown(difference, lambda value: f'{value:+.3f}')}: {verdict(difference, p)}"
        for difference, p in zip(found, corrected, strict=True)
    ]


def amount(value: float) -> str:
    """A cost: whole when it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown(found: Estimate, text: Callable[[float], str] | None = None) -> str:
    """A mean and half the width of its interval, where there is one."""
    text = text or (lambda value: f"{value:.3f}")
    if found.num_runs == 0:
        return "-"
    return text(found.mean) if math.isnan(found.half) else f"{text(found.mean)} ± {text(found.half).lstrip('+')}"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def level_note(task: Task) -> str:
    """Which reward the last columns of the first table ask for."""
    level = level_of(task)
    if level is None:
        return f"{task.baseline} did not raise the held-out reward above the base model's."
    return (
        f"{level:.3f} is the base model's {task.base('reward'):.3f} and {LEVEL_SHARE:.0%} of what {task.baseline} "
        f"gains in {amount(task.cost[AXES[0]])} model evaluations."
    )


def drawn(tasks: Sequence[Task]) -> bytes:
    """A PNG: tasks side by side; held-out rewards and KL from top to bottom, over both costs."""
    from matplotlib.figure import Figure

    num_rows = max(len(task.measures) for task in tasks) + 1
    drawing = Figure(figsize=(10 * len(tasks), 3 * num_rows + 0.8), layout="constrained")
    parts = np.atleast_1d(np.array(drawing.subfigures(1, len(tasks)), dtype=object))
    for part, task in zip(parts, tasks, strict=True):
        draw_task(part, task)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_task(part: Any, task: Task) -> None:
    """One row per measure, one column per axis; a control is dashed, in the colour of its method."""
    columns = {**task.measures, "kl": "KL to the base model"}
    part.suptitle(f"{task.name}: mean over seeds with 95 % confidence band")
    panels = part.subplots(len(columns), len(AXES), sharex="col", sharey="row", squeeze=False)
    for row, (name, title) in zip(panels, columns.items(), strict=True):
        row[0].set_ylabel(title)
        for axes, axis in zip(row, AXES, strict=True):
            for method, colour in colours(task).items():
                cost, mean, half = band(task.curves[method], axis, name, task.budget[axis])
                axes.plot(cost, mean, "--" if task.is_control(method) else "-", color=colour, label=method)
                axes.fill_between(cost, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
            axes.grid(alpha=0.3)
        # A band of few seeds can be far wider than anything measured; it is cut off rather than the curves flattened.
        measured = np.concatenate([curve.columns[name] for curve in task.everything()])
        row[0].set_ylim(*limits(measured))
    for axes, axis in zip(panels[-1], AXES, strict=True):
        axes.set_xlabel(task.axis_name(axis))
    handles, labels = panels[0][0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=4)


def limits(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest with a margin."""
    found = values[np.isfinite(values)]
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def colours(task: Task) -> dict[str, Any]:
    """Method -> colour; a control has that of the method whose rewards it shuffles."""
    from matplotlib import colormaps

    palette = cycle(colormaps["tab10"].colors + colormaps["Dark2"].colors)  # pyright: ignore[reportAttributeAccessIssue]
    settings = {method: jobs[0].run.config.method for method, jobs in task.jobs.items()}
    found: dict[str, Any] = {}
    for method in sorted(task.curves, key=task.is_control):
        twins = [m for m in found if task.is_control(method) and settings[m] == settings[method]]
        found[method] = found[twins[0]] if twins else next(palette)
    return {method: found[method] for method in task.curves}


def grids(task: Task) -> list[str]:
    """Held-out samples: the base model's, then those of the first seed of each method."""
    firsts = [jobs[0] for jobs in task.jobs.values()]
    shown = [("base model", firsts[0], "before"), *((f"{job.method}, seed {job.seed}", job, "after") for job in firsts)]
    return [picture(title, (job.run.folder / "samples" / f"{name}.png").read_bytes()) for title, job, name in shown]
