"""Figures of a report, each as PNG and PDF. Functions take {(task, variant): [run, …]} as `variants`."""

import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, PercentFormatter

from lrrl_utils.measures import shown_rate
from lrrl_utils.scales import beside_sweep, first_update, names_of, pair_tasks, tasks_of
from lrrl_utils.statistics import interquartile_curve, interquartile_mean, performance_profile
from lrrl_utils.variants import count_timesteps

CURVE_POINTS = 60
RATE_BINS = 50
COLORS = [*plt.get_cmap("tab10").colors, *plt.get_cmap("tab20b").colors, *plt.get_cmap("tab20c").colors]
MARKERS = "osD^vP*X<>hp"
STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}


def save(figure, folder, name):
    """Write NAME.png and NAME.pdf; gives back the name."""
    for kind in ("png", "pdf"):
        figure.savefig(folder / f"{name}.{kind}", dpi=120)
        figure.set_layout_engine("none")  # it is done, and takes long
    plt.close(figure)
    return name


def make_panels(titles, columns=3, width=5.0, height=3.6, legend=()):
    """A figure with a panel for each title, and room for a legend of these names below."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    size = (max(width * columns, 7), height * rows + 0.2 * math.ceil(len(legend) / columns) + 0.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    return figure, axes.flat[: len(titles)], columns


def color_of(name, names):
    return COLORS[names.index(name) % len(COLORS)]  # the same in every panel and figure


def draw_band(axis, x, estimate, **style):
    """A line with its interval; gives back the line."""
    point, low, high = estimate
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return axis.plot(x, point, **style)[0]


def mean_returns(run, edges):
    """Mean return between `edges`, (points + 1,) timesteps: a return holds until the next episode ends.

    Episodes that end together count by their mean.
    """
    ends, which, counts = np.unique(run.episodes["global_step"], return_inverse=True, return_counts=True)
    returns = np.bincount(which, run.episodes["episodic_return"]) / counts
    until = np.append(ends, max(edges[-1], ends[-1]))
    integral = np.append(0, np.cumsum(returns * np.diff(until)))
    return np.diff(np.interp(edges, until, integral)) / np.diff(edges)


def common_stretch(runs):
    """The timesteps of which all runs know the return."""
    return max(run.episodes["global_step"][0] for run in runs), min(run.summary["global_step"] for run in runs)


def legend_of(name, run, *seeds):
    """How a legend names a variant; `run` is one of its runs, `seeds` are how many it has on each task."""
    cost = f", {population} times the timesteps" if (population := run.config.get("population") or 1) > 1 else ""
    count = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    return f"{name}, {count} {'seed' if count == '1' else 'seeds'}{cost}"


@plt.rc_context(STYLE)  # a name is no formula
def plot_learning_curves(variants, folder):
    """Interquartile mean of the return over seeds, with its interval; a panel per task."""
    names, lines, drawn = names_of(variants), {}, {}
    figure, axes, columns = make_panels(tasks_of(variants), legend=names)
    for axis, task in zip(axes, tasks_of(variants)):
        for name, group in ((name, group) for (of_task, name), group in variants.items() if of_task == task):
            first, last = common_stretch(group)
            if first < last:
                edges = np.linspace(first, last, CURVE_POINTS + 1)
                estimate = interquartile_curve([[mean_returns(run, edges)] for run in group])
                lines[name] = draw_band(axis, (edges[:-1] + edges[1:]) / 2, estimate, color=color_of(name, names))
                drawn.setdefault(name, []).append(group)
        axis.set(xlabel="timesteps", ylabel="episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    labels = [legend_of(name, drawn[name][0][0], *map(len, drawn[name])) for name in lines]
    figure.legend(lines.values(), labels, loc="outside lower left", ncols=columns, fontsize="small")
    return save(figure, folder, "curves")


@plt.rc_context(STYLE)
def plot_overall_curves(variants, scales, folder):
    """Interquartile mean of the normalised return over seeds and tasks, against the share of the timesteps."""
    names, lines = names_of(variants), {}
    figure, (axis,), _ = make_panels(["over all tasks"], width=7.5, legend=names)
    for name, seeds in pair_tasks(variants).items():
        stretches = [common_stretch(runs) for runs in zip(*seeds.values())]
        start = max((first / max(last, 1) for first, last in stretches), default=1)
        if start >= 1:
            continue
        edges = np.linspace(start, 1, CURVE_POINTS + 1)
        curves = []
        for runs in seeds.values():
            returns = [mean_returns(run, edges * last) for run, (_, last) in zip(runs, stretches)]
            zeros, ones = np.array([scales[task] for task in tasks_of(variants)]).T[..., None]
            curves.append((returns - zeros) / (ones - zeros))
        line = draw_band(axis, (edges[:-1] + edges[1:]) / 2, interquartile_curve(curves), color=color_of(name, names))
        lines[legend_of(name, runs[0], len(seeds))] = line
    axis.set(xlabel="share of the timesteps", ylabel="normalised return")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(lines.values(), lines, loc="outside lower left", fontsize="small")
    return save(figure, folder, "curves_all")


@plt.rc_context(STYLE)
def plot_profiles(returns, variants, folder):
    """The share of runs whose normalised final return is above τ; `returns` are those of `normalized_returns`."""
    figure, (axis,), _ = make_panels(["over all tasks"], width=7.5, legend=returns)
    scores = {name: np.array(list(seeds.values())) for name, seeds in returns.items() if seeds}
    together = np.concatenate([x.ravel() for x in scores.values()] or [np.zeros(1)])
    thresholds = np.linspace(min(0, together.min()), max(1, together.max()), 101)
    lines = {}
    for name, of_variant in scores.items():
        estimate = performance_profile(of_variant, thresholds)
        lines[f"{name}, {len(of_variant)} seeds"] = draw_band(
            axis, thresholds, estimate, color=color_of(name, names_of(variants))
        )
    axis.set(xlabel="normalised final return τ", ylabel="share of runs above τ", ylim=(-0.02, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(lines.values(), lines, loc="outside lower left", fontsize="small")
    return save(figure, folder, "profiles")


@plt.rc_context(STYLE)
def plot_costs(returns, sweep, brought, variants, folder):
    """What runs with the seeds of a sweep over the constant rates `sweep` cost in timesteps, and bring, beside it.

    `brought` is that of `what_a_sweep_brings`.
    """
    costs = {name: [count_timesteps(variants[task, name][0]) for task in tasks_of(variants)] for name in returns}
    others = {name: scores for name, scores in beside_sweep(returns, sweep).items() if name not in sweep}
    estimates = {name: interquartile_mean(list(scores.values())) for name, scores in others.items()}
    figure, (axis,), _ = make_panels(["over all tasks"], width=7.5, legend=["sweep", *others][::2])
    x = np.arange(1, len(sweep) + 1) * np.mean([costs[name] for name in sweep])
    band = draw_band(axis, x, zip(*brought), color="black", marker=".")
    lines = {}
    for i, (name, (point, low, high)) in enumerate(estimates.items()):
        beside = x[0] * min(0.04, 0.5 / len(others)) * (i - (len(others) - 1) / 2)  # many cost the same
        style = {"color": color_of(name, names_of(variants)), "fmt": MARKERS[i % len(MARKERS)]}
        lines[name] = axis.errorbar(np.mean(costs[name]) + beside, point, [[point - low], [high - point]], **style)
    axis.set(xlabel="timesteps of all runs that it takes", ylabel="normalised final return")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    from_the_top = sorted(lines, key=estimates.get, reverse=True)
    lines = {f"the best of 1 to {len(sweep)} constant rates": band} | {name: lines[name] for name in from_the_top}
    figure.legend(lines.values(), lines, loc="outside lower left", fontsize="small", ncols=2)
    return save(figure, folder, "costs")


@plt.rc_context(STYLE)
def plot_improvements(improvements, variants, folder):
    """Probabilities of improvement with their intervals, {baseline: {variant: (point, low, high)}}."""
    titles = [f"better than {baseline}" for baseline in improvements]
    height = 1.2 + 0.3 * max(map(len, improvements.values()))
    figure, axes, _ = make_panels(titles, columns=2, width=7, height=height)
    for axis, of_baseline in zip(axes, improvements.values()):
        for i, (name, (point, low, high)) in enumerate(of_baseline.items()):
            color = color_of(name, names_of(variants))
            axis.plot([low, high], [i, i], color=color, linewidth=6, alpha=0.4, solid_capstyle="butt")
            axis.plot(point, i, "|", color=color, markersize=12, markeredgewidth=2)
        axis.axvline(0.5, color="grey", linestyle=":")
        axis.set(xlim=(-0.02, 1.02), ylim=(len(of_baseline) - 0.5, -0.5), xlabel="probability of improvement")
        axis.set_yticks(range(len(of_baseline)), list(of_baseline), fontsize="small")
    return save(figure, folder, "improvement")


def pulled_rates(group, controller):
    """([learning rate, …], [(start of the first round, ends of rounds, rates), …]) of a bandit's arms in some runs."""
    rates, pulls = set(), []
    for run in group:
        is_ours = run.rounds.get("controller", np.full(len(run.rounds["global_step"]), "")) == controller
        ends, pulled = (run.rounds[column][is_ours] for column in ("global_step", "learning_rate"))
        pulls.append((first_update(run), ends, [shown_rate(x) for x in pulled]))
        rates.update(pulls[-1][2])
        if not controller:  # else the arms may lie elsewhere
            rates.update(shown_rate(x) for x in run.config.get("learning_rates") or () if isinstance(x, (int, float)))
    return sorted(rates), pulls


def share_of_rates(rates, pulls, edges):
    """The share of timesteps of all runs at each rate in each bin, (rates, bins); NaN where no round has been."""
    time = np.zeros((len(rates), len(edges) - 1))
    for start, ends, pulled in pulls:
        limits = np.append(min(start, *ends[:1]), ends) if len(ends) else np.zeros(1)  # a round's row stands at its end
        for rate, since in zip(rates, time):
            spent = np.append(0, np.cumsum(np.diff(limits) * (np.array(pulled) == rate)))
            since += np.diff(np.interp(edges, limits, spent))
    with np.errstate(invalid="ignore"):
        return time / time.sum(axis=0)


def find_bandits(variants):
    """{(variant, controller): {task: runs}} of those that draw arms."""
    found = {}
    for (task, name), group in variants.items():
        runs = [run for run in group if "arm" in run.rounds and np.any(run.rounds["arm"] >= 0)]
        for controller in sorted({c for run in runs for c in run.rounds.get("controller", [""])}):
            found.setdefault((name, controller), {})[task] = runs
    return found


@plt.rc_context(STYLE)
def plot_rates(variants, folder):
    """Where bandits spend their rounds: the share of timesteps at each rate over time, a panel per variant and task."""
    bandits, tasks = find_bandits(variants), tasks_of(variants)
    figure = plt.figure(figsize=(max(1 + 3.2 * len(tasks), 7), 1.9 * len(bandits)), layout="constrained")
    last = {task: 0 for task in tasks}
    for (task, _), group in variants.items():
        last[task] = max(last[task], *(run.summary["global_step"] for run in group))
    rows = figure.subfigures(len(bandits), 1, squeeze=False)[:, 0]
    lowest = {task: row for row, of_task in zip(rows, bandits.values()) for task in of_task}
    for row, ((name, controller), of_task) in zip(rows, bandits.items()):
        row.suptitle(f"{name}, {controller}".removesuffix(", "), x=0.01, ha="left", fontsize="medium")
        for axis, task in zip(row.subplots(1, len(tasks), squeeze=False)[0], tasks):
            if task not in of_task:
                axis.remove()
                continue
            rates, pulls = pulled_rates(of_task[task], controller)
            edges = np.linspace(0, last[task], RATE_BINS + 1)
            lines = np.arange(len(rates) + 1) - 0.5
            shares = share_of_rates(rates, pulls, edges)
            image = axis.pcolormesh(edges, lines, shares, vmin=0, vmax=1, cmap="magma_r", rasterized=True)
            shown = range(0, len(rates), math.ceil(len(rates) / 7))
            axis.set_yticks(shown, [f"{rates[i]:.3g}" for i in shown], fontsize="small")
            axis.set_title(task, fontsize="small")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.tick_params(labelbottom=lowest[task] is row, labelsize="small")
        row.colorbar(image, ax=row.axes, format=PercentFormatter(1), aspect=10, pad=0.01)
    rows[-1].supxlabel("timesteps", fontsize="small")
    return save(figure, folder, "rates")
