"""Runs put together: which of them are seeds of one variant, what it is called, and which runs are missing."""

from lrrl_utils.runs import clean, options_of
from lrrl_utils.terminal import reject

CONTROL_OPTIONS = {  # those that make variants of different names different, and mean nothing to some of them
    *("lr_control", "learning_rate", "learning_rates", "lr_decay_rate", "target_kl", "population"),
    *("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"),
    *("bandit", "bandit_scope", "bandit_step_size", "bandit_decay", "bandit_window", "bandit_interval"),
    *("bandit_feedback", "lr_range", "rollback"),
}


def differing(runs):
    """The options in which `runs` differ."""
    options = [options_of(run.config) for run in runs]
    keys = dict.fromkeys(key for these in options for key in these)
    return [key for key in keys if any(these.get(key) != options[0].get(key) for these in options)]


def derive_names(runs):
    """{(task, variant): [run, …]} of runs whose variant has no name of its own.

    It is named after what sets the learning rate, the script where a task has runs of several, and the options in which
    its runs differ from others of the same script on any task.
    """
    groups, scripts, variants = {}, {}, {}
    for run in runs:
        task, script, control = (run.config[key] for key in ("env_id", "exp_name", "lr_control"))
        has_rate = control not in ("cyclic", "pb2", "pbt")
        fixed = f"{control} {run.config['learning_rate']:g}" if has_rate else control
        name = run.config["bandit"] if control == "bandit" else fixed
        groups.setdefault((task, name, script), []).append(run)
        scripts.setdefault(task, {}).setdefault(script, []).append(run)
    own, of_script = {}, {}
    for (task, name, script), group in groups.items():
        own.setdefault((name, script), {}).update(dict.fromkeys(differing(group)))
        rivals = [key for key in differing(scripts[task][script]) if key not in CONTROL_OPTIONS]
        of_script.setdefault(script, {}).update(dict.fromkeys(rivals))
    several = ["exp_name"] if any(len(of_task) > 1 for of_task in scripts.values()) else []
    for (task, name, script), group in sorted(groups.items(), key=lambda item: item[0]):
        keys = dict.fromkeys([*several, *own[name, script], *of_script[script]])
        for run in group:
            values = {key: run.config.get(key) for key in keys}
            if "lr_range" in values:  # the arms follow from it
                values.pop("lr_range" if values["lr_range"] is None else "learning_rates", None)
            lists = {key: x for key, x in values.items() if isinstance(x, list)}
            values |= {key: " ".join(str(item).removesuffix(".0") for item in x) for key, x in lists.items()}
            settings = ", ".join(f"{key} {x}" for key, x in values.items())
            variants.setdefault((task, clean(f"{name} ({settings})" if settings else name)), []).append(run)
    return variants


def group_runs(runs, studies):
    """{(task, variant): [run, …]}, in the order of the seeds; `reject` a variant that is not one.

    A variant has the name of the folder that its runs lie in, or a derived one if they lie in that of the study.
    `studies` are the paths that the runs come from.
    """
    named, unnamed = {}, []
    for run in runs:
        *_, variant, _ = ("", *run.folder.split("/"))
        if variant:
            named.setdefault((run.config["env_id"], clean(variant)), []).append(run)
        else:
            unnamed.append(run)
    variants = derive_names(unnamed)
    for names, group in named.items():
        variants[names] = variants.get(names, []) + group
    for (task, variant), group in variants.items():
        if different := differing(group):
            reject(
                f"{' '.join(map(str, studies))}: holds runs of {task}, {variant} that differ in {', '.join(different)}"
            )
    if named:  # else the order is that of the names without their options
        variants = dict(sorted(variants.items()))
    for (task, name), group in variants.items():
        group.sort(key=lambda run: run.config["seed"])
        seeds = [run.config["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            reject(f"{' '.join(map(str, studies))}: holds a seed more than once for {task}, {name}: {seeds}")
    return variants


def differing_code(runs):
    """The files in which `runs` differ; if a run lacks their hashes, whether the commits do."""
    codes = [run.config.get("code") for run in runs]
    if not all(codes):
        codes = [{"git_commit": run.config.get("git_commit")} for run in runs]
    files = dict.fromkeys(file for code in codes for file in code)
    return [file for file in files if len({code.get(file) for code in codes}) > 1]


def find_mixed_code(variants):
    """A line for each variant whose runs on a task differ in their code."""
    tasks = {}  # in which the same differs
    for (task, variant), group in variants.items():
        if different := differing_code(group):
            tasks.setdefault((variant, ", ".join(different)), []).append(task)
    return [clean(f"{' '.join(names)}, {x}: pools runs of different code ({y})") for (x, y), names in tasks.items()]


def find_mixed_options(variants):
    """A line for each variant whose runs on different tasks differ in more than the task."""
    firsts, lines = {}, []
    for (_, variant), group in variants.items():
        firsts.setdefault(variant, []).append(group[0])
    for variant, runs in firsts.items():
        different = [key for key in differing(runs) if key != "env_id"]
        if "exp_name" in different:  # all else follows
            different = ["exp_name"]
        elif code := differing_code(runs):
            different.append(f"their code ({', '.join(code)})")
        if different:
            lines.append(clean(f"{variant}: its tasks differ in {', '.join(different)}"))
    return lines


def find_missing(variants):
    """{(task, variant): seeds} of the runs that are not there though other variants have that task and seed."""
    seeds = {}
    for (task, _), group in variants.items():
        seeds.setdefault(task, set()).update(run.config["seed"] for run in group)
    missing = {}
    for variant in dict.fromkeys(name for _, name in variants):
        for task, expected in seeds.items():
            absent = expected - {run.config["seed"] for run in variants.get((task, variant), [])}
            if absent:
                missing[task, variant] = sorted(absent)
    return missing


def count_timesteps(run):
    """Timesteps that a run has cost: a population's members count each."""
    return (run.config.get("total_timesteps") or run.summary["global_step"]) * (run.config.get("population") or 1)
