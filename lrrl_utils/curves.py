"""The figure of a run: returns, learning rates and the arms' probabilities over time."""

import numpy as np

from lrrl_utils.files import read_json, written_whole
from lrrl_utils.measures import read_csv


def plot_curves(folder):
    """Draw a run folder's `curves.png` from its CSV files. Raises OSError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = read_json(folder / "config.json")
    episodes, rounds = read_csv(folder / "episodes.csv"), read_csv(folder / "rounds.csv")
    controllers = rounds.get("controller", np.full(len(rounds["round"]), ""))
    probabilities = [name for name in rounds if name.startswith("p_")]
    names = list(config.get("arms", dict.fromkeys(controllers))) or [""]
    arms = config.get("arms", {name: config["learning_rates"] for name in names})
    rates = np.hstack([arms[name] for name in names]) if probabilities else rounds["learning_rate"]
    panels = 2 + len(names) * bool(probabilities)
    figure, axes = plt.subplots(panels, 1, figsize=(8, 2.6 * panels), sharex=True, layout="constrained")
    title = f"{config['env_id']}, {config['exp_name']}, seed {config['seed']}"
    figure.suptitle(title, parse_math=False)
    draw_returns(axes[0], episodes)
    axes[1].set(ylabel="learning rate", yscale="log")
    if rates.size:
        axes[1].set_ylim(rates.min() / 2, rates.max() * 2)
    for i, name in enumerate(names):
        of_this = {column: values[controllers == name] for column, values in rounds.items()}
        color = "black" if len(names) == 1 else f"C{i}"
        # a round's row stands at its end: what it says held from the end of the round before
        ends = of_this["global_step"]
        edges = [*np.minimum(ends[:1], config.get("learning_starts") or 0), *ends]
        draw_steps(axes[1], edges, of_this["learning_rate"], color=color, label=name)
        if probabilities:
            axes[2 + i].set_ylabel(f"probability {name}".strip())
            draw = draw_image if len(arms[name]) > 10 else draw_lines  # of so many lines, none can be told from another
            draw(axes[2 + i], edges, {rate: of_this[p] for rate, p in sorted(zip(arms[name], probabilities))[::-1]})
    if len(names) > 1:
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes[-1].set_xlabel("timesteps")
    try:
        with written_whole(folder / "curves.png") as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        plt.close(figure)


def draw_returns(axis, episodes):
    steps, returns = episodes["global_step"], episodes["episodic_return"]
    axis.plot(steps, returns, ".", color="C0", alpha=0.3, markersize=4, label="episode")
    width = min(len(returns), max(10, len(returns) // 20))
    if width:
        smooth = np.convolve(returns, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color="C0", label=f"mean of the last {width}")
        axis.legend(loc="best", fontsize="small")
    axis.set_ylabel("episodic return")


def draw_steps(axis, edges, values, **style):
    axis.step(edges, [*values[:1], *values], where="pre", **style)


def draw_lines(axis, edges, probabilities):
    import matplotlib.pyplot as plt

    colors = plt.cm.viridis(np.linspace(1, 0, len(probabilities)))
    for (rate, values), color in zip(probabilities.items(), colors):
        draw_steps(axis, edges, values, color=color, label=f"{rate:g}")
    axis.axhline(1 / len(probabilities), color="grey", linestyle=":", linewidth=1, label="uniform")
    axis.set_ylim(0, 1)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", title="learning rate")


def draw_image(axis, edges, probabilities):
    if len(edges):
        logs = np.log10(list(probabilities))
        between = np.convolve(logs, [0.5, 0.5], mode="valid")
        limits = 10 ** np.array([2 * logs[0] - between[0], *between, 2 * logs[-1] - between[-1]])
        colored = axis.pcolormesh(edges, limits, list(probabilities.values()), vmin=0, rasterized=True)
        axis.figure.colorbar(colored, ax=axis)
    axis.set(yscale="log", ylabel="learning rate: " + axis.get_ylabel())
