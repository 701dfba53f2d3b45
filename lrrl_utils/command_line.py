"""The command line of the programs: tyro over a dataclass, bad input brought down to one line and exit code 2.

    @dataclass
    class Args:
        # ALGORITHM
        gamma: Share = 0.99  # discount factor

    args = parse_args(Args)  # a wrong value ends here

A comment behind an option is its help, one in capitals a heading. A type may name the interval that values must be in.
With `--resume RUN_FOLDER`, the options are those of that run, but for what may change.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import get_type_hints

from lrrl_utils.files import read_json
from lrrl_utils.parser import given_options, parse_words
from lrrl_utils.ranges import intervals_of, is_in
from lrrl_utils.rivals import bandits_with
from lrrl_utils.schedules import choose_arms
from lrrl_utils.terminal import open_terminal, option_name, reject, reject_errors

SCHEDULES = ("linear", "exponential", "cosine")
MEANINGS = {  # {option that chooses: {option: the choices that it has a meaning for}}
    "lr_control": {
        "learning_rate": ("constant", *SCHEDULES, "kl"),
        "lr_decay_rate": ("exponential",),
        "target_kl": ("kl",),
        **dict.fromkeys(("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"), ("cyclic",)),
        **dict.fromkeys(("learning_rates", "lr_range", "bandit", "bandit_scope", "rollback"), ("bandit",)),
        **dict.fromkeys(("bandit_step_size", "bandit_decay", "bandit_window"), ("bandit",)),
    },
    "optimizer": {"momentum": ("rmsprop", "sgd"), "optimizer_eps": ("adam", "adamrel", "rmsprop", "centered-rmsprop")},
    "autotune": {"alpha": (False,), "alpha_lr_ratio": (True,)},
    "bandit_scope": {"policy_lr_ratio": ("joint", "critic")},
    "tuner": dict.fromkeys(("population", "tuner_range", "tuner_rounds"), ("pb2", "pbt")),
}
MAY_CHANGE = (  # when a run is resumed: no step depends on them, but for games, which get a new seed if they are filmed
    *("resume", "run_dir"),  # that the folder lies in
    *("track", "wandb_project_name", "wandb_entity", "save_model", "eval_episodes", "capture_video", "keep_replay"),
)


def check(args, interval, *names):
    """`reject` the first number among the named arguments (or their items) that is not in `interval`."""
    for name in names:
        values = getattr(args, name)
        for x in values if isinstance(values, tuple) else (values,):
            if isinstance(x, (int, float)) and not is_in(x, interval):
                reject(f"{option_name(name)} {x}: must be in {interval}")


def check_meaning(args, given, choice, meanings):
    """`reject` the first given option without a meaning; `meanings`: {option: values of `choice` that it goes with}."""
    value = getattr(args, choice)
    for option in sorted(given & meanings.keys()):
        if value not in meanings[option]:
            if isinstance(value, bool):
                given_value, needed = (f"--{'' if x else 'no-'}{choice}" for x in (value, not value))
            else:
                given_value, needed = (f"--{choice} {' or '.join(map(str, x))}" for x in ([value], meanings[option]))
            if value is None:
                reject(f"--{option}: has no meaning without {needed}".replace("_", "-"))
            reject(f"--{option}: has no meaning with {given_value}; it needs {needed}".replace("_", "-"))


def parse_args(args_class, argv=None, presets=None):
    """The arguments as an `args_class`, checked one by one; what is wrong between two of them is left to the program.

    `presets`, {name: {argument: value}}, have other defaults in store for whoever gives that name as --preset.
    With --resume, options that are not given are those of the run that is resumed. `command_line`, beside the fields of
    `args_class`, is the list of words that all of them came from. `learning_rates` is the tuple of arms that are meant.
    """
    open_terminal()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_words(args_class, argv, presets)
    args.command_line = argv
    if getattr(args, "resume", None) is not None:
        args = merge_with_resumed(args_class, args, presets)
    given = given_options(args.command_line)
    for choice, meanings in MEANINGS.items():
        if hasattr(args, choice):
            meaningful = {"learning_rate"} if getattr(args, "bandit_scope", "joint") in ("critic", "actor") else set()
            check_meaning(args, given - meaningful, choice, meanings)
    if hasattr(args, "lr_range"):
        check_meaning(args, given, "bandit", {f"bandit_{name}": bandits_with(name) for name in bandit_options(args)})
        if {"learning_rates", "lr_range"} <= given:
            reject("--lr-range: takes the place of --learning-rates; give one of them")
    if hasattr(args, "learning_rates"):
        with reject_errors("--lr-range"):
            lr_range = getattr(args, "lr_range", None)
            args.learning_rates = choose_arms(args.learning_rates, lr_range, args_class.learning_rates)
    for name, hint in get_type_hints(args_class, include_extras=True).items():
        for interval in intervals_of(hint):
            check(args, interval, name)
    if hasattr(args, "cyclic_max_lr"):
        check(args, f"({args.cyclic_base_lr}, 1e+37]", "cyclic_max_lr")
    if getattr(args, "keep_replay", False) and not args.checkpoint_interval:
        reject("--keep-replay: has no meaning without --checkpoint-interval")
    if getattr(args, "bandit_feedback", "") is None:
        as_in_paper = args.lr_control != "bandit" or args.bandit in ("lrrl", "uniform")
        args.bandit_feedback = "reward" if as_in_paper else "return"
    return args


def decide_compile(args, min_timesteps):
    """Unless the command line has decided it, compile where that pays: on a CPU, from `min_timesteps` on.

    `command_line` has it from now on, so that a run that is resumed for longer stays what it is.
    """
    if args.resume or "compile" in given_options(args.command_line):
        return
    import torch

    args.compile = args.total_timesteps >= min_timesteps and not (args.cuda and torch.cuda.is_available())
    args.command_line = [*args.command_line, "--compile" if args.compile else "--no-compile"]


def check_stored_words(args_class, args, words, exp_name):
    """`reject` a run folder whose command line is not made of options of `args_class`."""
    names = {field.name for field in dataclasses.fields(args_class)}
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        reject(f"--resume {args.resume}: its config.json holds no command line")
    if exp_name != args.exp_name and "exp_name" not in given_options(words):
        reject(f"--resume {args.resume}: is a run of {exp_name}")
    if words and not words[0].startswith("--"):
        reject(f"--resume {args.resume}: its config.json holds a command line with a stray {words[0]!r}")
    for word in words:
        known = word.startswith("--") and given_options([word]) <= names
        if word.startswith("-") and not known and not re.fullmatch(r"-[\d.]+(e[-+]?\d+)?", word):
            reject(f"--resume {args.resume}: its config.json holds {word!r}, which is no option of a run")


def bandit_options(args):
    """{option: value} of those --bandit-… options that are arguments of some bandit's constructor."""
    options = {name.removeprefix("bandit_"): x for name, x in vars(args).items() if name.startswith("bandit_")}
    return {name: x for name, x in options.items() if bandits_with(name)}


def merge_with_resumed(args_class, args, presets=None):
    """The arguments of the run in the folder `args.resume`, with what `args` may change of them; else `reject`."""
    if not args.resume:
        reject("--resume: must name a run folder")
    try:
        config, summary = (read_json(Path(args.resume, f"{name}.json")) for name in ("config", "summary"))
        command_line, exp_name, status = config["command_line"], config["exp_name"], summary["status"]
    except (OSError, ValueError, KeyError):
        reject(f"--resume {args.resume}: must be a run folder, but holds no config.json and summary.json of a run")
    check_stored_words(args_class, args, command_line, exp_name)
    resumed = parse_words(args_class, command_line, presets)
    if ":" in resumed.env_id and args.env_id != resumed.env_id:
        own = f"--env-id {resumed.env_id}"
        reject(f"--resume {args.resume}: its task is code that Python would import; if you trust it, add {own}")
    merged = parse_words(args_class, command_line + args.command_line, presets)
    for name, value in vars(merged).items():
        before = getattr(resumed, name)
        if value == before or name in MAY_CHANGE:
            continue
        if name != "total_timesteps":
            may_change = ", ".join(map(option_name, ("total_timesteps", *MAY_CHANGE[2:])))
            reason = f"and must keep it; what may change is {may_change}"
        elif merged.lr_control in ("linear", "cosine") or (
            getattr(merged, "exploration_fraction", None) and "exploration_steps" not in given_options(command_line)
        ):
            reason = "which is where a schedule ends"
        elif value < before:
            reason = "and can only get more"
        else:
            continue
        reject(f"{option_name(name)} {value}: the run that is resumed has {before}, {reason}")
    if status == "finished" and merged.total_timesteps == resumed.total_timesteps:
        reject(f"--resume {args.resume}: has finished; if it has a checkpoint, more --total-timesteps let it go on")
    merged.run_dir = str(Path(args.resume).parent)
    if "run_dir" in given_options(args.command_line) and not Path(args.run_dir, Path(args.resume).name).exists():
        reject(f"--run-dir {args.run_dir}: a run that is resumed stays where it is, in {merged.run_dir}")
    merged.command_line = command_line + args.command_line
    return merged
