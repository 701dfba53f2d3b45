"""What lrrl_utils/parser.py promises: options below headings, comments as help, one line for words that are wrong."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import dqn_atari_lrrl
import iqn_atari_lrrl
import nonconvex_lrrl
import ppo_continuous_lrrl
import sac_mujoco_lrrl
from lrrl_utils.parser import given_options, parse_words, read_comments
from lrrl_utils.ranges import Count, Rate
from tests.processes import ROOT, run_forked

PROGRAMS = [ppo_continuous_lrrl, sac_mujoco_lrrl, dqn_atari_lrrl, iqn_atari_lrrl, nonconvex_lrrl]
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


@dataclass
class Args:
    # RUN
    exp_name: str = "name"  # a name
    seed: Count = 1  # a seed
    # a comment above,
    # of two lines,
    size: float = 1.0
    entity: str | None = None
    names: tuple[str, ...] = ()  # some names

    # LEARNING RATE
    learning_rate: Rate = 1.0  # a rate
    rates: tuple[Rate, ...] = (1.0,)  # some rates
    interval: Count | Literal["auto"] = "auto"  # an interval, or # auto
    choice: Literal["one", "two"] = "one"  # a choice
    lr_range: tuple[Rate, Rate] | None = None  # two ends
    run_dir: str = "runs"  # parent of run folders


@dataclass
class Preset:
    preset: Literal["big", "small"] = "big"  # whose defaults
    size: int = 10  # a size
    depth: int = 20  # a depth


@dataclass
class CleanRL:
    lr: float = 1.0  # a rate


def test_headings_and_help_are_the_comments_behind_an_option_or_above_it():
    comments = read_comments(Args)
    assert list(comments) == list(Args.__dataclass_fields__)
    assert comments["exp_name"] == ("run", "a name") and comments["rates"] == ("learning rate", "some rates")
    assert comments["size"] == ("run", "a comment above, of two lines,") and comments["entity"] == ("run", "")
    assert comments["interval"] == ("learning rate", "an interval, or # auto")


@every_program
def test_every_option_of_a_program_has_a_help(program):
    comments = read_comments(program.Args)
    assert comments.keys() == program.Args.__dataclass_fields__.keys()
    assert all(text for _, text in comments.values())
    headings = [heading for heading, _ in itertools.groupby(heading for heading, _ in comments.values())]
    assert headings == ([None] if program is nonconvex_lrrl else ["run", "algorithm", "learning rate"])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("--seed 3 --exp-name a,b --entity me", {"seed": 3, "exp_name": "a,b", "entity": "me"}),
        ("--seed=3 --run_dir=x", {"seed": 3, "run_dir": "x"}),
        ("--rates 1e-3 2 --size 1e3", {"rates": (1e-3, 2.0), "size": 1e3}),
        ("--lr-range 1e-4 1e-3", {"lr_range": (1e-4, 1e-3)}),
        ("--interval auto --choice two", {"choice": "two"}),
        ("--seed 1e6", {"seed": 1_000_000}),
        ("--seed 1E+6", {"seed": 1_000_000}),
        ("--seed 1.5e3", {"seed": 1500}),
        ("--seed=1e6", {"seed": 1_000_000}),
        ("--seed 1_000", {"seed": 1000}),
        ("--interval 2e3", {"interval": 2000}),
        ("--exp-name 1e6", {"exp_name": "1e6"}),
        ("--entity me,you", {"entity": "me,you"}),
        ("--seed 1 --seed 2", {"seed": 2}),
    ],
)
def test_words_become_values_of_their_types(line, values):
    args = parse_words(Args, line.split())
    assert args == Args(**values)
    assert all(type(getattr(args, name)) is type(value) for name, value in values.items())


def test_a_name_may_have_commas():
    assert parse_words(Args, ["--names", "a, b", "c"]).names == ("a, b", "c")


def test_presets_are_other_defaults_that_given_options_win_over():
    presets = {"small": {"size": 1, "depth": 2}}
    assert parse_words(Preset, [], presets) == Preset("big", 10, 20)
    assert parse_words(Preset, ["--preset", "small", "--depth", "5"], presets) == Preset("small", 1, 5)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--seed x", ["--seed", "'x'", "INT"]),
        ("--seed 1.5", ["--seed", "'1.5'", "INT"]),
        ("--seed 1.5e0", ["--seed", "'1.5e0'", "INT"]),
        ("--seed 1e-3", ["--seed", "'1e-3'", "INT"]),
        ("--seed", ["--seed"]),
        ("--sed 3", ["--sed", "--seed"]),
        ("--rates 1 a", ["--rates", "'a'", "FLOAT"]),
        ("--rates 1,2", ["--rates 1,2", "separated by spaces", "1 2"]),
        ("--rates=1,2", ["--rates 1,2", "separated by spaces", "like 1 2"]),
        ("--choice three", ["--choice", "'three'", "'one'", "'two'"]),
        ("--interval often", ["--interval", "'often'", "auto"]),
        ("--lr 1e-3", ["--lr:", "--learning-rate"]),
        ("--policy-lr 1e-3", ["nrecognized", "--policy-lr"]),  # what takes its place is SAC's
        ("stray", ["stray"]),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_wrong_command_line_gives_one_line_that_names_the_option(line, named, columns, refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    error = refused(lambda argv: parse_words(Args, argv), line.split())
    assert all(name in error for name in named), error
    assert not set(error) & set("╭│╰─\x1b")


def test_a_name_of_cleanrls_that_a_script_has_too_is_its_own():
    assert parse_words(CleanRL, ["--lr", "0.5"]) == CleanRL(0.5)


def test_given_options_are_those_on_the_command_line_however_they_are_spelt():
    words = ["--seed", "3", "--env_id=A", "--no-cuda", "--learning-rates", "1e-3", "-1", "--noop-max", "3"]
    assert given_options(words) == {"seed", "env_id", "cuda", "learning_rates", "noop_max"}
    assert given_options([]) == set()


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_is_printed_and_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        parse_words(Args, ["--help"])
    assert not end.value.code
    output = capsys.readouterr().out
    assert output.startswith("usage: ") and "What lrrl_utils/parser.py promises" in output
    for text in ("some rates", "a comment above, of two lines,", "run options", "learning rate options"):
        assert text in output.replace("-", " "), output
    assert "[1, inf)" not in output


def test_a_default_that_the_comment_tells_is_told_once(capsys):
    with pytest.raises(SystemExit):
        parse_words(ppo_continuous_lrrl.Args, ["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "200,000 timesteps or more) --track" in output and "(default: 0.99)" in output


@every_program
def test_a_terminal_that_knows_ascii_alone_shows_all_help_in_groups(program):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    process = run_forked([sys.executable, program.__file__, "--help"], env=environment)
    assert process.returncode == 0 and process.stderr == ""
    shown = re.findall(r"^ +(--[a-z][\w-]*|[a-z-]+ options)", process.stdout, re.MULTILINE)
    expected = []
    for heading, options in itertools.groupby(read_comments(program.Args).items(), lambda option: option[1][0]):
        expected += [f"{heading.replace(' ', '-')} options"] if heading else []
        expected += [f"--{name.replace('_', '-')}" for name, _ in options]
    assert shown == expected


def test_help_through_head_shows_no_traceback():
    command = f"{sys.executable} ppo_continuous_lrrl.py --help | head -1"
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert process.stdout.startswith("usage: ppo_continuous_lrrl.py") and process.stdout.count("\n") == 1
    assert process.stderr == ""


def test_a_script_can_be_profiled(tmp_path):
    """`python -m cProfile SCRIPT` hides the script's source, where headings and help come from."""
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n\nfrom lrrl_utils.parser import parse_words\n\n\n@dataclass\nclass Args:\n"
        "    seed: int = 1  # a seed\n\n\nparse_words(Args, ['--seed'])\n"
    )
    command = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile"), str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "argument '--seed'" in result.stderr and "Traceback" not in result.stderr
