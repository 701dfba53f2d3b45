"""What command_line.py promises: one line for bad input, help for who asks, intervals as mathematics has them."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

import command_line


@dataclass
class Args:
    exp_name: str = "name"
    """a name"""
    seed: int = 1
    """a seed"""
    rates: tuple[float, ...] = (1.0,)
    """some rates"""
    choice: Literal["one", "two"] = "one"
    """a choice"""
    run_dir: str = "runs"
    """parent of run folders"""


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--seed x", ["--seed", "'x'", "INT"]),
        ("--seed", ["--seed"]),
        ("--sed 3", ["--sed", "--seed"]),
        ("--rates 1 a", ["--rates", "'a'", "FLOAT"]),
        ("--choice three", ["--choice", "'three'", "'one'", "'two'"]),
        ("stray", ["stray"]),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_wrong_command_line_gives_one_line_that_names_the_option(argv, named, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        command_line.parse_args(Args, argv.split())
    output, error = capsys.readouterr()
    assert end.value.code == 2 and output == "" and error.count("\n") == 1
    assert all(name in error for name in named), error
    assert not set(error) & set("╭│╰─\x1b")


def test_help_is_printed_and_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        command_line.parse_args(Args, ["--help"])
    assert not end.value.code
    assert "some rates" in capsys.readouterr().out


def test_given_options_are_those_on_the_command_line_however_they_are_spelt():
    given = command_line.given_options(["--seed", "3", "--env_id=A", "--no-cuda", "--learning-rates", "1e-3", "-1"])
    assert given == {"seed", "env_id", "cuda", "learning_rates"}
    assert command_line.given_options([]) == set()


@pytest.mark.parametrize(
    ("interval", "value", "accepted"),
    [
        ("[1, inf)", 1, True),
        ("[1, inf)", 0, False),
        ("(0, 1]", 0.0, False),
        ("(0, 1]", 1.0, True),
        ("(0, 1]", 1.1, False),
        ("(0, inf)", math.inf, False),
        ("[0, inf)", math.nan, False),
        ("[0, 1]", 0.0, True),
    ],
)
def test_check_reads_intervals_as_mathematics_does(interval, value, accepted, capsys):
    if accepted:
        return command_line.check(Args(seed=value), interval, "seed")
    with pytest.raises(SystemExit) as end:
        command_line.check(Args(seed=value), interval, "seed")
    assert end.value.code == 2
    assert f"--seed {value}: must be in {interval}" in capsys.readouterr().err
