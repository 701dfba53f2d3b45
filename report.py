"""Run folders in; a table and a figure of learning curves out.

    python report.py results/ppo_halfcheetah

prints one Markdown row per task and variant and writes `report.md` and `curves.png` into the folder. The interval is a
95 % stratified bootstrap interval of the interquartile mean over seeds (Agarwal et al., NeurIPS 2021). A folder
without a whole, finished run is named on standard error and left out.

    python report.py results/ppo_bandits --normalize --baseline uniform lrrl

adds the differences to two variants, seed by seed, and a table over all tasks.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from scipy.stats import trim_mean, ttest_rel

from lrrl_utils.command_line import parse_args
from lrrl_utils.measures import read_csv
from lrrl_utils.terminal import reject

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

BOOTSTRAP_REPETITIONS = 10_000
CURVE_POINTS = 60
LARGEST = 1e30  # numbers beyond it overflow in sums and figures
NO_OPTIONS = {  # entries of config.json that do not make runs different
    *("seed", "run_dir", "device", "versions", "git_commit", "code", "cuda", "torch_deterministic", "compile"),
    *("rollouts_per_round", "command_line", "resume", "resumed", "checkpoint_interval", "threads"),
    *("buffer_device", "replay_device", "keep_replay", "eval_e", "track", "wandb_project_name", "wandb_entity"),
    *("capture_video", "save_model", "eval_episodes"),
}
CONTROL_OPTIONS = {  # those that make variants of different names different, and mean nothing to some of them
    *("lr_control", "learning_rate", "learning_rates", "lr_decay_rate", "target_kl"),
    *("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"),
    *("bandit", "bandit_scope", "bandit_step_size", "bandit_decay", "bandit_window", "bandit_interval"),
    *("bandit_feedback", "lr_range", "rollback"),
}
NUMBER, NONE = (int, float), type(None)
CONFIG = {  # types of the entries of config.json that are used by name
    **{"env_id": (str,), "seed": (int,), "lr_control": (str,), "learning_rate": NUMBER, "learning_rates": (list, NONE)},
    **dict.fromkeys(("num_envs", "num_steps", "learning_starts"), (NONE, *NUMBER)),
    **{"exp_name": (str, NONE), "git_commit": (str, NONE), "code": (dict, NONE)},
}
MARKDOWN = {ord(c): f"&#{ord(c)};" for c in "\\|`<>&[]*$"}  # entities: a backslash does not protect everywhere


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]  # parent of the run folders
    baseline: tuple[str, ...] = ()  # variants, as the table names them: adds a column of differences to each
    # whether to add a table over all tasks, on a scale where the untrained policy has 0 and the best constant rate 1
    normalize: bool = False


def clean(text):
    """`text` on one line, without colours and other codes for a terminal."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def check(entries, kinds):
    """A ValueError for the first of the entries that is not of one of its types, or is or holds no plain value."""
    for name, types in kinds.items():
        x = entries.get(name)
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else [x]
        plain = (type(v) in (str, bool, NONE) or (type(v) in NUMBER and abs(v) < LARGEST) for v in values)
        if type(x) not in types or not all(plain):
            raise ValueError(f"{name} is {x!r:.60}" if name in entries else f"{name} is missing")


def read_dict(path):
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError("holds no dictionary")
    return entries


def read_summary(path):
    summary = read_dict(path)
    if summary.get("status") != "finished":
        raise ValueError(f"status {summary.get('status')!r:.60}")
    if summary.get("final_return", 0) is None:
        raise ValueError("no episode has ended")
    check(summary, dict.fromkeys(("final_return", "auc", "global_step"), NUMBER))
    return summary


def read_config(path):
    config = read_dict(path)
    options = {key: (str, bool, NONE, list, *NUMBER) for key in config if key not in NO_OPTIONS}
    check(config, options | CONFIG | ({"bandit": (str,)} if config.get("lr_control") == "bandit" else {}))
    return config | {"env_id": clean(config["env_id"]), "exp_name": config.get("exp_name") or "unknown"}


def read_episodes(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        raise ValueError("holds no episode")
    if len({line.count(",") for line in lines}) > 1:
        raise ValueError("holds rows of different lengths")
    episodes = read_csv(path)
    for name in ("global_step", "episodic_return"):
        if name not in episodes or not np.all(np.abs(episodes[name]) < LARGEST):
            raise ValueError(f"{name} is not a finite number in each row")
    if np.any(np.diff(episodes["global_step"]) < 0):
        raise ValueError("global_step goes back")
    return episodes


def read_run(folder):
    """The run in `folder` as {"summary": …, "config": …, "episodes": …}; a ValueError with the reason if it is bad."""
    run = {}
    for name, read in (("summary.json", read_summary), ("config.json", read_config), ("episodes.csv", read_episodes)):
        try:
            if not (folder / name).is_file():  # reading a pipe would never end
                raise ValueError("no such file")
            run[name.split(".")[0]] = read(folder / name)
        except Exception as error:  # of many kinds: files can hold anything
            raise ValueError(f"{name}: {error}") from error
    return run


def find_runs(folder):
    """The finished runs below `folder`; one line on standard error for each that is left out."""
    runs = []
    for path in sorted(folder.glob("*")):
        try:
            if path.is_dir() and {"summary.json", "config.json"} & set(os.listdir(path)):
                runs.append(read_run(path))
        except (OSError, ValueError) as error:
            print(clean(f"left out: {path} ({str(error):.200})"), file=sys.stderr)
    return runs


def differing(runs):
    """The options in which `runs` differ."""
    options = [{key: x for key, x in run["config"].items() if key not in NO_OPTIONS} for run in runs]
    keys = dict.fromkeys(key for these in options for key in these)
    return [key for key in keys if any(these.get(key) != options[0].get(key) for these in options)]


def read_runs(folder):
    """The finished runs below `folder` as {(task, variant): [run, …]}, in the order of their seeds.

    A variant is named after what sets the learning rate, the script where a task has runs of several, and the options
    in which its runs differ from others of the same script.
    """
    groups, scripts, runs = {}, {}, {}
    for run in find_runs(folder):
        task, script, control = (run["config"][key] for key in ("env_id", "exp_name", "lr_control"))
        fixed = control if control == "cyclic" else f"{control} {run['config']['learning_rate']:g}"
        name = run["config"]["bandit"] if control == "bandit" else fixed
        groups.setdefault((task, name, script), []).append(run)
        scripts.setdefault(task, {}).setdefault(script, []).append(run)
    for (task, name, script), group in sorted(groups.items(), key=lambda item: item[0]):
        rivals = [key for key in differing(scripts[task][script]) if key not in CONTROL_OPTIONS]
        keys = dict.fromkeys((["exp_name"] if len(scripts[task]) > 1 else []) + differing(group) + rivals)
        for run in sorted(group, key=lambda run: run["config"]["seed"]):
            values = {key: run["config"].get(key) for key in keys}
            if "lr_range" in values:  # the arms follow from it
                values.pop("lr_range" if values["lr_range"] is None else "learning_rates", None)
            lists = {key: x for key, x in values.items() if isinstance(x, list)}
            values |= {key: " ".join(str(item).removesuffix(".0") for item in x) for key, x in lists.items()}
            settings = ", ".join(f"{key} {x}" for key, x in values.items())
            runs.setdefault((task, clean(f"{name} ({settings})" if settings else name)), []).append(run)
    for (task, name), group in runs.items():
        seeds = [run["config"]["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            reject(f"{folder}: holds a seed more than once for {task}, {name}: {seeds}")
    return runs


def find_mixed_code(runs):
    """A line for each variant whose runs differ in the hashes of their code or, if a run lacks these, in the commit."""
    lines = []
    for (task, variant), group in runs.items():
        codes = [run["config"].get("code") for run in group]
        if not all(codes):
            codes = [{"git_commit": run["config"].get("git_commit")} for run in group]
        files = dict.fromkeys(file for code in codes for file in code)
        different = [file for file in files if len({code.get(file) for code in codes}) > 1]
        if different:
            lines.append(clean(f"{task}, {variant}: pools runs of different code ({', '.join(different)})"))
    return lines


def interquartile_mean(scores):
    """Interquartile mean of `scores`, (seeds,) or (seeds, tasks), and the two ends of its interval.

    As in rliable, the percentile bootstrap draws seeds anew for each task; here, all repetitions at once.
    """
    scores = np.array(scores, dtype=float).reshape(len(scores), -1)
    seeds = np.random.RandomState(0).choice(len(scores), (BOOTSTRAP_REPETITIONS, *scores.shape))
    samples = scores[seeds, np.arange(scores.shape[1])].reshape(BOOTSTRAP_REPETITIONS, -1)
    low, high = np.percentile(trim_mean(samples, 0.25, axis=1), [2.5, 97.5])
    return trim_mean(scores, 0.25, axis=None), low, high


def show(x):
    """At least three digits of a return."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def final_returns(group):
    return {run["config"]["seed"]: run["summary"]["final_return"] for run in group}


def paired_difference(group, baseline):
    """Final returns minus those of the same seeds in `baseline`: mean and 95 % interval of Student's t, as text."""
    a, b = final_returns(group), final_returns(baseline)
    seeds = sorted(a.keys() & b.keys())
    if group is baseline or len(seeds) < 2:
        return ""
    ours, theirs = np.array([(a[seed], b[seed]) for seed in seeds]).T
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    return f"{show(np.mean(ours - theirs))} [{show(low)}, {show(high)}], {len(seeds)} pairs"


def make_table(runs, baselines=()):
    """A Markdown table of final returns and areas under the curve, and of the differences to `baselines`."""
    columns = ["task", "variant", "seeds", "final return: IQM [95 %]", "of each seed", "AUC: IQM [95 %]"]
    columns += [f"final return minus {baseline}'s, seed by seed: mean [95 %]" for baseline in baselines]
    lines = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for (task, name), group in runs.items():
        cells = [task, name, str(len(group))]
        for measure in ("final_return", "auc"):
            values = [run["summary"][measure] for run in group]
            point, low, high = interquartile_mean(values)
            cells.append(f"{show(point)} [{show(low)}, {show(high)}]")
            if measure == "final_return":
                cells.append(", ".join(show(value) for value in values))
        cells += [paired_difference(group, runs.get((task, baseline), [])) for baseline in baselines]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_scale(task, groups):
    """Mean return of the untrained policy on a task, and the highest mean final return of a constant rate.

    The former is the mean over the episodes that end before the first update, of all runs.
    """
    constants = [group for group in groups if group[0]["config"]["lr_control"] == "constant"]
    if not constants:
        reject(f"--normalize: there is no run of {task} with --lr-control constant")
    best = max(np.mean(list(final_returns(group).values())) for group in constants)
    untrained = []
    for run in (run for group in groups for run in group):
        starts, *rollout = (run["config"].get(key) or 0 for key in ("learning_starts", "num_envs", "num_steps"))
        before = run["episodes"]["global_step"] <= (starts or np.prod(rollout))
        untrained += run["episodes"]["episodic_return"][before].tolist()
    if not untrained or np.mean(untrained) >= best:
        reject(f"--normalize: there is no constant rate of {task} that is better than the untrained policy")
    return np.mean(untrained), best


def normalized_returns(runs):
    """Final returns where the untrained policy has 0 and the best constant rate 1, {variant: {seed: (tasks,)}}.

    Only variants with runs on all tasks are there, with the seeds that they have on all of them.
    """
    scales, returns = {}, {}
    for task in sorted({task for task, _ in runs}):
        scales[task] = find_scale(task, [group for (of_task, _), group in runs.items() if of_task == task])
    zeros, ones = np.array(list(scales.values())).T
    for variant in dict.fromkeys(name for _, name in runs):
        finals = [final_returns(runs.get((task, variant), [])) for task in scales]
        if all(finals):
            seeds = sorted(set.intersection(*map(set, finals)))
            scores = {seed: np.array([of_task[seed] for of_task in finals]) for seed in seeds}
            returns[variant] = {seed: (x - zeros) / (ones - zeros) for seed, x in scores.items()}
    return returns


def make_normalized_table(runs, baselines=()):
    """A Markdown table over all tasks: interquartile means of normalised final returns and of paired differences."""
    returns = normalized_returns(runs)
    columns = ["over all tasks", "seeds", "normalised final return: IQM [95 %]"]
    columns += [f"minus {baseline}'s, pair by pair: IQM [95 %]" for baseline in baselines]
    lines = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for variant, scores in returns.items():
        cells = [variant, str(len(scores))]
        for baseline in (None, *baselines):
            others = returns.get(baseline, {})
            seeds = [seed for seed in scores if baseline is None or (seed in others and variant != baseline)]
            differences = [scores[seed] - others.get(seed, 0.0) for seed in seeds]
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*interquartile_mean(differences)) if seeds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
            first = max(run["episodes"]["global_step"][0] for run in group)
            last = min(run["summary"]["global_step"] for run in group)
            edges = np.linspace(first, last, CURVE_POINTS + 1)
            steps = (edges[:-1] + edges[1:]) / 2
            curves = []
            for run in group:
                ends, returns = run["episodes"]["global_step"], run["episodes"]["episodic_return"]
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


def main(argv=None):
    args = parse_args(Args, argv)
    runs = read_runs(args.folder)
    if not runs:
        reject(f"FOLDER {args.folder}: must be a folder that holds run folders of finished runs")
    for baseline in args.baseline:
        if baseline not in (names := sorted({name for _, name in runs})):
            reject(f"--baseline {baseline}: must be one of {', '.join(names)}")
    for line in (mixed := find_mixed_code(runs)):
        print(f"warning: {line}", file=sys.stderr)
    escaped = {tuple(name.translate(MARKDOWN) for name in names): group for names, group in runs.items()}
    baselines = [name.translate(MARKDOWN) for name in args.baseline]
    table = "\n\n".join([make_table(escaped, baselines), *(line.translate(MARKDOWN) for line in mixed)])
    if args.normalize:
        table += "\n\n" + make_normalized_table(escaped, baselines)
    print(table)
    (args.folder / "report.md").write_text(table + "\n", encoding="utf-8")
    plot_learning_curves(runs, args.folder / "curves.png")


if __name__ == "__main__":
    main()
