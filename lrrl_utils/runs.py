"""The runs of a study: its folder holds run folders, or folders of run folders, which then name their variant.

Files may hold anything: a run that is damaged or has not finished is left out, with its reason.
"""

import json
import os
import re
from dataclasses import dataclass

import numpy as np

from lrrl_utils.files import open_regular
from lrrl_utils.measures import read_csv

LARGEST = 1e30  # numbers beyond it overflow in sums and figures
NUMBER, NONE = (int, float), type(None)
CONFIG = {  # types of the entries of config.json that are used by name
    **{"env_id": (str,), "seed": (int,), "lr_control": (str,), "learning_rate": NUMBER, "learning_rates": (list, NONE)},
    **dict.fromkeys(("num_envs", "num_steps", "learning_starts", "total_timesteps", "population"), (NONE, *NUMBER)),
    **{"exp_name": (str, NONE), "git_commit": (str, NONE), "code": (dict, NONE)},
}
NO_OPTIONS = {  # entries of config.json that do not make runs different
    *("seed", "run_dir", "device", "versions", "git_commit", "code", "cuda", "torch_deterministic", "compile"),
    *("rollouts_per_round", "command_line", "resume", "resumed", "checkpoint_interval", "threads", "arms"),
    *("buffer_device", "replay_device", "keep_replay", "eval_e", "track", "wandb_project_name", "wandb_entity"),
    *("capture_video", "save_model", "eval_episodes", "rates", "stretches"),
}


@dataclass
class Record:
    """What a run folder holds: JSON files as texts, CSV files as {column: (rows,) array}; else why it does not."""

    folder: str  # below the study
    summary: str | Exception
    config: str | Exception
    episodes: dict | Exception
    rounds: dict | Exception | None  # None: there is no such file


@dataclass
class Run:
    """A finished run."""

    folder: str  # below the study
    summary: dict
    config: dict
    episodes: dict  # {column: (episodes,) array}
    rounds: dict  # {column: (rounds,) array}; {} if there are none


@dataclass
class LeftOut:
    """A run folder, or a file of it, that does not count."""

    folder: str
    reason: str
    task: str = ""  # what can be told of it
    seed: str = ""
    status: str = ""
    step: str = ""
    options: dict | None = None  # see `options_of`


def clean(text):
    """`text` on one line, without colours and other codes for a terminal."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- files ------------------------------------------------------------------------------------------------------------


def read_text(path):
    with open(open_regular(path), encoding="utf-8") as file:
        return file.read()


def read_columns(path):
    lines = read_text(path).splitlines()
    if len({line.count(",") for line in lines}) > 1:
        raise ValueError("holds rows of different lengths")
    return read_csv(path) if lines else {}


def read_file(path, read):
    try:
        if not path.is_file():  # reading a pipe would never end
            raise ValueError("no such file")
        return read(path)
    except Exception as error:  # of many kinds
        return error


def read_folder(path, name):
    """The Record of a run folder; `name` is its path below the study."""
    summary, config = (read_file(path / file, read_text) for file in ("summary.json", "config.json"))
    episodes, rounds = (read_file(path / file, read_columns) for file in ("episodes.csv", "rounds.csv"))
    return Record(name, summary, config, episodes, rounds if os.path.lexists(path / "rounds.csv") else None)


def read_records(study, below=""):
    """(a Record of each run folder, a LeftOut for each folder that cannot be listed), in a study or variant folder."""
    records, left_out = [], []
    for path in sorted(study.glob("*")):
        name = f"{below}{path.name}"
        try:
            if not path.is_dir():
                continue
            if {"summary.json", "config.json", "episodes.csv"} & set(os.listdir(path)):
                records.append(read_folder(path, name))
            elif not below:
                of_variant = read_records(path, f"{name}/")
                records += of_variant[0]
                left_out += of_variant[1]
        except OSError as error:
            left_out.append(LeftOut(name, clean(f"{error!s:.200}")))
    return records, left_out


# --- checks -----------------------------------------------------------------------------------------------------------


def check(entries, kinds):
    """A ValueError for the first of the entries that is not of one of its types, or is or holds no plain value."""
    for name, types in kinds.items():
        x = entries.get(name)
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else [x]
        plain = (type(v) in (str, bool, NONE) or (type(v) in NUMBER and abs(v) < LARGEST) for v in values)
        if type(x) not in types or not all(plain):
            raise ValueError(f"{name} is {x!r:.60}" if name in entries else f"{name} is missing")


def parse_dict(text):
    entries = json.loads(text)
    if not isinstance(entries, dict):
        raise ValueError("holds no dictionary")
    return entries


def parse_summary(text):
    summary = parse_dict(text)
    if summary.get("status") != "finished":
        raise ValueError(f"status {summary.get('status')!r:.60}")
    if summary.get("final_return", 0) is None:
        raise ValueError("no episode has ended")
    check(summary, dict.fromkeys(("final_return", "auc", "global_step"), NUMBER))
    return summary


def parse_config(text):
    config = parse_dict(text)
    options = {key: (str, bool, NONE, list, *NUMBER) for key in config if key not in NO_OPTIONS}
    of_control = {"bandit": {"bandit": (str,)}, "pb2": {"learning_rate": (NONE,)}, "pbt": {"learning_rate": (NONE,)}}
    check(config, options | CONFIG | of_control.get(str(config.get("lr_control")), {}))
    return config | {"env_id": clean(config["env_id"]), "exp_name": config.get("exp_name") or "unknown"}


def options_of(config):
    """What makes runs different, but for their seed."""
    return {key: x for key, x in config.items() if key not in NO_OPTIONS}


def check_columns(columns, *names):
    if len({len(x) for x in columns.values()}) > 1:
        raise ValueError("holds rows of different lengths")
    for name in names:
        if name not in columns or columns[name].dtype.kind != "f" or not np.all(np.abs(columns[name]) < LARGEST):
            raise ValueError(f"{name} is not a finite number in each row")
    if np.any(np.diff(columns["global_step"]) < 0):
        raise ValueError("global_step goes back")
    return columns


def parse_episodes(columns):
    if not all(len(x) for x in columns.values()) or not columns:
        raise ValueError("holds no episode")
    return check_columns(columns, "global_step", "episodic_return")


def parse_rounds(columns):
    return check_columns(columns, "global_step", "learning_rate") if columns else {}


def parse_part(record, part, parse):
    """What `parse` makes of a file of a record; a ValueError that names the file if there is none or it is bad."""
    content, file = getattr(record, part), f"{part}.{'json' if parse in (parse_summary, parse_config) else 'csv'}"
    try:
        if isinstance(content, Exception):
            raise content
        return parse(content)
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def describe(record, reason):
    """The LeftOut of a record, with what its JSON files tell of it."""
    known, options = {}, None
    try:
        config, summary = parse_config(record.config), parse_dict(record.summary)
        known = {"task": config["env_id"], "seed": config["seed"]}
        known |= {"status": summary.get("status"), "step": summary.get("global_step", "")}
        options = options_of(config)
    except Exception:  # tells of nothing, then
        known = {}
    known = {key: clean(f"{x!s:.60}") for key, x in known.items()}
    return LeftOut(record.folder, clean(f"{reason!s:.200}"), **known, options=options)


def select_runs(records):
    """(the finished Runs among the records, a LeftOut for each of the others)."""
    runs, left_out = [], []
    for record in records:
        try:
            summary, config = parse_part(record, "summary", parse_summary), parse_part(record, "config", parse_config)
            run = Run(record.folder, summary, config, parse_part(record, "episodes", parse_episodes), {})
        except ValueError as error:
            left_out.append(describe(record, error))
            continue
        runs.append(run)
        try:
            run.rounds = parse_part(record, "rounds", parse_rounds) if record.rounds is not None else {}
        except ValueError as error:  # the returns are whole
            left_out.append(LeftOut(f"{record.folder}/rounds.csv", clean(f"{error!s:.200}")))
    return runs, left_out
