"""The command line of the programs: tyro over a dataclass, bad input brought down to one line and exit code 2.

    args = parse_args(Args)                           # a wrong value ends here
    check(args, "[1, inf)", "num_envs", "num_steps")  # and here

With `--resume RUN_FOLDER`, the options are those of that run, but for what may change.
"""

import contextlib
import io
import json
import re
import sys
import warnings
from pathlib import Path

import tyro

MAY_CHANGE = {  # options that may be others when a run is resumed: no step depends on them
    *("resume", "run_dir", "track", "wandb_project_name", "wandb_entity", "save_model", "eval_episodes"),
}


def reject(message):
    """End the program for bad input: one line on standard error, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def reject_errors(option):
    """`reject` with the message of whatever error the block raises; warnings stay off the screen."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        reject(f"{option}: {error}")


def check(args, interval, *names):
    """`reject` the first number among the named arguments (or their items) that is not in `interval`, like "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name in names:
        values = getattr(args, name)
        for x in values if isinstance(values, tuple) else (values,):
            if isinstance(x, (int, float)) and not (
                low < x < high or (x == low and interval[0] == "[") or (x == high and interval[-1] == "]")
            ):
                reject(f"--{name.replace('_', '-')} {x}: must be in {interval}")


def check_meaning(args, given, choice, meanings):
    """`reject` the first given option without a meaning; `meanings`: {option: values of `choice` that it goes with}."""
    value = getattr(args, choice)
    for option in sorted(given & meanings.keys()):
        if value not in meanings[option]:
            if isinstance(value, bool):
                given_value, needed = (f"--{'' if x else 'no-'}{choice}" for x in (value, not value))
            else:
                given_value, needed = (f"--{choice} {' or '.join(map(str, x))}" for x in ([value], meanings[option]))
            reject(f"--{option}: has no meaning with {given_value}; it needs {needed}".replace("_", "-"))


def parse_args(args_class, argv=None, presets=None):
    """`tyro.cli(args_class)`, its boxed error messages brought down to one line.

    `presets`, {name: {argument: value}}, have other defaults in store for whoever gives that name as --preset.
    With --resume, options that are not given are those of the run that is resumed. `command_line`, beside the fields of
    `args_class`, is the list of words that all of them came from.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_words(args_class, argv, presets)
    args.command_line = argv
    if getattr(args, "resume", None):
        args = merge_with_resumed(args_class, args, presets)
    return args


def parse_words(args_class, argv, presets=None):
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            args = tyro.cli(args_class, args=argv)
            if presets and args.preset in presets:
                args = tyro.cli(args_class, args=argv, default=args_class(**presets[args.preset]))
        return args
    except SystemExit as end:
        if not end.code:  # --help
            raise
    text = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", captured.getvalue())  # without colours and boxes
    _title, body = text.split("\n", 1)
    message, *details = filter(str.strip, re.split(r"[─-]{4,}\s*\n", body))  # a terminal without UTF-8 gets hyphens
    usage = re.search(r"^\s*(--.*?)\s*$", "".join(details), re.MULTILINE)
    reject(message.strip() + (f"; usage: {usage[1]}" if usage else ""))


def merge_with_resumed(args_class, args, presets=None):
    """The arguments of the run in the folder `args.resume`, with what `args` may change of them; else `reject`."""
    try:
        config, summary = (json.loads(Path(args.resume, f"{name}.json").read_text()) for name in ("config", "summary"))
        command_line, exp_name, status = config["command_line"], config["exp_name"], summary["status"]
    except (OSError, ValueError, KeyError, TypeError):
        reject(f"--resume {args.resume}: must be a run folder, but holds no config.json and summary.json of a run")
    if exp_name != args.exp_name and "exp_name" not in given_options(command_line):
        reject(f"--resume {args.resume}: is a run of {exp_name}")
    resumed = parse_words(args_class, command_line, presets)
    merged = parse_words(args_class, command_line + args.command_line, presets)
    for name, value in vars(merged).items():
        before = getattr(resumed, name)
        if value == before or name in MAY_CHANGE:
            continue
        if name != "total_timesteps":
            reason = "and must keep it"
        elif merged.lr_control in ("linear", "cosine") or (
            getattr(merged, "exploration_fraction", None) and "exploration_steps" not in given_options(command_line)
        ):
            reason = "which is where a schedule ends"
        elif value < before:
            reason = "and can only get more"
        else:
            continue
        reject(f"--{name.replace('_', '-')} {value}: the run that is resumed has {before}, {reason}")
    if status == "finished" and merged.total_timesteps == resumed.total_timesteps:
        reject(f"--resume {args.resume}: has finished; if it has a checkpoint, more --total-timesteps let it go on")
    merged.run_dir = str(Path(args.resume).parent)
    merged.command_line = command_line + args.command_line
    return merged


def given_options(argv=None):
    """Names of the options on the command line, as arguments: {"env_id", …}; --no-cuda counts as "cuda"."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return {word.removeprefix("no_") for word in words}
