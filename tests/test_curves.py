"""What lrrl_utils/curves.py promises: a figure of any run, whole or torn, whatever its names and numbers."""

import json
import os

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lrrl_utils.curves import plot_curves

EPISODES = [(100 * n, float(n), 100) for n in range(1, 41)]
CONFIG = {"env_id": "Pendulum-v1", "exp_name": "ppo", "seed": 1, "learning_rates": [1e-4, 1e-3]}


def write(folder, episodes=EPISODES, rounds=(), columns="p_0,p_1", controller="", **config):
    """The files of a run folder that the figure is drawn from."""
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    names = "global_step,episodic_return,episodic_length", f"round,global_step,{controller}arm,learning_rate"
    names = names[0], f"{names[1]},performance,feedback" + (f",{columns}" if columns else "")
    for name, header, rows in (("episodes", names[0], episodes), ("rounds", names[1], rounds)):
        lines = [header, *(",".join("" if x is None else str(x) for x in row) for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


ROUNDS = [(n, 1000 * n, n % 2, [1e-4, 1e-3][n % 2], 1.0, 0.1, 0.4, 0.6) for n in range(1, 5)]


@pytest.fixture
def figure(monkeypatch):
    """figure(folder) draws and returns the figure, which stays open until the test ends."""
    monkeypatch.setattr(plt, "close", lambda figure=None: None)

    def draw(folder):
        plot_curves(folder)
        assert matplotlib.image.imread(folder / "curves.png").std() > 0.05
        return plt.gcf()

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_it_shows_returns_rates_and_probabilities(tmp_path, figure):
    write(tmp_path, rounds=ROUNDS)
    returns, rates, probabilities = figure(tmp_path).axes
    assert returns.lines[0].get_ydata().tolist() == [float(n) for n in range(1, 41)]
    assert returns.lines[1].get_ydata().tolist() == pytest.approx([n + 0.5 for n in range(5, 36)])  # means of ten
    assert [line.get_ydata().tolist() for line in probabilities.lines[:2]] == [[0.6] * 5, [0.4] * 5]
    assert [line.get_label() for line in probabilities.lines[:2]] == ["0.001", "0.0001"]
    assert rates.get_ylim() == pytest.approx((5e-5, 2e-3))


def test_two_bandits_have_a_panel_each_even_if_no_round_has_closed(tmp_path, figure):
    write(tmp_path, controller="controller,", arms={"critic": [1e-4, 1e-3], "actor": [1e-5, 1e-4]})
    assert [axis.get_ylabel() for axis in figure(tmp_path).axes[2:]] == ["probability critic", "probability actor"]


def test_a_rate_holds_over_the_whole_of_its_round_whose_row_stands_at_its_end(tmp_path, figure):
    write(tmp_path, rounds=ROUNDS)
    (line,) = figure(tmp_path).axes[1].lines
    steps, rates = line.get_xdata(), line.get_ydata()
    shown = {t: rates[np.searchsorted(steps, t)] for t in (500, 1500, 2500, 3500)}
    assert line.get_drawstyle() == "steps-pre" and shown == {500: 1e-3, 1500: 1e-4, 2500: 1e-3, 3500: 1e-4}


@pytest.mark.parametrize("arms", [2, 25])
def test_so_do_probabilities_and_the_first_round_begins_with_learning(arms, tmp_path, figure):
    rates, shares = np.geomspace(1e-5, 1e-1, arms).tolist(), np.random.default_rng(0).dirichlet([1] * arms, 3)
    rounds = [(n + 1, 1000 * (n + 1), 0, rates[0], 1.0, 0.1, *shares[n]) for n in range(3)]
    names = ",".join(f"p_{n}" for n in range(arms))
    write(tmp_path, rounds=rounds, columns=names, learning_rates=rates, learning_starts=300)
    axes, edges = figure(tmp_path).axes, [300, 1000, 2000, 3000]
    assert axes[1].lines[0].get_xdata().tolist() == edges
    if arms == 2:
        for line, of_arm in zip(axes[2].lines, shares.T[::-1]):
            assert (line.get_drawstyle(), line.get_xdata().tolist()) == ("steps-pre", edges)
            assert line.get_ydata()[1:].tolist() == of_arm.tolist()
    else:
        (image,) = axes[2].collections
        corners = image.get_coordinates()
        assert (
            corners[0, :, 0].tolist() == edges and image.get_array().ravel().tolist() == shares.T[::-1].ravel().tolist()
        )
        limits = np.array(corners[:, 0, 1])  # an arm's band reaches halfway to its neighbours
        assert np.sqrt(limits[:-1] * limits[1:]) == pytest.approx(rates[::-1])


def test_two_bandits_get_a_panel_each(tmp_path, figure):
    rounds = [(n, 1000 * n, name, 0, 1e-4, 1.0, 0.1, 0.4, 0.6) for n in (1, 2) for name in ("critic", "actor")]
    write(tmp_path, rounds=rounds, controller="controller,")
    axes = figure(tmp_path).axes
    assert [axis.get_ylabel() for axis in axes[2:]] == ["probability critic", "probability actor"]
    assert [line.get_label() for line in axes[1].lines] == ["critic", "actor"]
    assert all(line.get_xdata()[-1] == 2000 for line in axes[1].lines)


def test_many_arms_are_an_image(tmp_path, figure):
    rates = np.geomspace(1e-5, 1e-1, 25).tolist()
    rounds = [(n, 1000 * n, 0, rates[0], 1.0, 0.1, *[0.04] * 25) for n in range(1, 5)]
    write(tmp_path, rounds=rounds, columns=",".join(f"p_{n}" for n in range(25)), learning_rates=rates)
    axis = figure(tmp_path).axes[2]
    assert not axis.lines and len(axis.collections) == 1 and axis.get_yscale() == "log"


@pytest.mark.parametrize("arms", [2, 25])
@pytest.mark.parametrize("episodes", [[], EPISODES[:1], EPISODES[:9]])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_figure_too(rounds, episodes, arms, tmp_path, figure):
    rates = np.geomspace(1e-5, 1e-1, arms).tolist()
    row = (1, 1000, 0, rates[0], None, None, *[1 / arms] * arms)
    names = ",".join(f"p_{n}" for n in range(arms))
    write(tmp_path, episodes=episodes, rounds=[row] * rounds, columns=names, learning_rates=rates)
    figure(tmp_path)


def test_without_a_bandit_there_are_no_probabilities(tmp_path, figure):
    rounds = [(n, 1000 * n, None, 1e-3, 1.0, None) for n in range(1, 4)]
    write(tmp_path, rounds=rounds, columns="", learning_rates=[])
    assert len(figure(tmp_path).axes) == 2


def test_a_name_is_no_formula(tmp_path, figure):
    write(tmp_path, exp_name=r"$\undefined_{$")
    assert r"$\undefined_{$" in figure(tmp_path).get_suptitle()


def test_it_is_written_whole_and_no_figure_stays_in_memory(tmp_path, monkeypatch):
    write(tmp_path, rounds=ROUNDS)
    plt.close("all")
    plot_curves(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()

    def fail(figure, file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError):
        plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before and not plt.get_fignums()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "curves.png", "episodes.csv", "rounds.csv"]


@pytest.mark.parametrize("name", ["config.json", "episodes.csv", "rounds.csv"])
def test_no_link_is_followed(name, tmp_path):
    write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        plot_curves(tmp_path)
