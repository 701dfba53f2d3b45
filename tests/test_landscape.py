"""What landscape.py promises: branches that differ in their rate alone, gains with errors, work that is done once."""

import csv
import math
import shutil
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import torch

import landscape
from lrrl_utils import scripts
from lrrl_utils.files import write_json
from lrrl_utils.scripts import has_ended_beyond
from tests.processes import train_forked

COMMAND = "ppo_continuous_lrrl.py --env-id gymnasium:Pendulum-v1 --num-steps 200 --num-minibatches 4 --update-epochs 1"
OPTIONS = ["--moments", "400", "800", "--length", "800", "--learning-rates", "1e-3", "1e-1", "--seeds", "7"]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape")
    with mock.patch("lrrl_utils.scripts.train", train_forked):
        landscape.main([str(folder), "--command", COMMAND, *OPTIONS])
    return folder


def test_a_branch_is_its_run_up_to_the_moment_and_another_one_from_there_on(made):
    (parent,) = made.glob("parents/7/*/")
    whole = rows(parent / "episodes.csv")
    branches = {folder.name: rows(folder / "episodes.csv") for folder in (made / "branches").iterdir()}
    assert branches.keys() == {f"7_{moment}_{rate}_1" for moment in (400, 800) for rate in ("0.001", "0.1")}
    for name, episodes in branches.items():
        moment = int(name.split("_")[1])
        before = [row for row in episodes if int(row["global_step"]) <= moment]
        assert before == [row for row in whole if int(row["global_step"]) <= moment] and len(before) == moment // 200
        assert len(episodes) == (moment + 800) // 200
    for moment in (400, 800):  # the first rollout is the same at any rate, those after an update are not
        a, b = (branches[f"7_{moment}_{rate}_1"][moment // 200 :] for rate in ("0.001", "0.1"))
        assert a[0] == b[0] and a[1] != b[1]


def test_an_agent_with_a_replay_is_branched_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lrrl_utils.scripts.train", train_forked)
    command = "sac_mujoco_lrrl.py --env-id Pendulum-v1 --batch-size 8 --learning-starts 100 --no-compile"
    rates = ["--learning-rates", "1e-3", "1e-1"]
    landscape.main([str(tmp_path), "--command", command, "--moments", "400", "--length", "600", *rates])
    (whole,) = (rows(path) for path in tmp_path.glob("parents/1/*/episodes.csv"))
    a, b = (rows(tmp_path / "branches" / f"1_400_{rate}_1" / "episodes.csv") for rate in ("0.001", "0.1"))
    assert a[:2] == b[:2] == whole and a[2:] != b[2:] and len(a) == len(b) == 5
    assert {int(row["episodes_after"]) for row in rows(tmp_path / "landscape.csv")} == {2}
    assert [*tmp_path.glob("snapshots/*/replay.bin")] and not [*tmp_path.glob("branches/*/replay.bin")]


@pytest.mark.parametrize("script", ["ppo_continuous_lrrl.py", "sac_mujoco_lrrl.py"])
def test_a_branch_has_the_random_numbers_of_its_key(script, tmp_path, monkeypatch):
    monkeypatch.setattr("lrrl_utils.scripts.train", train_forked)
    sizes = (
        "--num-steps 200 --num-minibatches 4" if script.startswith("ppo") else "--batch-size 8 --learning-starts 100"
    )
    run_dir, log = ["--run-dir", str(tmp_path / "run")], tmp_path / "log.txt"
    words = f"--env-id Pendulum-v1 {sizes} --lr-control constant --total-timesteps 400 --checkpoint-interval 400"
    assert scripts.train(script, [*words.split(), *run_dir], log) == 0
    (run,) = (tmp_path / "run").iterdir()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["run"]["logs"]["wandb_id"] = "of the run"
    torch.save(checkpoint, run / "checkpoint.pt")
    states, whole = [], checkpoint["state"]
    for i, key in enumerate([(1, 400, 1), (1, 400, 1), (1, 400, 2)]):
        scripts.start_branch(run, tmp_path / str(i), 1e-3, key)
        branch = torch.load(tmp_path / str(i) / "checkpoint.pt", weights_only=True)
        assert branch["run"]["logs"]["wandb_id"] is None
        states.append(branch["state"])
    for name in {"rng", "torch_rng"} & whole.keys():
        a, same, other, before = (
            str(state[name].tolist() if torch.is_tensor(state[name]) else state[name]) for state in (*states, whole)
        )
        assert a == same and len({a, other, before}) == 3, name


def test_the_table_has_the_gain_of_every_branch(made):
    table = rows(made / "landscape.csv")
    assert len(table) == 4 and {row["status"] for row in table} == {"finished"}
    for row in table:
        folder = made / "branches" / f"7_{row['moment']}_{float(row['learning_rate']):g}_1"
        moment, episodes = int(row["moment"]), rows(folder / "episodes.csv")  # one ends at each 200th timestep
        at = {int(x["global_step"]): float(x["episodic_return"]) for x in episodes}
        before, after = [at[moment - 200], at[moment]], [at[moment + 600], at[moment + 800]]
        assert (row["episodes_before"], row["episodes_after"]) == ("2", "2")
        gain = np.mean(after) - np.mean(before)  # in 800 timesteps
        assert float(row["gain"]) == pytest.approx(gain * 12.5, rel=1e-4)
        error = math.sqrt((before[0] - before[1]) ** 2 / 4 + (after[0] - after[1]) ** 2 / 4)
        assert float(row["standard_error"]) == pytest.approx(error * 12.5, rel=1e-4)
    text = (made / "landscape.md").read_text()
    assert "| branched at | 0.001 | 0.1 |" in text and text.count("**") == 4  # the best of each moment
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[4:]]
    for moment, of_moment in zip(("400", "800"), cells):
        gains = [float(row["gain"]) for row in table if row["moment"] == moment]  # in the order of the rates
        assert [cell.startswith("**") for cell in of_moment] == [gain == max(gains) for gain in gains]
        shown = [float(cell.strip("*").split(" ")[0].replace(",", "")) for cell in of_moment]
        assert shown == pytest.approx(gains, rel=0.01)
    assert matplotlib.image.imread(made / "landscape.png").std() > 0.05


def test_what_is_done_is_not_done_again(made, monkeypatch):
    monkeypatch.setattr("lrrl_utils.scripts.train", None)  # a call would be an error
    before = (made / "landscape.csv").read_bytes()
    (made / "landscape.csv").unlink()
    landscape.main([str(made), "--command", COMMAND, *OPTIONS])
    assert (made / "landscape.csv").read_bytes() == before


def test_a_branch_that_was_cut_short_is_made_again_to_the_byte(made):
    folder = made / "branches" / "7_400_0.1_1"
    whole = (folder / "episodes.csv").read_bytes()
    (folder / "summary.json").unlink()
    (folder / "episodes.csv").write_bytes(whole[:60])
    landscape.main([str(made), "--command", COMMAND, *OPTIONS])
    assert (folder / "episodes.csv").read_bytes() == whole


def test_seeds_rates_and_branch_seeds_may_be_added(made, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    shutil.rmtree(folder / "snapshots" / "7_800")  # as a kill between training and copying leaves it
    monkeypatch.setattr("lrrl_utils.scripts.train", train_forked)
    more = ["--learning-rates", "1e-3", "1e-1", "1e30", "--branch-seeds", "1", "2"]
    landscape.main([str(folder), "--command", COMMAND, *OPTIONS, *more])
    before, table = rows(made / "landscape.csv"), rows(folder / "landscape.csv")
    assert [row for row in table if row in before] == before and len(table) == 2 * 3 * 2
    assert {row["status"] for row in table if float(row["learning_rate"]) > 1} == {"diverged"}
    gains = {key: row["gain"] for row in table if (key := (row["moment"], row["learning_rate"], row["branch_seed"]))}
    assert gains["400", "0.001", "1"] != gains["400", "0.001", "2"]


def test_the_runs_that_are_branched_have_the_base_rate(tmp_path, monkeypatch):
    words = []

    def train(script, these, log):
        words.extend(map(str, these))
        return 1

    monkeypatch.setattr(scripts, "train", train)
    (tmp_path / "new" / "logs").mkdir(parents=True)
    (tmp_path / "new" / "logs" / "7.txt").write_text("broken")
    with pytest.raises(SystemExit):
        landscape.main([str(tmp_path / "new"), "--command", COMMAND, *OPTIONS, "--base-learning-rate", "0.005"])
    assert words[words.index("--learning-rate") + 1] == "0.005"


def test_a_damaged_checkpoint_has_the_step_of_the_one_before(stopped):
    step, before = scripts.step_of(stopped), torch.load(stopped / "checkpoint.prev.pt")["run"]["global_step"]
    assert step > before > 0
    (stopped / "checkpoint.pt").write_bytes(b"torn")
    assert scripts.step_of(stopped) == before
    (stopped / "checkpoint.pt").unlink()
    assert scripts.step_of(stopped) == before
    (stopped / "checkpoint.prev.pt").unlink()
    assert scripts.step_of(stopped) == 0


def test_an_interrupt_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts, "train", lambda *_: 130)  # the run has got it as well
    with pytest.raises(SystemExit) as end:
        landscape.main([str(tmp_path / "new"), "--command", COMMAND, *OPTIONS])
    assert end.value.code == 130 and capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.parametrize(
    ("status", "step", "ended"),
    [("finished", 800, True), ("finished", 400, False), ("diverged", 400, True), ("interrupted", 800, False)],
)
def test_a_branch_has_ended_beyond_its_moment_or_has_diverged(status, step, ended, tmp_path):
    write_json(tmp_path / "summary.json", {"status": status, "global_step": step})
    assert has_ended_beyond(tmp_path, 400) == ended


def test_the_rates_of_a_run_are_drawn_on_top(made, tmp_path, monkeypatch):
    (tmp_path / "rounds.csv").write_text("global_step,learning_rate\n400,0.001\n800,0.01\n1000,0.1\n")
    figures = []
    monkeypatch.setattr(landscape.plt, "close", figures.append)
    landscape.main([str(made), "--command", COMMAND, *OPTIONS, "--show-run", str(tmp_path)])
    (line,) = figures[0].axes[0].lines  # over rounds that end at 400, 800, 1,000: branched at 400 is 0, at 800 is 1
    np.testing.assert_allclose(line.get_xydata(), [[math.nan, 0], [0.5, 0.5], [math.nan, 1]])


def test_a_folder_that_was_begun_with_something_else_is_refused(made, refused):
    for words in (["--length", "600"], ["--moments", "400"], ["--command", f"{COMMAND} --gamma 0.9"]):
        words = [made, "--command", COMMAND, *OPTIONS, *words]
        assert "was begun with" in refused(landscape.main, words)


def test_a_mean_is_one_of_seeds_and_a_rate_that_has_diverged_has_none():
    row = {"seed": 1, "status": "finished", "gain": 1.0, "standard_error": 0.5}
    assert landscape.mean_gain([row]) == pytest.approx((1.0, 0.98))
    assert landscape.mean_gain([row, row | {"seed": 2, "gain": 1.2}]) == pytest.approx((1.1, 0.98 / math.sqrt(2)))
    assert landscape.mean_gain([row, row | {"seed": 2, "gain": 4.0}]) == pytest.approx((2.5, 1.96 * 1.5))
    others = [row | {"gain": 3.0}, row | {"seed": 2, "gain": 4.0}, row | {"seed": 3, "gain": 3.0}]
    assert landscape.mean_gain([row, *others]) == pytest.approx((3.0, 4.30265 / math.sqrt(3)), rel=1e-5)  # of 2, 4, 3
    assert landscape.mean_gain([row, row | {"status": "diverged", "gain": math.nan}])[0] == -math.inf
    assert math.isnan(landscape.mean_gain([row, row | {"gain": math.nan}])[0])  # too few episodes
    branches = [row | {"gain": gain} for gain in (1.0, 2.0, 3.0)]  # which share what was before
    assert landscape.mean_gain(branches) == pytest.approx((2.0, 0.98))
    cells = [landscape.text_of(x, 127, " ± ") for x in (1234.5, -1.2345e6, -math.inf, math.nan)]
    assert cells == ["1,230 ± 130", "-1,230,000 ± 130", "diverged", "–"]


def test_a_gain_needs_two_episodes_on_both_sides():
    one, two = np.array([1.0]), np.array([2.0, 4.0])
    assert np.isnan([landscape.gain_of(one, two, 100), landscape.gain_of(two, one, 100)]).all()
    assert landscape.gain_of(two, two + 3, 20_000) == pytest.approx((1.5, math.sqrt(2) / 2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--command", "nonconvex_lrrl.py"], "nonconvex_lrrl.py is no training script"),
        (["--command", "nowhere.py"], "must begin with one of dqn_atari_lrrl.py"),
        (["--command", ""], "must begin with one of dqn_atari_lrrl.py"),
        (["--command", "sac_mujoco_lrrl.py 'a"], "No closing quotation"),
        (["--command", "sac_mujoco_lrrl.py --keep-replay"], "keep-replay is set here"),
        (["--command", f"{COMMAND} --seed 3"], "seed is set here"),
        (["--command", f"{COMMAND} --lr-control linear"], "lr-control is set here"),
        (["--command", f"{COMMAND} --gamma 2"], "--gamma"),
        (["--command", "dqn_atari_lrrl.py --preset cleanrl --learning-starts 80"], "give --exploration-steps instead"),
        (["--command", f"{COMMAND} --no-rollback"], "--rollback: has no meaning with --lr-control constant"),
        (["--command", "sac_mujoco_lrrl.py", "--moments", "5000"], "--learning-starts 5000: must be in"),
        (["--moments", "0"], "[1, inf)"),
        (["--learning-rates", "-1"], "--learning-rates"),
        (
            ["--command", COMMAND, "--moments", "300", "--length", "400"],
            "--moments 300: must be a multiple",
        ),
        (
            ["--command", COMMAND, "--moments", "400", "--length", "300"],
            "--length 300: must be a multiple",
        ),
        (["--command", COMMAND, "--moments", "400", "--length", "1000"], "--moments 400: must be half of --length"),
        (["--command", COMMAND, *OPTIONS, "--show-run", "nowhere"], "--show-run nowhere: must be a run folder"),
        (["--command", f"{COMMAND} --env-id Nowhere-v0", "--moments", "400"], "Nowhere"),
    ],
)
def test_bad_input_is_one_line_with_code_2(words, said, refused, tmp_path):
    assert said in refused(landscape.main, [tmp_path / "new", *words])
    assert not (tmp_path / "new").exists()
