"""Runs in; tables, figures and a page out.

    python report.py runs/hopper --baseline uniform

prints one Markdown row per task and variant, and writes tables and figures into the folder. The interval is a
95 % stratified bootstrap interval of the interquartile mean over seeds (Agarwal et al., NeurIPS 2021). A run that is
damaged or has not finished is named on standard error and left out.

    python report.py runs/hopper --compact results/hopper.parquet
    python report.py results/hopper.parquet --normalize

puts all runs into one file, which does for the folder from then on; its report goes into `results/hopper`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lrrl_utils.command_line import parse_args
from lrrl_utils.compact import read_parquet, write_parquet
from lrrl_utils.figures import (
    find_bandits,
    plot_costs,
    plot_improvements,
    plot_learning_curves,
    plot_overall_curves,
    plot_profiles,
    plot_rates,
)
from lrrl_utils.page import write_page
from lrrl_utils.runs import clean, read_records, select_runs
from lrrl_utils.scales import (
    beside_sweep,
    final_returns,
    find_mixed_scales,
    find_scales,
    find_sweep,
    find_unpaired,
    names_of,
    normalized_returns,
    tasks_of,
    what_a_sweep_brings,
)
from lrrl_utils.statistics import interquartile_mean, paired_mean, plain_mean, probability_of_improvement
from lrrl_utils.tables import Table, as_record, escape, show, show_interval, show_timesteps, to_csv
from lrrl_utils.terminal import reject, say
from lrrl_utils.variants import count_timesteps, find_missing, find_mixed_code, find_mixed_options, group_runs


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]  # parent of the run folders, or a file of --compact
    baseline: tuple[str, ...] = ()  # variants, as the table names them: adds a column of differences to each
    # whether to add tables over all tasks, on a scale where the untrained policy has 0 and the best constant rate 1
    normalize: bool = False
    figures: bool = True  # whether to draw figures and write report.html, too; tables alone are faster
    output: Path | None = None  # folder of the report (default: FOLDER; of a file, the folder beside it of its name)
    compact: Path | None = None  # a Parquet file to put all runs into; there is no report, then
    also: tuple[Path, ...] = ()  # more studies, folders or files, whose runs are put beside those of the first


def find_costs(variants):
    """({(task, variant): timesteps of a run}, title of a column of them), () if all have cost the same."""
    costs = {names: count_timesteps(group[0]) for names, group in variants.items()}
    populations = any("population" in run.config for group in variants.values() for run in group)
    return costs, ("timesteps",) if populations or len(set(costs.values())) > 1 else ()


def make_table(variants, baselines=()):
    """Final returns and areas under the curve of each task and variant, and the differences to `baselines`."""
    costs, timesteps = find_costs(variants)
    titles = ["task", "variant", "seeds", *timesteps, "final return: IQM [95 %]", "of each seed", "AUC: IQM [95 %]"]
    table = Table(titles, 2, "final return minus {}'s, seed by seed: mean [95 %]", baselines)
    for (task, name), group in variants.items():
        finals, aucs = ([run.summary[measure] for run in group] for measure in ("final_return", "auc"))
        final, auc = interquartile_mean(finals), interquartile_mean(aucs)
        row = [task, name, str(len(group)), *(show_timesteps(costs[task, name]) for _ in timesteps)]
        row += [show_interval(*final), ", ".join(map(show, finals)), show_interval(*auc)]
        record = {"task": task, "variant": name, "seeds": len(group), "timesteps": costs[task, name]}
        record |= as_record("final_return", final) | {"final_returns": " ".join(map(str, finals))}
        record |= as_record("auc", auc)
        for baseline in baselines:
            rivals = final_returns(variants.get((task, baseline), []))
            pairs = [(x, rivals[seed]) for seed, x in final_returns(group).items() if seed in rivals]
            if name == baseline or len(pairs) < 2:
                row.append("")
                continue
            difference = paired_mean(*np.transpose(pairs))
            row.append(f"{show_interval(*difference)}, {len(pairs)} pairs")
            record |= as_record(f"final_return minus {baseline}", difference)
        table.rows.append(row)
        table.records.append(record)
    return table


def sum_costs(variants):
    """({variant: timesteps of a run, over all tasks}, title of a column of them), () if all have cost the same."""
    costs, timesteps = find_costs(variants)
    sums = {}
    for (_, name), cost in costs.items():
        sums[name] = sums.get(name, 0) + cost
    return sums, timesteps


def make_normalized_table(variants, returns, baselines=(), plain=False):
    """Over all tasks: interquartile means of `normalized_returns` and of paired differences; or `plain` means."""
    costs, timesteps = sum_costs(variants)
    estimate_from, shown, recorded = interquartile_mean, "IQM", "normalised"
    if plain:
        estimate_from, shown, recorded = plain_mean, "mean", "normalised mean"
    titles = ["over all tasks", "seeds", *timesteps, f"normalised final return: {shown} [95 %]"]
    table = Table(titles, 1, f"minus {{}}'s, pair by pair: {shown} [95 %]", baselines)
    for variant, scores in returns.items():
        row = [variant, str(len(scores)), *(show_timesteps(costs[variant]) for _ in timesteps)]
        record = {"task": "all", "variant": variant, "seeds": len(scores), "timesteps": costs[variant]}
        for baseline in (None, *baselines):
            others = returns.get(baseline, {})
            seeds = [seed for seed in scores if baseline is None or (seed in others and variant != baseline)]
            if len(seeds) < (1 if baseline is None else 2):
                row.append("")
                continue
            estimate = estimate_from([scores[seed] - others.get(seed, 0.0) for seed in seeds])
            row.append(show_interval(*estimate, "{:.2f}".format))
            record |= as_record(recorded if baseline is None else f"{recorded} minus {baseline}", estimate)
        table.rows.append(row)
        table.records.append(record)
    return table


def make_sweep_table(returns, sweep, brought, variants):
    """What it brings to try so many of the constant rates `sweep` with a run each and to keep the best; and a run of
    each variant, those rates included, with the same seeds."""
    costs = {
        name: np.mean([count_timesteps(variants[task, name][0]) for task in tasks_of(variants)]) for name in returns
    }
    cost = np.mean([costs[name] for name in sweep])
    rows = [(f"the best of {tried} constant rates", tried * cost, x) for tried, x in enumerate(brought, 1)]
    for name, scores in beside_sweep(returns, sweep).items():
        rows.append((name, costs[name], interquartile_mean(list(scores.values()))))
    table = Table(["with the seeds of the sweep", "timesteps on each task", "normalised final return: IQM [95 %]"], 1)
    for name, timesteps, estimate in rows:
        table.rows.append([name, show_timesteps(round(timesteps)), show_interval(*estimate, "{:.2f}".format)])
        record = {"task": "all", "variant": name, "timesteps": round(timesteps)}
        table.records.append(record | as_record("normalised, with the seeds of the sweep", estimate))
    return table


def make_improvement_table(variants, baselines):
    """(Table, {baseline: {variant: estimate}}) of probabilities of improvement, of variants with runs on all tasks.

    They are those of the final returns on the same task, mean over tasks.
    """
    costs, timesteps = sum_costs(variants)
    table = Table(["variant", *timesteps], 1, "probability of improvement over {} [95 %]", baselines)
    finals = {
        name: [list(final_returns(variants.get((task, name), [])).values()) for task in tasks_of(variants)]
        for name in names_of(variants)
    }
    finals = {name: of_tasks for name, of_tasks in finals.items() if all(of_tasks)}
    improvements = {baseline: {} for baseline in baselines if baseline in finals}
    for name, ours in finals.items():
        row = [name, *(show_timesteps(costs[name]) for _ in timesteps)]
        record = {"task": "all", "variant": name, "timesteps": costs[name]}
        for baseline in baselines:
            if name == baseline or baseline not in finals:
                row.append("")
                continue
            improvements[baseline][name] = estimate = probability_of_improvement(ours, finals[baseline])
            row.append(show_interval(*estimate, "{:.2f}".format))
            record |= as_record(f"probability of improvement over {baseline}", estimate)
        table.rows.append(row)
        table.records.append(record)
    return table, {baseline: estimates for baseline, estimates in improvements.items() if estimates}


def read_study(paths, with_unfinished=False):
    """({(task, variant): its runs}, whole Records, what is left out) of studies; `reject` one without a finished run.

    What is left out is named on standard error, but for unfinished runs where they are welcome.
    """
    runs, records, left_out = [], [], []
    for path in paths:
        found, unlisted = (read_parquet(path), []) if path.is_file() else read_records(path)
        finished, gaps = select_runs(found)
        gaps += unlisted
        for one in gaps:
            if not (with_unfinished and is_unfinished(one)):
                print(clean(f"left out: {path / one.folder} ({one.reason})"), file=sys.stderr)
        if not finished and not (with_unfinished and any(map(is_unfinished, gaps))):
            option = "FOLDER" if path == paths[0] else "--also"
            reject(f"{option} {path}: must be a folder that holds run folders of finished runs, or a file of --compact")
        damaged = {one.folder for one in gaps if not is_unfinished(one)}
        records += [record for record in found if record.folder not in damaged]
        runs, left_out = runs + finished, left_out + gaps
    return group_runs(runs, paths), records, left_out


def is_unfinished(left_out):
    return left_out.status in ("running", "interrupted", "failed", "diverged")


def publish(records, args):
    """Write the file of --compact."""
    try:
        write_parquet(records, args.compact)
    except OSError as error:
        reject(f"--compact {args.compact}: {error.strerror or error}")
    print(f"{args.compact}: {len(records)} runs, {args.compact.stat().st_size:,} bytes")


def main(argv=None):
    args = parse_args(Args, argv)
    for name in ("baseline", "normalize", "output"):
        if args.compact and getattr(args, name):
            reject(f"--{name}: has no meaning with --compact")
    variants, records, left_out = read_study((args.folder, *args.also), with_unfinished=args.compact is not None)
    if args.compact:
        publish(records, args)
        return
    for baseline in args.baseline:
        if baseline not in (names := sorted(names_of(variants))):
            reject(f"--baseline {baseline}: must be one of {', '.join(names)}")
    for line in list_missing(variants):
        print(line, file=sys.stderr)
    diverged = [one.folder for one in left_out if one.status == "diverged"]
    warnings = [f"runs that have diverged count nowhere, nor do their rates: {', '.join(diverged)}"] if diverged else []
    if args.normalize or args.baseline:
        warnings += find_mixed_options(variants)
    if args.normalize:
        warnings += find_unpaired(variants) + find_mixed_scales(variants)
    for line in (warnings := warnings + find_mixed_code(variants)):
        print(f"warning: {line}", file=sys.stderr)
    output = args.output or (args.folder.with_suffix("") if args.folder.is_file() else args.folder)
    try:
        write_report(args, variants, warnings, left_out, output)
    except OSError as error:
        reject(f"--output {output}: {error.strerror or error}")


def list_missing(variants):
    """A line for each variant that lacks seeds which others have."""
    tasks = {}  # in which the same is missing
    for (task, variant), seeds in find_missing(variants).items():
        tasks.setdefault((variant, " ".join(map(str, seeds))), []).append(task)
    return [f"missing: {' '.join(names)}, {variant}, seeds {seeds}" for (variant, seeds), names in tasks.items()]


def write_report(args, variants, warnings, left_out, output):
    """Print the tables as Markdown, and write all of the report into the folder `output`."""
    tables = [make_table(variants, args.baseline)]
    if args.normalize:
        ruinous = [one.options for one in left_out if one.status == "diverged"]
        scales = find_scales(variants, ruinous)
        returns = normalized_returns(variants, scales)
        tables += [make_normalized_table(variants, returns, args.baseline, plain) for plain in (False, True)]
        if sweep := find_sweep(variants, returns, ruinous):
            brought = what_a_sweep_brings(returns, sweep)
            tables.append(make_sweep_table(returns, sweep, brought, variants))
    if args.baseline:
        improvement_table, improvements = make_improvement_table(variants, args.baseline)
        tables.append(improvement_table)
    first, *others = [table.to_markdown() for table in tables]
    parts = [first, *map(escape, warnings), *others]
    say("\n\n".join(parts))
    output.mkdir(parents=True, exist_ok=True)
    gaps = [*list_missing(variants), *(f"left out: {clean(one.folder)} ({clean(one.reason)})" for one in left_out)]
    parts += map(escape, gaps)
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (output / "report.csv").write_text(to_csv(tables), encoding="utf-8")
    if not args.figures:
        return
    figures = [plot_learning_curves(variants, output)]
    if args.normalize:
        figures += [plot_overall_curves(variants, scales, output), plot_profiles(returns, variants, output)]
        if sweep:
            figures.append(plot_costs(returns, sweep, brought, variants, output))
    if args.baseline and improvements:
        figures.append(plot_improvements(improvements, variants, output))
    if find_bandits(variants):
        figures.append(plot_rates(variants, output))
    study = args.folder.resolve()
    title = f"Report: {clean(study.stem if study.is_file() else study.name)}"
    write_page(title, tables, figures, variants, warnings, left_out, output)


if __name__ == "__main__":
    main()
