"""From words on the command line to a dataclass, by tyro: headings and help from comments, errors in one line."""

import contextlib
import dataclasses
import inspect
import io
import re
import sys
from typing import Annotated, get_args, get_origin, get_type_hints

import tyro

from lrrl_utils.ranges import without_intervals
from lrrl_utils.terminal import option_name, reject, say

ELSEWHERE = {  # options of CleanRL's scripts: what takes their place here
    "lr": "--lr-control constant --learning-rate",
    "q_lr": "--lr-control constant --learning-rate",
    "policy_lr": "--policy-lr-ratio (policy-lr / q-lr)",  # SAC's only
    "anneal_lr": "--lr-control linear",
    "no_anneal_lr": "--lr-control constant",
}


def read_comments(args_class):
    """{option: (heading, help)} from the source of `args_class`: comments behind an option or above it."""
    comments, heading, above = {}, None, []
    try:
        source = inspect.getsource(args_class)
    except OSError:
        source = ""
    for line in source.splitlines():
        if match := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            comments[match[1]] = heading, " ".join([*above, match[2] or ""]).strip()
            above = []
        elif match := re.match(r"    # (.*)", line):
            heading, above = (match[1].lower(), []) if match[1].isupper() else (heading, [*above, match[1]])
    names = [field.name for field in dataclasses.fields(args_class)]
    if comments.keys() != set(names):  # python -m cProfile SCRIPT hides the source, or shows another one
        return dict.fromkeys(names, (None, ""))
    return comments


def make_parser_class(args_class, defaults):
    """A dataclass for tyro: the options of `args_class` below their headings, its comments as their help."""
    hints, comments = get_type_hints(args_class, include_extras=True), read_comments(args_class)
    groups = {}
    for name, (heading, text) in comments.items():
        told = "" if "(default: " in text else None  # then tyro need not tell
        hint = Annotated[without_intervals(hints[name]), tyro.conf.arg(help=text, help_behavior_hint=told)]
        field = dataclasses.field(default=defaults[name]) if name in defaults else dataclasses.field()
        groups.setdefault(heading, []).append((name, hint, field))
    fields = groups.pop(None, [])
    for heading, options in groups.items():
        group = dataclasses.make_dataclass(heading.replace(" ", "_"), options)
        field = dataclasses.field(default_factory=group)
        fields.append((heading.replace(" ", "_"), tyro.conf.OmitArgPrefixes[group], field))
    return dataclasses.make_dataclass("Args", fields)


def parse_words(args_class, argv, presets=None):
    """`args_class` from a list of words, by tyro."""
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    defaults = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    names = {field.name for field in dataclasses.fields(args_class)}
    hints = get_type_hints(args_class)
    words, option = [], None
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name[2:].replace("-", "_") if name else option
        hint = hints.get(option)
        kinds = (hint, *get_args(hint))
        instead = ELSEWHERE.get(option, "")
        if option not in names and given_options(instead.split()) & names:
            reject(f"{option_name(option)}: is no option here; use {instead}")
        if "," in value and tuple in map(get_origin, kinds) and str not in kinds:
            reject(f"{option_name(option)} {value}: must be separated by spaces, like {value.replace(',', ' ')}")
        is_whole = re.fullmatch(r"\d+(\.\d+)?e\+?\d+", value, re.IGNORECASE) and float(value).is_integer()
        words.append(f"{name}{equals}{int(float(value))}" if is_whole and int in kinds else word)  # 1e6 timesteps
    described_by = (sys.modules[args_class.__module__].__doc__ or "").split("\n")[0]
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            values = tyro.cli(make_parser_class(args_class, defaults), args=words, description=described_by)
            if presets and _flat(values)["preset"] in presets:
                defaults |= presets[_flat(values)["preset"]]
                values = tyro.cli(make_parser_class(args_class, defaults), args=words)
        return args_class(**_flat(values))
    except SystemExit as end:
        if not end.code:  # --help
            say(output.getvalue().rstrip())
            raise
    text = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", errors.getvalue())  # without colours and boxes
    _title, body = text.split("\n", 1)
    message, *details = filter(str.strip, re.split(r"[─-]{4,}\s*\n", body))  # a terminal without UTF-8 gets hyphens
    usage = re.search(r"^\s*(--.*?)\s*$", "".join(details), re.MULTILINE)
    reject(message.strip() + (f"; usage: {usage[1]}" if usage else ""))


def _flat(values):
    """{option: value} of what tyro gives for a class of `make_parser_class`."""
    flat = {}
    for name, value in vars(values).items():
        flat |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return flat


def given_options(argv):
    """Names of the options on the command line, as arguments: {"env_id", …}; --no-cuda counts as "cuda"."""
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return {word.removeprefix("no_") for word in words}
