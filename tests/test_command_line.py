"""What lrrl_utils/command_line.py promises: every option is checked on its own and for a meaning beside the others."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import dqn_atari_lrrl as dqn
import dqn_minatar_lrrl as minatar
import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from bandits import BANDITS, Bandit
from lrrl_utils.command_line import bandit_options, check, check_meaning, decide_compile, parse_args
from lrrl_utils.parser import given_options
from lrrl_utils.ranges import Rate, Share, Window
from tests.conftest import resume


@dataclass
class Args:
    exp_name: str = "name"  # a name
    window: Window = 5  # a window
    share: Share | None = None  # a share
    choice: Literal["one", "two"] = "one"  # a choice
    five: tuple[Rate, ...] = (1.0,)  # some rates
    learns: bool = True  # whether it learns
    run_dir: str = "runs"  # parent of run folders


def test_arguments_come_with_the_words_that_they_were_made_of(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program.py", "--window", "7"])
    args = parse_args(Args)
    assert (args.window, args.command_line) == (7, ["--window", "7"]) and parse_args(Args, []).command_line == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--window 1", "--window 1: must be in [2, inf)"),
        ("--share 1.5", "--share 1.5: must be in [0, 1]"),
        ("--share nan", "--share nan: must be in [0, 1]"),
        ("--five 1e-3 1e-3 0", "--five 0.0: must be in [1e-37, 1e+37]"),
    ],
)
def test_a_type_names_the_interval_that_values_must_be_in(line, said, refused):
    assert refused(lambda argv: parse_args(Args, argv), line.split()).endswith(f"error: {said}\n")


def test_what_is_in_its_interval_passes():
    assert parse_args(Args, ["--share", "1"]).share == 1.0 and parse_args(Args, []).share is None


@pytest.mark.parametrize(("interval", "accepted"), [("[5, inf)", True), ("(5, inf)", False), ("[0, 4.5]", False)])
def test_a_program_can_check_more(interval, accepted, refused):
    if accepted:
        return check(Args(), interval, "share", "exp_name", "window")  # what is no number is in every interval
    assert f"--window 5: must be in {interval}" in refused(lambda argv: check(Args(), interval, "share", "window"), [])


@pytest.mark.parametrize(
    ("args", "choice", "meanings", "said"),
    [
        (Args(), "choice", {"run_dir": ("two",)}, "--run-dir: has no meaning with --choice one; it needs --choice two"),
        (Args(choice="two"), "choice", {"run_dir": ("two",)}, None),
        (Args(), "choice", {"share": ("two",)}, None),
        (Args(), "learns", {"run_dir": (False,)}, "--run-dir: has no meaning with --learns; it needs --no-learns"),
        (Args(learns=False), "learns", {"run_dir": (True,)}, "with --no-learns; it needs --learns"),
    ],
)
def test_an_option_without_a_meaning_is_refused_if_it_was_given(args, choice, meanings, said, refused):
    def main(argv):
        check_meaning(args, {"run_dir", "window"}, choice, meanings)

    if said:
        assert said in refused(main, [])
    else:
        main([])


# --- the bandits' options ---------------------------------------------------------------------------------------------


def parse(line, script=ppo):
    return parse_args(script.Args, line.split())


@pytest.mark.parametrize(
    ("line", "feedback"),
    [
        ("", "return"),
        ("--bandit exp3", "return"),
        ("--bandit lrrl", "reward"),
        ("--bandit uniform", "reward"),
        ("--lr-control constant", "reward"),
        ("--bandit lrrl --bandit-feedback return", "return"),
        ("--bandit-feedback reward", "reward"),
    ],
)
def test_a_rounds_performance_is_what_suits_its_bandit(line, feedback):
    found = [parse(line, script).bandit_feedback for script in (ppo, sac, minatar)]
    assert found == [feedback] * 3 and parse(line, dqn).bandit_feedback == ("return" if "return" in line else "reward")


def test_arms_are_the_rates_that_are_meant():
    assert parse("--learning-rates 1e-3 1e-4").learning_rates == (1e-3, 1e-4)
    assert parse("--learning-rates sparse3").learning_rates == (3e-5, 3e-4, 3e-3)
    assert len(parse("--lr-range 1e-4 1e-3").learning_rates) == 25


def test_the_options_of_bandits_are_those_that_some_bandit_takes():
    options = {"step_size": 0.2, "decay": None, "window": 5}
    assert bandit_options(parse("")) == bandit_options(parse("--bandit-interval 64", sac)) == options


@pytest.mark.parametrize(
    ("bandit", "option", "has_it"),
    [
        ("lrrl", "step-size", True),
        *(((bandit), "step-size", False) for bandit in ("peak", "uniform", "exp3", "moss", "ducb", "wucb")),
        *(((bandit), "decay", True) for bandit in ("lrrl", "exp3", "ducb")),
        *(((bandit), "decay", False) for bandit in ("peak", "uniform", "moss", "wucb")),
        *(((bandit), "window", True) for bandit in ("peak", "lrrl", "uniform", "exp3", "moss", "ducb", "wucb")),
    ],
)
def test_an_option_of_other_bandits_is_refused(bandit, option, has_it, refused):
    value = "3" if option == "window" else "0.5"
    line = f"--bandit {bandit} --bandit-{option} {value}"
    if has_it:
        assert bandit_options(parse(line))[option.replace("-", "_")] == float(value)
    else:
        error = refused(lambda argv: parse(line), [])
        assert f"--bandit-{option}: has no meaning with --bandit {bandit}; it needs --bandit lrrl" in error


@dataclass
class ArgsOfMine(ppo.Args):
    bandit_memory: float | None = None


def test_a_bandit_of_ones_own_brings_its_options(monkeypatch):
    class Mine(Bandit):
        def __init__(self, arms, memory=0.9, window=5, seed=0):
            super().__init__(arms, window, seed)

    assert "memory" in bandit_options(ArgsOfMine())  # wucb has one
    monkeypatch.setitem(BANDITS, "peak", Mine)
    assert bandit_options(ArgsOfMine(bandit_memory=0.5))["memory"] == 0.5


# --- --compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "gpu", "compiles"),
    [
        ("--total-timesteps 199000", False, False),
        ("--total-timesteps 200704", False, True),
        ("--total-timesteps 200704", True, False),
        ("--total-timesteps 200704 --no-cuda", True, True),
        ("--total-timesteps 200704 --no-compile", False, False),
        ("--total-timesteps 4096 --compile", True, True),
    ],
)
def test_a_run_is_compiled_where_that_pays_unless_the_command_line_decides(line, gpu, compiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = parse_args(ppo.Args, line.split())
    decide_compile(args, 200_000)
    assert args.compile == compiles
    assert given_options(args.command_line) >= {"total_timesteps", "compile"}
    again = parse_args(ppo.Args, args.command_line)
    decide_compile(again, 1)
    assert again.compile == compiles  # whatever the length and the machine are then


def test_a_run_that_goes_on_for_longer_is_compiled_or_not_as_before(stopped, monkeypatch):
    decided = []

    def decide(args, timesteps):
        decide_compile(args, 1024)
        decided.append(args.compile)

    monkeypatch.setattr(ppo, "decide_compile", decide)
    resume(ppo.main, stopped, "--total-timesteps 1088")
    assert decided == [False]
