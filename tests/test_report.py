"""What report.py promises: tables and figures from run folders, with every seed shown and finished runs only."""

import json
import os
import warnings

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest

import report
from lrrl_utils.runs import options_of
from lrrl_utils.scales import find_scales, find_sweep, normalized_returns
from lrrl_utils.variants import find_missing
from tests.studies import read_table, write_run


def read_variants(folder):
    return report.read_study([folder])[0]


def test_the_table_groups_by_task_and_variant_shows_every_seed_and_leaves_out_unfinished_runs(tmp_path, capsys):
    for seed, value in [(2, 20.0), (1, 10.0), (4, 1000.0), (3, 30.0)]:
        write_run(tmp_path, "Hopper-v5", seed, value)
    write_run(tmp_path, "Hopper-v5", 5, 9999.0, status="interrupted")
    write_run(tmp_path, "Hopper-v5", 1, 70.0, lr_control="constant")
    write_run(tmp_path, "Walker2d-v5", 1, 80.0, bandit="uniform")
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    table, *gaps = (tmp_path / "report.md").read_text().strip().split("\n\n")
    assert output == f"{table}\n"
    assert "missing: Hopper-v5, constant 0.0003, seeds 2 3 4" in gaps
    assert any(line.startswith("left out: ") and "&#39;" not in line and "interrupted" in line for line in gaps)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["Hopper-v5", "constant 0.0003", "1"],
        ["Hopper-v5", "lrrl", "4"],
        ["Walker2d-v5", "uniform", "1"],
    ]
    assert rows[1][4] == "10, 20, 30, 1,000"
    assert rows[1][3].startswith("25 [")  # of four values, the interquartile mean is that of the middle two
    assert rows[0][3] == "70" and rows[0][5] == "35"
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.05


def test_runs_with_other_options_are_not_pooled_and_a_seed_counts_once(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, bandit_interval=2048)
    write_run(tmp_path, "Hopper-v5", 1, 30.0, bandit_interval=4096, device="cuda")
    write_run(tmp_path, "Hopper-v5", 2, 50.0, bandit_interval=4096)
    write_run(tmp_path, "Hopper-v5", 3, None, bandit_interval=4096)  # no episode has ended
    groups = {name: len(group) for (_, name), group in read_variants(tmp_path).items()}
    assert groups == {"lrrl (bandit_interval 2048)": 1, "lrrl (bandit_interval 4096)": 2}
    assert capsys.readouterr().err.count("left out") == 1

    write_run(tmp_path, "Hopper-v5", 2, 50.0, bandit_interval=4096)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures"])
    assert end.value.code == 2 and "more than once" in capsys.readouterr().err


def test_runs_of_different_scripts_and_scopes_are_not_pooled_whichever_comes_first(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, exp_name="ppo", num_steps=2048)
    write_run(tmp_path, "Hopper-v5", 1, 20.0, exp_name="sac", bandit_scope="joint")
    write_run(tmp_path, "Hopper-v5", 2, 30.0, exp_name="sac", bandit_scope="separate")
    assert [len(group) for group in read_variants(tmp_path).values()] == [1, 1, 1]


def test_a_range_of_rates_is_named_by_its_ends_and_arms_by_themselves(tmp_path):
    write_run(tmp_path, "A-v0", 1, 10.0, lr_range=[1e-6, 1.0], learning_rates=[10**-n for n in range(7)])
    write_run(tmp_path, "A-v0", 1, 20.0, lr_range=None, learning_rates=[1e-4, 1e-3])
    assert {name for _, name in read_variants(tmp_path)} == {
        "lrrl (lr_range 1e-06 1)",
        "lrrl (learning_rates 0.0001 0.001)",
    }


def test_a_difference_beside_the_control_shows_in_the_names_of_rivals(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, gamma=0.9, bandit_window=3)
    write_run(tmp_path, "Hopper-v5", 1, 20.0, gamma=0.99, bandit="uniform", bandit_window=5)
    assert [name for _, name in read_variants(tmp_path)] == ["lrrl (gamma 0.9)", "uniform (gamma 0.99)"]


def test_differences_to_a_baseline_are_paired_by_seed(tmp_path, capsys):
    for seed, ours, theirs in [(1, 11.0, 10.0), (2, 22.0, 20.0), (3, 33.0, 30.0)]:
        write_run(tmp_path, "Hopper-v5", seed, ours)
        write_run(tmp_path, "Hopper-v5", seed, theirs, bandit="uniform")
    write_run(tmp_path, "Hopper-v5", 4, 500.0)  # without a partner
    report.main([str(tmp_path), "--no-figures", "--baseline", "uniform"])
    table, improvements = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    # differences 1, 2, 3: mean 2, deviation 1; Student's t of two degrees of freedom is 4.303
    assert [row[-1] for row in rows] == [f"2 [{2 - 4.303 / 3**0.5:.3g}, {2 + 4.303 / 3**0.5:.3g}], 3 pairs", ""]
    assert "probability of improvement over uniform" in improvements and "| lrrl | 0.75 [" in improvements  # 9 of 12
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures", "--baseline", "unifrom"])
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
    # only on one of the tasks; as good as the others on average
    write_run(tmp_path, "Hopper-v5", 4, 66.0, **before)
    write_run(tmp_path, "Hopper-v5", 1, 66.0, bandit="drift", **before)
    untrained = 0.1 * 0.66  # (1 + 0.5 + 0.42 + 0.72) / 4 is 0.66
    report.main([str(tmp_path), "--no-figures", "--normalize", "--baseline", "uniform"])
    text = capsys.readouterr().out.split("over all tasks")[1].split("\n\n")[0]
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["constant 0.0003"][1].strip() == "1.00 [1.00, 1.00]"
    assert rows["constant 0.01"][1].strip().startswith(f"{(0.5 - untrained) / (1 - untrained):.2f} ")
    assert rows["lrrl"][0].strip() == "3" and "drift" not in rows
    assert rows["lrrl"][1].strip().startswith(f"{(0.72 - untrained) / (1 - untrained):.2f} [")
    difference = f"{0.3 / (1 - untrained):.2f}"  # in every pair the same
    assert rows["lrrl"][2].strip() == f"{difference} [{difference}, {difference}]"
    assert rows["uniform"][2].strip() == ""


def test_over_all_tasks_means_stand_beside_interquartile_means(tmp_path, capsys):
    for seed, final in enumerate((10.0, 10.0, 10.0, 10.0, 60.0), 1):
        write_run(tmp_path, "A-v0", seed, 20.0, lr_control="constant", num_envs=1, num_steps=100)
        write_run(tmp_path, "A-v0", seed, final, num_envs=1, num_steps=100)
    report.main([str(tmp_path), "--no-figures", "--normalize", "--baseline", "constant 0.0003"])
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| lrrl")]
    untrained = 2.0  # a tenth of 20, which is the mean of either variant
    (of_middle, minus), (of_all, minus_of_all) = ((row[2], row[3]) for row in cells[:2])
    assert of_middle.startswith(f"{(10 - untrained) / (20 - untrained):.2f} [") and minus.startswith("-0.56 [")
    assert of_all.startswith("1.00 [") and minus_of_all.startswith("0.00 [")
    table = pandas.read_csv(tmp_path / "report.csv").query("task == 'all' and variant == 'lrrl'")
    assert table["normalised mean minus constant 0.0003"].dropna().item() == pytest.approx(0, abs=1e-12)


def test_figures_show_every_variant_on_its_scale(tmp_path, monkeypatch):
    for seed in (1, 2):
        for task, best in (("Hopper-v5", 100.0), ("Walker2d-v5", 1000.0)):
            write_run(tmp_path, task, seed, best, lr_control="constant", num_envs=1, num_steps=100)
            write_run(tmp_path, task, seed, best / 2, bandit="uniform", num_envs=1, num_steps=100)
    drawn, close = {}, plt.close
    monkeypatch.setattr(plt, "close", lambda figure: drawn.setdefault(len(drawn), figure))
    report.main([str(tmp_path), "--normalize"])
    curves, overall, profiles = (drawn[i].axes for i in range(3))
    last = [[line.get_ydata()[-1] for line in axis.lines] for axis in (*curves, *overall)]
    normalized = [(x - 7.5) / (100 - 7.5) for x in (90, 45, 100, 50)]  # untrained agents have a tenth of 75
    assert last == [pytest.approx(x) for x in ([90, 45], [900, 450], normalized[:2])]  # before the last episode ends
    steps = [line.get_xdata()[np.argmin(line.get_ydata() > 0.5)] for line in profiles[0].lines]
    assert steps == pytest.approx(normalized[2:], abs=0.02)
    close("all")


def test_a_sweep_is_two_constant_rates_or_more_with_two_seeds(tmp_path):
    def sweep(ruinous=()):
        variants = read_variants(tmp_path)
        return find_sweep(variants, normalized_returns(variants, find_scales(variants, ruinous)), ruinous)

    before = {"num_envs": 1, "num_steps": 100}
    for seed in (1, 2):
        write_run(tmp_path, "Hopper-v5", seed, 100.0, lr_control="constant", **before)
        write_run(tmp_path, "Hopper-v5", seed, 70.0, **before)
    assert sweep() == []
    write_run(tmp_path, "Hopper-v5", 1, 50.0, lr_control="constant", learning_rate=1e-2, **before)
    assert sweep() == []
    write_run(tmp_path, "Hopper-v5", 2, 50.0, lr_control="constant", learning_rate=1e-2, **before)
    assert sweep() == ["constant 0.0003", "constant 0.01"]
    write_run(tmp_path, "Hopper-v5", 3, 50.0, lr_control="constant", learning_rate=1e-1, **before)
    assert sweep() == ["constant 0.0003", "constant 0.01"]
    with_another_seed = options_of(read_variants(tmp_path)["Hopper-v5", "constant 0.01"][0].config)
    assert sweep([with_another_seed]) == []  # it has diverged
    for seed in (1, 2):
        write_run(tmp_path / "again", "Hopper-v5", seed, 50.0, lr_control="constant", learning_rate=1e-2, **before)
    assert sweep() == []  # a rate has two names
    (tmp_path / "again").rename(tmp_path.with_name("elsewhere"))
    for seed in (1, 2):  # which differ in more than the rate
        write_run(tmp_path, "Hopper-v5", seed, 90.0, lr_control="constant", learning_rate=1e-2, gamma=0.9, **before)
    assert sweep() == []


def test_the_table_of_a_sweep_has_what_the_best_of_so_many_rates_costs_and_brings(tmp_path, capsys):
    for seed in (1, 2, 3):
        for rate, final_return in ((1e-3, 100.0), (1e-2, 50.0)):
            options = {"lr_control": "constant", "learning_rate": rate, "num_envs": 1, "num_steps": 100}
            write_run(tmp_path, "Hopper-v5", seed, final_return, **options)
    for seed in (1, 2, 3, 4):  # no constant rate has 4
        write_run(tmp_path, "Hopper-v5", seed, 70.0 if seed < 4 else 90.0, num_envs=1, num_steps=100)
    write_run(tmp_path, "Hopper-v5", 3, 80.0, bandit="uniform", num_envs=1, num_steps=100)  # lacks 1 and 2
    report.main([str(tmp_path), "--normalize", "--no-figures"])
    untrained = 0.1 * np.mean([100, 50, 70] * 3 + [90, 80])
    worse, bandit = ((x - untrained) / (100 - untrained) for x in (50, 70))
    of_one = (1 + worse) / 2
    assert capsys.readouterr().out.splitlines()[-5:] == [
        f"| the best of 1 constant rates | 1k | {of_one:.2f} [{of_one:.2f}, {of_one:.2f}] |",
        "| the best of 2 constant rates | 2k | 1.00 [1.00, 1.00] |",
        "| constant 0.001 | 1k | 1.00 [1.00, 1.00] |",
        f"| constant 0.01 | 1k | {worse:.2f} [{worse:.2f}, {worse:.2f}] |",
        f"| lrrl | 1k | {bandit:.2f} [{bandit:.2f}, {bandit:.2f}] |",
    ]


def test_a_rate_whose_other_runs_have_diverged_is_not_the_best_one(tmp_path, capsys):
    for seed in (1, 2, 3):
        write_run(tmp_path, "A-v0", seed, 90.0 + 5 * seed, lr_control="constant", num_envs=2, num_steps=50)
        status = "finished" if seed == 1 else "diverged"
        write_run(tmp_path, "A-v0", seed, 300.0, status, lr_control="constant", learning_rate=0.1)
    (high,) = next(runs for (_, name), runs in read_variants(tmp_path).items() if name.startswith("constant 0.1"))
    (zero, one) = find_scales(read_variants(tmp_path), [options_of(high.config)])["A-v0"]
    assert one == 100  # the mean of its seeds
    assert zero == np.mean([9.5, 10, 10.5])  # at timestep 100, before the first update of two environments
    report.main([str(tmp_path), "--normalize", "--no-figures"])
    assert (
        "runs that have diverged count nowhere, nor do their rates: " in (text := capsys.readouterr().out)
        and text.count("A-v0__") == 2
    )
    assert "| 3 | 1.00 [0.94, 1.06] |" in text  # the other rate does not set the scale


def test_a_rate_that_diverged_with_another_optimizer_may_set_the_scale(tmp_path, capsys):
    options = {"lr_control": "constant", "num_envs": 1, "num_steps": 100}
    for seed in (1, 2):
        write_run(tmp_path, "A-v0", seed, 100.0, learning_rate=1e-2, optimizer="adam", **options)
        write_run(tmp_path, "A-v0", seed, 40.0, learning_rate=1e-3, optimizer="adam", **options)
    write_run(tmp_path, "A-v0", 1, 1.0, "diverged", learning_rate=1e-2, optimizer="sgd", **options)
    report.main([str(tmp_path), "--normalize", "--no-figures"])
    assert "| constant 0.01 | 2 | 1.00 [1.00, 1.00] |" in capsys.readouterr().out


def test_the_best_constant_rate_may_have_fewer_seeds(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "A-v0", seed, 50.0, lr_control="constant", num_envs=1, num_steps=100)
        if seed < 3:
            write_run(
                tmp_path, "A-v0", seed, 100.0, lr_control="constant", learning_rate=1e-3, num_envs=1, num_steps=100
            )
    assert find_scales(read_variants(tmp_path))["A-v0"][1] == 100


def test_tasks_that_differ_in_an_option_are_warned_of(tmp_path, capsys):
    for task, gamma in (("A-v0", 0.99), ("B-v0", 0.5)):
        for seed in (1, 2):
            write_run(tmp_path, task, seed, 10.0, lr_control="constant", gamma=gamma, num_envs=1, num_steps=100)
    report.main([str(tmp_path), "--no-figures"])
    assert capsys.readouterr().err == ""  # no table is of both
    report.main([str(tmp_path), "--no-figures", "--normalize"])
    assert capsys.readouterr().err == "warning: constant 0.0003: its tasks differ in gamma\n"


def test_tasks_whose_runs_have_different_code_are_warned_of_where_a_table_is_of_both(tmp_path, capsys):
    for task, code in (("A-v0", "1"), ("B-v0", "2")):
        options = {"lr_control": "constant", "code": {"bandits.py": code}, "num_envs": 1, "num_steps": 100}
        write_run(tmp_path, task, 1, 10.0, **options)
    report.main([str(tmp_path), "--no-figures"])
    assert capsys.readouterr().err == ""
    report.main([str(tmp_path), "--no-figures", "--normalize"])
    assert capsys.readouterr().err == "warning: constant 0.0003: its tasks differ in their code (bandits.py)\n"


def test_seeds_that_no_table_over_all_tasks_has_are_warned_of(tmp_path, capsys):
    for task, seed in (("A-v0", 1), ("A-v0", 2), ("A-v0", 3), ("B-v0", 1)):
        write_run(tmp_path, task, seed, 10.0, lr_control="constant", num_envs=1, num_steps=100)
    report.main([str(tmp_path), "--no-figures"])
    assert capsys.readouterr().err == ""
    report.main([str(tmp_path), "--no-figures", "--normalize"])
    output, error = capsys.readouterr()
    warning = "constant 0.0003: seeds 2 3 are not on all tasks, so no table over all of them has these\n"
    assert error == f"warning: {warning}" and warning in output


def test_constant_rates_that_differ_in_more_than_the_rate_are_warned_of(tmp_path, capsys):
    options = {"lr_control": "constant", "num_envs": 1, "num_steps": 100}
    for rate, optimizer in ((1e-3, "adam"), (1e-2, "adam"), (1e-2, "sgd")):
        write_run(tmp_path, "A-v0", 1, 10.0, learning_rate=rate, optimizer=optimizer, **options)
    report.main([str(tmp_path), "--no-figures", "--normalize"])
    assert capsys.readouterr().err == ("warning: A-v0: its constant rates, whose best one has 1, differ in optimizer\n")


def test_a_name_is_the_same_on_all_tasks(tmp_path):
    for task in ("A-v0", "B-v0"):
        write_run(tmp_path, task, 1, 10.0, gamma=0.99)
    write_run(tmp_path, "A-v0", 1, 10.0, gamma=0.9)
    assert sorted(read_variants(tmp_path)) == [
        ("A-v0", "lrrl (gamma 0.9)"),
        ("A-v0", "lrrl (gamma 0.99)"),
        ("B-v0", "lrrl (gamma 0.99)"),
    ]


def test_one_pair_has_no_interval(tmp_path):
    for seed, bandit in ((1, "a"), (2, "a"), (2, "b")):
        write_run(tmp_path, "Hopper-v5", seed, 10.0, bandit=bandit)
    returns = {"a": {1: np.ones(1), 2: np.ones(1)}, "b": {2: np.zeros(1)}}
    table = report.make_normalized_table(read_variants(tmp_path), returns, ["b"])
    assert table.rows[0][3] == "" and table.rows[0][2] == "1.00 [1.00, 1.00]"


def test_without_a_constant_rate_there_is_no_scale(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--normalize", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert end.value.code == 2 and "--normalize" in capsys.readouterr().err


def edit(name, **entries):
    """A function of a run folder that changes entries of a JSON file there; ... takes one away."""

    def break_it(folder):
        content = json.loads((folder / name).read_text()) | entries
        (folder / name).write_text(json.dumps({key: x for key, x in content.items() if x is not ...}))

    return break_it


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replace(name, make):
    """A function of a run folder that puts what `make` makes in place of a file."""

    def break_it(folder):
        (folder / name).unlink()
        make(folder / name)

    return break_it


HEADER = b"global_step,episodic_return,episodic_length\n"
BAD_FOLDERS = {  # what breaks a folder: what standard error says
    "no summary": (replace("summary.json", lambda path: None), "summary.json: no such file"),
    "no config": (replace("config.json", lambda path: None), "config.json: no such file"),
    "no episodes": (replace("episodes.csv", lambda path: None), "episodes.csv: no such file"),
    "summary a directory": (replace("summary.json", os.mkdir), "summary.json: no such file"),
    "config a directory": (replace("config.json", os.mkdir), "config.json: no such file"),
    "episodes a pipe": (replace("episodes.csv", os.mkfifo), "episodes.csv: no such file"),
    "config a link to nothing": (replace("config.json", lambda path: path.symlink_to("x")), "config.json: no such"),
    "summary empty": (write("summary.json", b""), "summary.json: Expecting value"),
    "summary garbage": (write("summary.json", b"\xff\x00{"), "summary.json: 'utf-8'"),
    "config cut off": (write("config.json", b'{"env_id": "Hop'), "config.json: Unterminated"),
    "summary null": (write("summary.json", b"null"), "summary.json: holds no dictionary"),
    "config a list": (write("config.json", b"[1]"), "config.json: holds no dictionary"),
    "config deep": (write("config.json", b"[" * 100_000), "config.json: maximum recursion"),
    "option deep": (write("config.json", b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}"), "config.json: x is [["),
    "interrupted": (edit("summary.json", status="interrupted"), "interrupted"),
    "no status": (edit("summary.json", status=...), "status"),
    "status a list": (edit("summary.json", status=[1]), "status [1]"),
    "no return": (edit("summary.json", final_return=...), "final_return is missing"),
    "return null": (edit("summary.json", final_return=None), "no episode has ended"),
    "return NaN": (edit("summary.json", final_return=float("nan")), "final_return is nan"),
    "return infinite": (edit("summary.json", final_return=float("inf")), "final_return is inf"),
    "return huge": (edit("summary.json", final_return=10**400), "final_return is 1000"),
    "return a string": (edit("summary.json", final_return="1"), "final_return is '1'"),
    "return true": (edit("summary.json", final_return=True), "final_return is True"),
    "no AUC": (edit("summary.json", auc=...), "auc is missing"),
    "AUC null": (edit("summary.json", auc=None), "auc is None"),
    "step a string": (edit("summary.json", global_step="1000"), "global_step is '1000'"),
    "no task": (edit("config.json", env_id=...), "env_id is missing"),
    "task a number": (edit("config.json", env_id=5), "env_id is 5"),
    "seed a string": (edit("config.json", seed="1"), "seed is '1'"),
    "seed null": (edit("config.json", seed=None), "seed is None"),
    "seed true": (edit("config.json", seed=True), "seed is True"),
    "control a list": (edit("config.json", lr_control=["bandit"]), "lr_control is ['bandit']"),
    "bandit null": (edit("config.json", bandit=None), "bandit is None"),
    "rate a string": (edit("config.json", learning_rate="3e-4"), "learning_rate is '3e-4'"),
    "rates a string": (edit("config.json", learning_rates="1 2"), "learning_rates is '1 2'"),
    "rates with NaN": (edit("config.json", learning_rates=[float("nan")]), "learning_rates is [nan]"),
    "rates with a list": (edit("config.json", learning_rates=[[1]]), "learning_rates is [[1]]"),
    "script a number": (edit("config.json", exp_name=1), "exp_name is 1"),
    "environments a string": (edit("config.json", num_envs="8"), "num_envs is '8'"),
    "option NaN": (edit("config.json", gamma=float("nan")), "gamma is nan"),
    "option a dictionary": (edit("config.json", gamma={"x": 1}), "gamma is {'x': 1}"),
    "code a list": (edit("config.json", code=["x"]), "code is ['x']"),
    "code with a list": (edit("config.json", code={"x.py": []}), "code is {'x.py': []}"),
    "commit a list": (edit("config.json", git_commit=["x"]), "git_commit is ['x']"),
    "its JSON files lost": (lambda folder: [path.unlink() for path in folder.glob("*.json")], "no such file"),
    "episodes empty": (write("episodes.csv", b""), "episodes.csv: holds no episode"),
    "header only": (write("episodes.csv", HEADER), "episodes.csv: holds no episode"),
    "no header": (write("episodes.csv", b"1,2,3\n4,5,6\n"), "global_step is not a finite number"),
    "text in a number": (write("episodes.csv", HEADER + b"100,ten,100\n"), "could not convert string to float"),
    "row too short": (write("episodes.csv", HEADER + b"100,1,100\n200,1\n"), "rows of different lengths"),
    "row too long": (write("episodes.csv", HEADER + b"100,1,100\n200,1,000,100\n"), "rows of different lengths"),
    "line empty": (write("episodes.csv", HEADER + b"100,1,100\n\n"), "rows of different lengths"),
    "NaN return": (write("episodes.csv", HEADER + b"100,1,100\n200,nan,100\n"), "episodic_return is not a finite"),
    "missing return": (write("episodes.csv", HEADER + b"100,1,100\n200,,100\n"), "episodic_return is not a finite"),
    "infinite step": (write("episodes.csv", HEADER + b"100,1,100\ninf,1,100\n"), "global_step is not a finite"),
    "step that goes back": (write("episodes.csv", HEADER + b"200,1,100\n100,1,100\n"), "global_step goes back"),
}


@pytest.mark.parametrize(("break_it", "reason"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_run_folder_is_left_out_with_its_reason_on_one_line(break_it, reason, tmp_path, capsys):
    folder = write_run(tmp_path, "Hopper-v5", 1, 10.0)
    break_it(folder)
    write_run(tmp_path, "Hopper-v5", 2, 20.0)
    write_run(tmp_path, "Hopper-v5", 1, 30.0, lr_control="constant")
    report.main([str(tmp_path), "--no-figures"])
    output, error = capsys.readouterr()
    assert [row[1:3] for row in read_table(output)] == [["constant 0.0003", "1"], ["lrrl", "1"]]
    assert "nan" not in output.lower()
    first, *others = error.splitlines()
    assert first.startswith(f"left out: {folder} (") and reason in first, error
    assert len(others) == 2 and all(line.startswith("missing: Hopper-v5, ") for line in others)


def test_an_unreadable_folder_is_left_out(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, "Hopper-v5", 1, 10.0)
    locked, listdir = write_run(tmp_path, "Hopper-v5", 2, 20.0), os.listdir

    def refuse(path):  # permissions would not stop root
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    report.main([str(tmp_path), "--no-figures"])
    output, error = capsys.readouterr()
    assert len(read_table(output)) == 1 and error.count("\n") == 1
    assert error.startswith(f"left out: {locked} (") and "Permission denied" in error


def test_a_reason_or_folder_name_with_codes_for_the_terminal_stays_one_plain_short_line(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0)
    folder = write_run(tmp_path, "Hopper-v5", 2, 20.0)
    (folder / "episodes.csv").write_bytes(HEADER + b"100,\x1b[31m" + b"x" * 1000 + b",100\n")
    folder.rename(tmp_path / "red\x1b[31m\nrun")
    report.main([str(tmp_path), "--no-figures"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "red run (" in error and "\x1b" not in error and len(error) < 500


def test_when_no_run_is_left_the_last_line_says_so_with_code_2(tmp_path, capsys):
    (write_run(tmp_path, "Hopper-v5", 1, 10.0) / "config.json").write_text("")
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures"])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and "left out" in lines[0] and "FOLDER" in lines[1]
    assert not (tmp_path / "report.md").exists()


def test_names_cannot_break_the_table_or_the_terminal(tmp_path, capsys):
    name = "a|b\n<img src=x>&`c`\x1b[31m\x07\u202e[d](e)\\"
    write_run(tmp_path, name, 1, 10.0, bandit=name)
    write_run(tmp_path, name, 1, 10.0, bandit="uniform", **{"|x\n<b>": "|y\n<i>"})
    shown = "a|b <img src=x>&`c` [d](e)\\"
    report.main([str(tmp_path), "--no-figures", "--baseline", f"{shown} (|x <b> None)"])
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert len(lines) == 9 and all(line.count("|") == 8 for line in lines[:4])
    assert lines[4] == "" and all(line.count("|") == 3 for line in lines[5:])
    assert not set(output) & set("<>`\\\x1b\x07\u202e") and "](" not in output
    (task, variant, *_), (_, rival, *_) = read_table(output)
    for entity, character in {"&#124;": "|", "&#60;": "<", "&#62;": ">", "&#91;": "[", "&#93;": "]"}.items():
        task, variant, rival = (text.replace(entity, character) for text in (task, variant, rival))
    assert task == "a|b <img src=x>&#38;&#96;c&#96; [d](e)&#92;"
    assert variant == f"{task} (|x <b> None)" and rival == "uniform (|x <b> |y <i>)"


OLD, NEW = {"ppo.py": "1" * 64, "bandits.py": "2" * 64}, {"ppo.py": "1" * 64, "bandits.py": "3" * 64}


@pytest.mark.parametrize(
    ("configs", "differ"),
    [
        (({"code": OLD, "git_commit": "a"}, {"code": NEW, "git_commit": "a"}), "bandits.py"),
        (({"code": OLD, "git_commit": "a"}, {"code": dict(reversed(OLD.items())), "git_commit": "b"}), None),
        (({"code": OLD}, {"code": OLD | {"checkpoints.py": "4" * 64}}), "checkpoints.py"),
        (({"git_commit": "a"}, {"git_commit": "b"}), "git_commit"),
        (({"git_commit": "a"}, {"git_commit": "a"}), None),
        (({"code": OLD, "git_commit": "a"}, {"git_commit": "b"}), "git_commit"),
        (({"code": OLD, "git_commit": "a"}, {"git_commit": "a"}), None),
        (({"git_commit": None}, {"git_commit": "a"}), "git_commit"),
        (({}, {}), None),
    ],
)
def test_runs_of_different_code_in_a_variant_get_a_warning_and_a_note(configs, differ, tmp_path, capsys):
    for seed, config in enumerate(configs):
        write_run(tmp_path, "Hopper-v5", seed, 10.0, **config)
        write_run(tmp_path, "Hopper-v5", seed, 10.0, bandit="uniform", git_commit="other")  # of one kind
        write_run(tmp_path, "Hopper-v5", seed, 10.0, lr_control="constant", git_commit="third")
    report.main([str(tmp_path), "--no-figures"])
    output, error = capsys.readouterr()
    assert [row[1:3] for row in read_table(output)] == [["constant 0.0003", "2"], ["lrrl", "2"], ["uniform", "2"]]
    note = f"Hopper-v5, lrrl: pools runs of different code ({differ})\n" if differ else ""
    assert error == (f"warning: {note}" if differ else "")
    assert output.partition("\n\n")[2] == note
    assert (tmp_path / "report.md").read_text() == output


def test_a_note_on_code_is_escaped_and_stands_between_the_tables(tmp_path, capsys):
    for seed in (1, 2):
        code = {"<b>\x1b[31m.py": str(seed)}
        write_run(tmp_path, "Hopper-v5", seed, 10.0, lr_control="constant", code=code, learning_starts=100)
    report.main([str(tmp_path), "--no-figures", "--normalize"])
    output, error = capsys.readouterr()
    _, note, overall, _ = output.split("\n\n")
    assert "(&#60;b&#62;.py)" in note and "|" not in note and overall.startswith("| over all tasks")
    assert error.count("\n") == 1 and "(<b>.py)" in error


def test_variants_of_several_scripts_show_the_script_and_only_options_that_differ_within_it(tmp_path):
    for value, interval in ((10.0, 2048), (20.0, 4096)):
        write_run(tmp_path, "Hopper-v5", 1, value, exp_name="ppo", gamma=0.99, num_steps=8, bandit_interval=interval)
    for scope in ("joint", "actor"):
        write_run(tmp_path, "Hopper-v5", 1, 30.0, exp_name="sac", gamma=0.9, tau=0.005, bandit_scope=scope)
    write_run(tmp_path, "Hopper-v5", 1, 40.0, exp_name="sac", gamma=0.9, tau=0.005, lr_control="constant")
    write_run(tmp_path, "Walker2d-v5", 1, 50.0, exp_name="ppo", num_steps=8)
    assert list(read_variants(tmp_path)) == [
        ("Hopper-v5", "constant 0.0003 (exp_name sac)"),
        ("Hopper-v5", "lrrl (exp_name ppo, bandit_interval 2048)"),
        ("Hopper-v5", "lrrl (exp_name ppo, bandit_interval 4096)"),
        ("Hopper-v5", "lrrl (exp_name sac, bandit_scope joint)"),
        ("Hopper-v5", "lrrl (exp_name sac, bandit_scope actor)"),
        ("Walker2d-v5", "lrrl (exp_name ppo, bandit_interval None)"),
    ]


def test_a_run_that_names_no_script_stands_beside_others(tmp_path):
    for seed, script in enumerate([{}, {"exp_name": None}, {"exp_name": "ppo"}]):
        write_run(tmp_path, "Hopper-v5", seed, 10.0, **script)
    names = {name: len(group) for (_, name), group in read_variants(tmp_path).items()}
    assert names == {"lrrl (exp_name ppo)": 1, "lrrl (exp_name unknown)": 2}


def test_files_and_folders_that_are_no_runs_are_passed_over(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0)
    (tmp_path / "wandb").mkdir()
    report.main([str(tmp_path)])
    report.main([str(tmp_path), "--no-figures"])  # beside the files that the first one has left
    output, error = capsys.readouterr()
    assert error == "" and output == 2 * (tmp_path / "report.md").read_text()


def test_lists_of_options_that_differ_in_late_digits_are_not_pooled(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, learning_rates=[0.1, 1.0])
    write_run(tmp_path, "Hopper-v5", 1, 10.0, learning_rates=[0.100000001, 1.0])
    names = [name for _, name in read_variants(tmp_path)]
    assert names == ["lrrl (learning_rates 0.1 1)", "lrrl (learning_rates 0.100000001 1)"]


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "code": (OLD, NEW),
        **dict.fromkeys(("compile", "cuda", "torch_deterministic", "save_model", "track"), (False, True)),
        "eval_episodes": (0, 5),
        "checkpoint_interval": (0, 1000),
        "resume": (None, "runs/a"),
        "command_line": ([], ["--seed", "2"]),
        "replay_device": ("cpu", "cuda"),
        "threads": (1, 2),
        "resumed": ([], [{"global_step": 5, "git_commit": "a"}]),
        "git_commit": ("a", "b"),
    }.items(),
)
def test_what_no_step_depends_on_makes_no_variant(key, values, tmp_path, capsys):
    for seed, value in enumerate((*values, ...)):
        write_run(tmp_path, "Hopper-v5", seed, 10.0, **({} if value is ... else {key: value}))
    assert {name: len(group) for (_, name), group in read_variants(tmp_path).items()} == {"lrrl": 3}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("final", [0.5, 1.0])
def test_a_scale_that_does_not_go_up_is_refused(final, tmp_path, capsys):
    folder = write_run(tmp_path, "Hopper-v5", 1, final, lr_control="constant", learning_starts=100)
    (folder / "episodes.csv").write_bytes(HEADER + b"100,1.0,100\n900,0.5,100\n")
    with warnings.catch_warnings(action="error"), pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures", "--normalize"])
    assert end.value.code == 2 and "--normalize" in capsys.readouterr().err


def test_without_an_untrained_episode_there_is_no_scale(tmp_path, capsys):
    write_run(tmp_path, "Hopper-v5", 1, 10.0, lr_control="constant")  # tells of no first update
    with warnings.catch_warnings(action="error"), pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures", "--normalize"])
    assert end.value.code == 2 and "--normalize" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["no/such/folder"]])
def test_a_folder_without_finished_runs_is_one_line_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1


# --- variants that a folder names -------------------------------------------------------------------------------------


def test_a_folder_of_run_folders_names_the_variant_beside_runs_with_derived_names(tmp_path):
    write_run(tmp_path / "tuned\x1b[31m", "A-v0", 2, 10.0, gamma=0.9)
    write_run(tmp_path / "tuned\x1b[31m", "A-v0", 1, 10.0, gamma=0.9)
    write_run(tmp_path / "tuned\x1b[31m", "B-v0", 1, 10.0, gamma=0.8)  # tasks may have options of their own
    write_run(tmp_path, "A-v0", 1, 10.0, gamma=0.99)
    (tmp_path / "a").mkdir()
    write_run(tmp_path / "a" / "too deep", "A-v0", 1, 10.0)
    variants = read_variants(tmp_path)
    assert {names: [run.config["seed"] for run in group] for names, group in variants.items()} == {
        ("A-v0", "lrrl"): [1],
        ("A-v0", "tuned"): [1, 2],
        ("B-v0", "tuned"): [1],
    }


@pytest.mark.parametrize("place", ["mine", "."])
def test_different_options_within_a_named_variant_are_one_line_with_code_2(place, tmp_path, capsys):
    write_run(tmp_path / "mine", "A-v0", 1, 10.0, bandit="mine", gamma=0.9, seed_of_me=1)
    write_run(tmp_path / place, "A-v0", 2, 10.0, bandit="mine", gamma=0.8, seed_of_me=2, device="cuda")
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "A-v0, mine that differ in gamma, seed_of_me" in error


def test_what_a_population_has_cost_is_a_column(tmp_path, capsys):
    write_run(tmp_path, "A-v0", 1, 10.0, total_timesteps=300_000)
    report.main([str(tmp_path), "--no-figures"])
    assert "timesteps" not in capsys.readouterr().out
    for seed in (1, 2):  # each with rates of its own
        options = {"lr_control": "pb2", "learning_rate": None, "population": 4, "rates": [1e-3 * seed, 1e-4]}
        write_run(tmp_path / "pb2", "A-v0", seed, 10.0, total_timesteps=300_000, **options)
    report.main([str(tmp_path), "--no-figures"])
    output = capsys.readouterr().out
    assert "| seeds | timesteps |" in output
    assert [row[1:4] for row in read_table(output)] == [["lrrl", "1", "300k"], ["pb2", "2", "1.2M"]]
    (tmp_path / "pb2").rename(tmp_path / "no_study")
    for i, run in enumerate((tmp_path / "no_study").iterdir()):
        run.rename(tmp_path / f"moved {i}")
    report.main([str(tmp_path), "--no-figures"])
    assert [row[1:3] for row in read_table(capsys.readouterr().out)] == [["lrrl", "1"], ["pb2", "2"]]
    for seed in (1, 2):
        options = {"lr_control": "constant", "total_timesteps": 300_000, "num_envs": 1, "num_steps": 100}
        write_run(tmp_path / "fixed", "A-v0", seed, 5.0, **options)
    report.main([str(tmp_path), "--no-figures", "--normalize", "--baseline", "fixed"])
    _, overall, _, improvements = capsys.readouterr().out.split("\n\n")
    for table in (overall, improvements):
        assert "| timesteps |" in table and "| 1.2M |" in table and "| 300k |" in table


def test_what_several_tasks_lack_or_pool_is_one_line(tmp_path, capsys):
    for task in ("A-v0", "B-v0"):
        for seed in (1, 2):
            write_run(tmp_path, task, seed, 1.0, code={"bandits.py": str(seed)})
        write_run(tmp_path, task, 1, 1.0, bandit="uniform")
    report.main([str(tmp_path), "--no-figures"])
    expected = ["missing: A-v0 B-v0, uniform, seeds 2", "A-v0 B-v0, lrrl: pools runs of different code (bandits.py)"]
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert all(lines.count(line) == 1 for line in expected)
    assert capsys.readouterr().err.splitlines() == [expected[0], f"warning: {expected[1]}"]


def test_a_link_in_a_run_folder_is_not_followed(tmp_path, capsys):
    write_run(tmp_path / "study", "A-v0", 1, 10.0)
    folder = write_run(tmp_path / "study", "A-v0", 2, 20.0)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    report.main([str(tmp_path / "study"), "--no-figures"])
    output, error = capsys.readouterr()
    assert [row[2] for row in read_table(output)] == ["1"] and f"left out: {folder} (config.json: " in error


def test_more_studies_stand_beside_the_first(tmp_path, capsys):
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "both.parquet"
    write_run(first, "A-v0", 1, 10.0)
    write_run(second, "A-v0", 2, 20.0)
    write_run(second, "A-v0", 1, 30.0, bandit="uniform")
    report.main([str(first), "--also", str(second), "--no-figures"])
    rows = read_table(capsys.readouterr().out)
    assert [row[1:3] for row in rows] == [["lrrl", "2"], ["uniform", "1"]]
    assert (first / "report.md").exists() and not (second / "report.md").exists()
    report.main([str(first), "--also", str(second), "--compact", str(file)])
    capsys.readouterr()
    report.main([str(file), "--no-figures"])
    assert read_table(capsys.readouterr().out) == rows
    with pytest.raises(SystemExit) as end:
        report.main([str(first), "--also", str(first), "--no-figures"])
    assert end.value.code == 2 and f"{first} {first}: holds a seed more than once" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        report.main([str(first), "--also", str(tmp_path / "none"), "--no-figures"])
    assert end.value.code == 2 and f"--also {tmp_path / 'none'}: must be" in capsys.readouterr().err


def test_a_run_is_published_though_another_study_has_a_damaged_one_of_its_name(tmp_path, capsys):
    damaged = write_run(tmp_path / "a", "A-v0", 1, 10.0)
    (damaged / "episodes.csv").write_text("no table")
    write_run(tmp_path / "a", "A-v0", 2, 20.0)
    whole = write_run(tmp_path / "b", "A-v0", 1, 30.0)
    assert whole.name == damaged.name
    studies = [str(tmp_path / "a"), "--also", str(tmp_path / "b")]
    report.main([*studies, "--compact", str(tmp_path / "both.parquet")])
    assert ": 2 runs," in capsys.readouterr().out


def test_a_range_with_different_arms_is_not_pooled(tmp_path, capsys):
    for seed, arms in ((1, [1e-6, 1e-3, 1.0]), (2, [1e-6, 1.0])):
        write_run(tmp_path, "A-v0", seed, 10.0, lr_range=[1e-6, 1.0], learning_rates=arms)
    write_run(tmp_path, "A-v0", 1, 10.0, lr_range=None, learning_rates=[1e-4])
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path), "--no-figures"])
    assert end.value.code == 2 and "that differ in learning_rates" in capsys.readouterr().err


def test_runs_that_other_variants_have_are_missing(tmp_path):
    for task, seed in (("A-v0", 1), ("A-v0", 2), ("B-v0", 3)):
        write_run(tmp_path, task, seed, 10.0)
    write_run(tmp_path, "A-v0", 1, 10.0, bandit="uniform")
    write_run(tmp_path, "A-v0", 2, 10.0, bandit="uniform", status="running")
    assert find_missing(read_variants(tmp_path)) == {("A-v0", "uniform"): [2], ("B-v0", "uniform"): [3]}


def test_broken_rounds_are_named_and_the_run_counts(tmp_path, capsys):
    folder = write_run(tmp_path, "A-v0", 1, 10.0, rounds="round,global_step\n1,ten\n")
    assert [run.rounds for group in read_variants(tmp_path).values() for run in group] == [{}]
    assert capsys.readouterr().err.startswith(f"left out: {folder}/rounds.csv (rounds.csv: could not convert")


def test_the_arms_of_several_bandits_are_no_option(tmp_path):
    for arms in ({"actor": [1e-3], "critic": [1e-2]}, {"actor": [1e-3], "critic": [1e-1]}):
        write_run(tmp_path, "A-v0", len(list(tmp_path.iterdir())), 10.0, arms=arms)
    assert [len(group) for group in read_variants(tmp_path).values()] == [2]


def test_the_csv_file_has_the_numbers_of_all_tables(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "A-v0", seed, 100 / 3 + seed, lr_control="constant", learning_starts=100)
        write_run(tmp_path, "A-v0", seed, 20.0, bandit='"a, b"', learning_starts=100)
    report.main([str(tmp_path), "--no-figures", "--normalize", "--baseline", "constant 0.0003"])
    table = pandas.read_csv(tmp_path / "report.csv").query("task == 'A-v0'").set_index("variant")
    ours, constant = table.loc['"a, b"'], table.loc["constant 0.0003"]
    assert constant["final_return"] == 100 / 3 + 1.5 and constant["final_returns"] == f"{100 / 3 + 1} {100 / 3 + 2}"
    assert ours["final_return minus constant 0.0003"] == pytest.approx(20 - 100 / 3 - 1.5)
    overall = pandas.read_csv(tmp_path / "report.csv").query("task == 'all' and variant != 'constant 0.0003'")
    assert overall["normalised"].dropna().item() < 1
    assert overall["probability of improvement over constant 0.0003"].dropna().item() == 0
