"""Figures of a report."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

CURVE_POINTS = 60


@plt.rc_context({"text.parse_math": False})  # a name is no formula
def plot_learning_curves(runs, path):
    """Mean return over seeds, each seed shown thinly; a panel per task.

    A point is the mean over a stretch of timesteps, in which a return holds until the next episode ends.
    """
    tasks, names = sorted({task for task, _ in runs}), list(dict.fromkeys(name for _, name in runs))
    size = (max(5.5 * len(tasks), 7), 4 + 0.2 * len(names) / len(tasks))
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    lines = {}
    for axis, task in zip(axes[0], tasks):
        for name, group in ((name, group) for (t, name), group in runs.items() if t == task):
            color = names.index(name)  # the same in every panel
            first = max(run.episodes["global_step"][0] for run in group)
            last = min(run.summary["global_step"] for run in group)
            edges = np.linspace(first, last, CURVE_POINTS + 1)
            steps = (edges[:-1] + edges[1:]) / 2
            curves = []
            for run in group:
                ends, returns = run.episodes["global_step"], run.episodes["episodic_return"]
                until = np.append(ends, max(last, ends[-1]))
                integral = np.append(0, np.cumsum(returns * np.diff(until)))
                curves.append(np.diff(np.interp(edges, until, integral)) / np.diff(edges))
                axis.plot(steps, curves[-1], color=f"C{color}", alpha=0.2, linewidth=0.7)
            lines[f"{name}, {len(group)} seeds"] = axis.plot(steps, np.mean(curves, axis=0), color=f"C{color}")[0]
        axis.set(title=task, xlabel="timesteps", ylabel="episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(lines.values(), lines, loc="outside lower left", ncols=len(tasks), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
