"""What nonconvex_lrrl.py promises: right functions, finite values at any rate, bandits of their own, whole reports."""

import csv
import math
import signal
import time

import matplotlib.image
import numpy as np
import psutil
import pytest
import torch

import nonconvex_lrrl as nonconvex
from lrrl_utils.rivals import make_bandit
from tests.conftest import wait_for

SMALL = ["--num-seeds", "2", "--num-starts", "2", "--num-steps", "20", "--bandit-interval", "5"]


@pytest.mark.parametrize("name", nonconvex.OBJECTIVES)
def test_value_and_gradient_at_the_known_minima_and_nowhere_a_lower_value(name):
    objective = nonconvex.OBJECTIVES[name]
    minima = torch.tensor(objective.minima, dtype=torch.float64, requires_grad=True)
    values = objective.function(minima)
    values.sum().backward()
    assert values.tolist() == pytest.approx([objective.minimum] * len(values), abs=1e-9)
    assert minima.grad.abs().max() < 1e-5
    grid = torch.rand(100_000, 2, dtype=torch.float64) * (objective.high - objective.low) + objective.low
    assert objective.function(grid).min() >= objective.minimum - 1e-9


@pytest.mark.parametrize(
    ("name", "point", "value"),
    [  # worked out by hand
        ("rosenbrock", (0, 2), 1 + 400),
        ("ackley", (1, 0), 20 + math.e - 20 * math.exp(-0.2 / math.sqrt(2)) - math.e),
        ("rastrigin", (1, 0.5), 1 + 0.25 + 20),
        ("himmelblau", (1, 2), 64 + 4),
        ("beale", (1, 2), 2.5**2 + 5.25**2 + 9.625**2),
        ("styblinski_tang", (1, -2), (1 - 16 + 5 + 16 - 64 - 10) / 2),
    ],
)
def test_functions_have_their_published_values(name, point, value):
    points = torch.tensor([point, point], dtype=torch.float64)
    assert nonconvex.OBJECTIVES[name].function(points).tolist() == pytest.approx([value, value])


def parse(*options):
    return nonconvex.parse_args(nonconvex.Args, [*SMALL, *options])


def test_sgd_and_adam_step_as_torch_does_with_each_lifes_own_rate():
    starts, args = np.array([[1.0, 2.0], [-1.0, 0.5]]), parse("--num-steps", "5")
    objective = nonconvex.OBJECTIVES["himmelblau"]
    for cls in (torch.optim.SGD, torch.optim.Adam):
        values, path, diverged, _ = nonconvex.descend(args, objective, cls, starts, np.full(5, 1e-3))
        points = torch.tensor(starts, requires_grad=True)
        optimizer = cls([points], lr=1e-3)
        for t in range(6):
            assert path[t] == pytest.approx(points.detach().numpy(), rel=1e-9)
            value = objective.function(points)
            assert values[t] == pytest.approx(value.detach().numpy(), rel=1e-9)
            optimizer.zero_grad()
            value.sum().backward()
            optimizer.step()
        assert not diverged.any()


def test_each_life_has_a_bandit_that_is_rewarded_by_its_own_objective(monkeypatch):
    args = parse("--num-steps", "20")
    starts = np.array([[1.0, 2.0], [-1.0, 0.5], [4.0, 4.0]])
    bandits = [make_bandit("uniform", (1e-4, 1e-3), seed=(1, i)) for i in range(3)]
    log = []
    for i, bandit in enumerate(bandits):

        def update(performance, i=i, bandit=bandit):
            log.append((i, bandit.learning_rate, performance))
            return type(bandit).update(bandit, performance)

        bandit.update = update
    objective = nonconvex.OBJECTIVES["himmelblau"]
    values, path, _, probabilities = nonconvex.descend(args, objective, torch.optim.SGD, starts, bandits=bandits)
    assert probabilities.shape == (4, 2) and len(log) == 3 * 3  # no data follow the last draw's round
    for n, (i, rate, performance) in enumerate(log):
        first = 5 * (n // 3)
        assert performance == -values[first + 5, i]
        for t in range(first, first + 5):  # this life's steps used this bandit's rate
            point = torch.tensor(path[t, i : i + 1], requires_grad=True)
            objective.function(point).sum().backward()
            assert path[t + 1, i] - path[t, i] == pytest.approx(-rate * point.grad[0].numpy(), rel=1e-6)
    assert len({rate for _, rate, _ in log}) == 2


@pytest.mark.parametrize("name", nonconvex.OBJECTIVES)
def test_values_stay_finite_at_any_rate_and_what_diverges_is_called_so(name):
    objective, args = nonconvex.OBJECTIVES[name], parse("--num-steps", "60")
    starts = np.random.default_rng(0).uniform(objective.low, objective.high, (50, 2))
    for rate, diverges in ((1e3, True), (1e-5, False)):
        values, path, diverged, _ = nonconvex.descend(args, objective, torch.optim.SGD, starts, np.full(60, rate))
        assert np.isfinite(values).all() and path.min() >= objective.low and path.max() <= objective.high
        assert diverged.mean() > 0.9 if diverges else not diverged.any()
    bandits = [make_bandit("lrrl", (1e-4, 1e30), seed=i) for i in range(50)]
    values, *_ = nonconvex.descend(args, objective, torch.optim.Adam, starts, bandits=bandits)
    assert np.isfinite(values).all()


def test_schedules_have_the_rates_of_their_formulas():
    args = parse(
        "--num-steps", "100", "--learning-rate", "0.1", "--lr-decay-rate", "0.02", "--cyclic-half-period", "20"
    )
    rates = nonconvex.make_schedules(args)
    t = np.arange(100)
    assert rates["linear"] == pytest.approx(0.1 * (1 - t / 100))
    assert rates["exponential"] == pytest.approx(0.1 * np.exp(-0.02 * t))
    assert rates["cosine"] == pytest.approx(0.1 * (1 + np.cos(np.pi * t / 100)) / 2)
    assert rates["cyclic"] == pytest.approx(1e-4 + (1 - 1e-4) * (1 - np.abs(1 - t / 20 % 2)))
    assert (rates["constant 0.01"] == 0.01).all()


def test_one_call_leaves_every_variant_in_table_csv_and_figures_and_repeats(tmp_path, capsys, monkeypatch):
    two = {name: nonconvex.OBJECTIVES[name] for name in ("ackley", "beale")}
    monkeypatch.setattr(nonconvex, "OBJECTIVES", two)  # a figure of each takes seconds
    nonconvex.main([*SMALL, "--run-dir", str(tmp_path / "a")])
    report = (tmp_path / "a" / "nonconvex" / "report.md").read_text()
    assert report in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(nonconvex, "OBJECTIVES", {"beale": nonconvex.OBJECTIVES["beale"]})
        nonconvex.main([*SMALL, "--run-dir", str(tmp_path / "b")])
    again = (tmp_path / "b" / "nonconvex" / "report.md").read_text().split("## beale\n")[1]
    assert again.strip() == report.split("## beale\n")[1].split("\n## ")[0].strip()
    variants = [f"constant {rate:g}" for rate in nonconvex.Args.learning_rates]
    variants += ["linear", "exponential", "cosine", "cyclic", "peak", "prior", "lrrl", "uniform"]
    for objective in nonconvex.OBJECTIVES:
        section = report.split(f"## {objective}\n")[1].split("\n## ")[0]
        for optimizer in ("sgd", "adam"):
            assert all(f"| {optimizer} | {variant} | " in section for variant in variants)
        assert matplotlib.image.imread(tmp_path / "a" / "nonconvex" / f"{objective}.png").std() > 0.05
    with open(tmp_path / "a" / "nonconvex" / "values.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(variants) * 2 * 2
    assert {(row["seed"], row["start"]) for row in rows} == {(seed, start) for seed in "12" for start in "01"}
    some = [r for r in rows if (r["function"], r["optimizer"], r["variant"]) == ("ackley", "adam", "linear")]
    median = np.median([float(row["final_value"]) for row in some])
    assert f"| adam | linear | {median:.3g} [" in report.split("## ackley")[1]


def test_an_interrupt_ends_it_at_once_and_two_at_a_time_are_refused(tmp_path, start, refused):
    process = start("nonconvex_lrrl.py --num-starts 1000 --num-steps 100000", fresh=True)  # which takes hours
    folder = tmp_path / "runs" / "nonconvex"
    wait_for(lambda: folder.exists() and psutil.Process(process.pid).children(recursive=True), process)
    assert "a process is still working there" in refused(nonconvex.main, ["--run-dir", tmp_path / "runs"])
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and "Traceback" not in process.stderr.read()


def test_arms_have_names_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nonconvex, "OBJECTIVES", {"ackley": nonconvex.OBJECTIVES["ackley"]})
    nonconvex.main([*SMALL, "--learning-rates", "sparse3", "--run-dir", str(tmp_path / "a")])
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.split("## ")[0].splitlines() if "|" in line]
    assert [row for row in rows if "constant" in row] == ["constant 0.0001", "constant 0.01", "constant 1"]
