"""Studies for tests of the report: run folders as the scripts leave them, made in no time."""

import json


def write_run(parent, task, seed, final_return, status="finished", rounds=None, **config):
    """A run folder below `parent`; `rounds` is the text of its rounds.csv."""
    parent.mkdir(exist_ok=True)
    folder = parent / f"{task}__{len(list(parent.iterdir()))}".replace("/", "|")
    folder.mkdir()
    config = {"env_id": task, "seed": seed, "lr_control": "bandit", "bandit": "lrrl", "learning_rate": 3e-4} | config
    (folder / "config.json").write_text(json.dumps(config))
    auc = final_return and final_return / 2
    summary = {"status": status, "global_step": 1000, "final_return": final_return, "auc": auc}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = "".join(f"{step},{(final_return or 0) * step / 1000},100\n" for step in range(100, 1001, 100))
    (folder / "episodes.csv").write_text(f"global_step,episodic_return,episodic_length\n{rows}")
    if rounds is not None:
        (folder / "rounds.csv").write_text(rounds)
    return folder


def read_table(text):
    """The cells of the first Markdown table in `text`, without its two header lines."""
    rows = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
