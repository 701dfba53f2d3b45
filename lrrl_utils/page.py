"""The page of a report: one HTML file that needs no other, its template is `report.html` beside this file."""

import base64
from pathlib import Path

import jinja2

from lrrl_utils.runs import clean
from lrrl_utils.tables import Table, show
from lrrl_utils.variants import find_missing

FIGURES = {  # their titles, and what they show
    "curves": (
        "Learning curves",
        "Interquartile mean of the episodic return over seeds, against timesteps. Bands are 95 % bootstrap intervals.",
    ),
    "curves_all": (
        "Learning curves over all tasks",
        "Interquartile mean of the return over seeds and tasks; 0 is the untrained policy, 1 the best constant rate.",
    ),
    "profiles": (
        "Performance profiles",
        "The share of runs whose normalised final return is above τ, with 95 % intervals.",
    ),
    "costs": (
        "Costs",
        "What one run of each variant brings, and what it brings to try constant rates with a run each and to keep the "
        "best. That one counts for its runs with other seeds, for the best of some runs has been lucky. All with the "
        "seeds of the sweep. Variants that cost the same stand a little beside each other.",
    ),
    "improvement": (
        "Probability of improvement",
        "How likely a run of a variant ends higher than one of the baseline on the same task, mean over tasks. "
        "Bars are 95 % intervals.",
    ),
    "rates": (
        "Rates over time",
        "Where bandits spend their rounds: the share of the timesteps of all seeds that each learning rate has.",
    ),
}
SHOWN = ("task", "variant", "seed", "status", "final_return", "auc")  # first columns of a run
NOT_SHOWN = {"env_id", "seed", "command_line", "code"}  # elsewhere, or told by the other options, or warned of


def as_text(x, depth=0):
    """An entry of config.json or summary.json in a cell, of bearable length."""
    if isinstance(x, (list, dict)):
        if depth > 0:
            return "…"
        items = x if isinstance(x, list) else [text for item in x.items() for text in item]
        return f"{' '.join(as_text(item, depth + 1) for item in items):.500}"
    return "" if x is None else f"{x:.6g}" if isinstance(x, float) else f"{clean(str(x)):.500}"


def describe_runs(variants):
    """(Table of all runs: options that differ come first, then summaries; {option: value that all runs have})."""
    runs = [(name, run) for (_, name), group in variants.items() for run in group]
    options = [{clean(key): as_text(x) for key, x in run.config.items() if key not in NOT_SHOWN} for _, run in runs]
    keys = dict.fromkeys(key for these in options for key in these)
    common = {key: options[0].get(key) for key in keys if len({these.get(key) for these in options}) == 1}
    differ = [key for key in keys if key not in common and key not in SHOWN]
    measures = dict.fromkeys(key for _, run in runs for key in run.summary)
    measures = [key for key in measures if key == clean(key) and key not in keys and key not in (*SHOWN, *NOT_SHOWN)]
    table = Table([*SHOWN, *differ, *measures, "folder"], names=2)
    for (name, run), these in zip(runs, options):
        row = [run.config["env_id"], name, str(run.config["seed"]), run.summary["status"]]
        row += [show(run.summary["final_return"]), show(run.summary["auc"])]
        row += [these.get(key, "") for key in differ]
        table.rows.append([*row, *(as_text(run.summary.get(key)) for key in measures), clean(run.folder)])
    return table, common


def write_page(title, tables, figures, variants, warnings, left_out, folder):
    """Write `report.html` into a folder that holds the named figures. Raises OSError if it cannot be written."""
    shown = []
    for name in figures:
        heading, text = FIGURES[name]
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        shown.append({"title": heading, "text": text, "data": data})
    runs, common = describe_runs(variants)
    missing = Table(["task", "variant", "seeds"], names=2)
    missing.rows = [[*names, " ".join(map(str, seeds))] for names, seeds in find_missing(variants).items()]
    gaps = Table(["folder", "reason", "task", "seed", "status", "step"], names=3)
    gaps.rows = [[clean(x.folder), x.reason, x.task, x.seed, x.status, x.step] for x in left_out]
    text = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    content = {"runs": runs, "common": common, "missing": missing, "left_out": gaps, "count": len(runs.rows)}
    page = template.render(title=title, tables=tables, figures=shown, warnings=warnings, **content)
    (folder / "report.html").write_text(page, encoding="utf-8")
