"""What report.py promises: tables and figures from run folders, with every seed shown and finished runs only."""

import json

import matplotlib.image
import numpy as np
import pytest

import report


def write_run(parent, task, seed, final_return, status="finished", **config):
    folder = parent / f"{task}__{len(list(parent.iterdir()))}"
    folder.mkdir()
    config = {"env_id": task, "seed": seed, "lr_control": "bandit", "bandit": "lrrl", "learning_rate": 3e-4} | config
    (folder / "config.json").write_text(json.dumps(config))
    auc = final_return and final_return / 2
    summary = {"status": status, "global_step": 1000, "final_return": final_return, "auc": auc}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = "".join(f"{step},{(final_return or 0) * step / 1000},100\n" for step in range(100, 1001, 100))
    (folder / "episodes.csv").write_text(f"global_step,episodic_return,episodic_length\n{rows}")


def test_the_table_groups_by_task_and_variant_shows_every_seed_and_leaves_out_unfinished_runs(tmp_path, capsys):
    for seed, value in [(2, 20.0), (1, 10.0), (4, 1000.0), (3, 30.0)]:
        write_run(tmp_path, "Hopper-v5", seed, value)
    write_run(tmp_path, "Hopper-v5", 5, 9999.0, status="interrupted")
    write_run(tmp_path, "Hopper-v5", 1, 70.0, lr_control="constant")
    write_run(tmp_path, "Walker2d-v5", 1, 80.0, bandit="uniform")
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert output == (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["Hopper-v5", "constant 0.0003", "1"],
        ["Hopper-v5", "lrrl", "4"],
        ["Walker2d-v5", "uniform", "1"],
    ]
    assert rows[1][4] == "10, 20, 30, 1,000"
    assert rows[1][3].startswith("25 [")  # of four values, the interquartile mean is that of the middle two
    assert rows[0][3] == "70 [70, 70]" and rows[0][5] == "35 [35, 35]"
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.05


def test_runs_with_other_options_are_not_pooled_and_a_seed_counts_once(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, bandit_interval=2048)
    write_run(tmp_path, "Hopper-v5", 1, 30.0, bandit_interval=4096, device="cuda")
    write_run(tmp_path, "Hopper-v5", 2, 50.0, bandit_interval=4096)
    write_run(tmp_path, "Hopper-v5", 3, None, bandit_interval=4096)  # no episode has ended
    groups = {name: len(group) for (_, name), group in report.read_runs(tmp_path).items()}
    assert groups == {"lrrl (bandit_interval 2048)": 1, "lrrl (bandit_interval 4096)": 2}
    assert capsys.readouterr().err.count("left out") == 1

    write_run(tmp_path, "Hopper-v5", 2, 50.0, bandit_interval=4096)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path)])
    assert end.value.code == 2 and "more than once" in capsys.readouterr().err


def test_runs_of_different_scripts_and_scopes_are_not_pooled_whichever_comes_first(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, exp_name="ppo", num_steps=2048)
    write_run(tmp_path, "Hopper-v5", 1, 20.0, exp_name="sac", bandit_scope="joint")
    write_run(tmp_path, "Hopper-v5", 2, 30.0, exp_name="sac", bandit_scope="separate")
    assert [len(group) for group in report.read_runs(tmp_path).values()] == [1, 1, 1]


def test_a_difference_beside_the_control_shows_in_the_names_of_rivals(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, gamma=0.9, bandit_window=3)
    write_run(tmp_path, "Hopper-v5", 1, 20.0, gamma=0.99, bandit="uniform", bandit_window=5)
    assert [name for _, name in report.read_runs(tmp_path)] == ["lrrl (gamma 0.9)", "uniform (gamma 0.99)"]


def test_differences_to_a_baseline_are_paired_by_seed(tmp_path, capsys):
    for seed, ours, theirs in [(1, 11.0, 10.0), (2, 22.0, 20.0), (3, 33.0, 30.0)]:
        write_run(tmp_path, "Hopper-v5", seed, ours)
        write_run(tmp_path, "Hopper-v5", seed, theirs, bandit="uniform")
    write_run(tmp_path, "Hopper-v5", 4, 500.0)  # without a partner
    report.main([str(tmp_path), "--baseline", "uniform"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    # differences 1, 2, 3: mean 2, deviation 1; Student's t of two degrees of freedom is 4.303
    assert [row[-1] for row in rows] == [f"2 [{2 - 4.303 / 3**0.5:.3g}, {2 + 4.303 / 3**0.5:.3g}], 3 pairs", ""]
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--baseline", "unifrom"])
    assert end.value.code == 2 and "must be one of lrrl, uniform" in capsys.readouterr().err


def test_normalised_returns_are_0_untrained_and_1_at_the_best_constant_rate_and_differences_are_paired(
    tmp_path, capsys
):
    # write_run() logs episodes with a tenth, two tenths … of the final return at 100, 200 …; updates start after 100.
    before = {"num_envs": 1, "num_steps": 100}
    for task, best in (("Hopper-v5", 100.0), ("Walker2d-v5", 1000.0)):
        for seed in (1, 2, 3):
            write_run(tmp_path, task, seed, best, lr_control="constant", **before)
            write_run(tmp_path, task, seed, best / 2, lr_control="constant", learning_rate=1e-2, **before)
            write_run(tmp_path, task, seed, best * (0.4 + seed / 100), bandit="uniform", **before)
            write_run(tmp_path, task, seed, best * (0.7 + seed / 100), **before)
    write_run(tmp_path, "Hopper-v5", 4, 66.0, **before)  # only on one of the tasks; as good as the others on average
    untrained = 0.1 * 0.66  # (1 + 0.5 + 0.42 + 0.72) / 4 is 0.66
    report.main([str(tmp_path), "--normalize", "--baseline", "uniform"])
    text = capsys.readouterr().out.split("over all tasks")[1]
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["constant 0.0003"][1].strip() == "1.00 [1.00, 1.00]"
    assert rows["constant 0.01"][1].strip().startswith(f"{(0.5 - untrained) / (1 - untrained):.2f} ")
    assert rows["lrrl"][0].strip() == "3"
    assert rows["lrrl"][1].strip().startswith(f"{(0.72 - untrained) / (1 - untrained):.2f} [")
    difference = f"{0.3 / (1 - untrained):.2f}"  # in every pair the same
    assert rows["lrrl"][2].strip() == f"{difference} [{difference}, {difference}]"
    assert rows["uniform"][2].strip() == ""


def test_without_a_constant_rate_there_is_no_scale(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--normalize"])
    assert end.value.code == 2 and "--normalize" in capsys.readouterr().err


def test_the_interval_covers_the_point_and_repeats():
    values = np.random.default_rng(0).normal(100, 10, 12)
    point, low, high = report.interquartile_mean(values)
    assert values.min() < low < point < high < values.max()
    assert report.interquartile_mean(values) == (point, low, high)


@pytest.mark.parametrize("argv", [[], ["no/such/folder"]])
def test_a_folder_without_finished_runs_is_one_line_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
