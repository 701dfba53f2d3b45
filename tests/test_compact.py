"""A study in one file is the study: the same runs to the last digit, the same report; any other file is refused."""

import shutil

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import report
from lrrl_utils.compact import read_parquet
from lrrl_utils.runs import read_records
from tests.studies import read_table, write_run

EPISODES = "global_step,episodic_return,episodic_length\n10,0.1,10\n20,-1.2345678901234568e-05,10\n400,1e20,10\n"
ROUNDS = "round,global_step,arm,learning_rate,performance,feedback\n1,10,,0.0003,1,\n2,30,,0.0003,2,\n"
JOINT = "round,global_step,controller,arm,learning_rate,performance,feedback,p_0,p_1\n"
JOINT += "1,10,critic,1,0.001,0.1,0.0,0.25,0.75\n1,10,actor,0,3e-05,0.30000000000000004,-0.7,0.5,0.5\n"


@pytest.fixture
def study(tmp_path):
    """A study with all that a study may have."""
    folder = tmp_path / "study"
    early = {"learning_starts": 300}
    for seed, task in ((1, "A-v0"), (2, "A-v0"), (1, "B-v0")):
        write_run(folder, task, seed, 10.0 + seed, rounds=ROUNDS, lr_control="constant", **early)
        write_run(folder, task, seed, 9.0 + seed, rounds=JOINT, bandit="lrrl λ", **early)
    write_run(folder / "mine", "A-v0", 1, 1 / 3, **early)
    (write_run(folder / "mine", "A-v0", 2, 12.0, **early) / "episodes.csv").write_text(EPISODES)
    write_run(folder, "A-v0", 3, 12.0, status="interrupted", rounds=JOINT.splitlines()[0] + "\n")
    return folder


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.folder, a.config, a.summary) == (b.folder, b.config, b.summary)
        for x, y in ((a.episodes, b.episodes), (a.rounds, b.rounds)):
            assert (x and list(x)) == (y and list(y))
            for name in x or ():
                np.testing.assert_array_equal(x[name], y[name], strict=len(x[name]) > 0)


def test_what_is_read_from_a_file_is_what_the_folders_hold(study, tmp_path, capsys):
    report.main([str(study), "--compact", str(tmp_path / "one.parquet")])
    output, error = capsys.readouterr()
    assert "9 runs" in output and error == "" and not (study / "report.md").exists()
    records, _ = read_records(study)
    assert len(records) == 9
    assert_same(records, read_parquet(tmp_path / "one.parquet"))
    report.main([str(tmp_path / "one.parquet"), "--compact", str(tmp_path / "two.parquet")])
    assert_same(records, read_parquet(tmp_path / "two.parquet"))


def test_pandas_reads_it(study, tmp_path):
    report.main([str(study), "--compact", str(tmp_path / "one.parquet")])
    runs = pandas.read_parquet(tmp_path / "one.parquet").set_index("folder")
    episodes = pandas.DataFrame(runs.loc["mine/A-v0__1", "episodes"])
    assert (
        runs.loc["mine/A-v0__1", "rounds"]["arm"] is None
        and episodes.to_csv(index=False).splitlines()[2] == "20,-1.2345678901234568e-05,10"
    )
    assert list(pandas.DataFrame(runs.rounds["A-v0__1"]).controller) == ["critic", "actor"]


def test_the_report_of_a_file_is_that_of_the_folder_and_lies_beside_it(study, tmp_path, capsys):
    options = ["--normalize", "--baseline", "constant 0.0003", "--no-figures"]
    report.main([str(study), *options])
    of_folder = capsys.readouterr()
    assert len(read_table(of_folder.out)) == 5
    (tmp_path / "results").mkdir()
    report.main([str(study), "--compact", str(tmp_path / "results/s.parquet")])
    shutil.move(study, tmp_path / "away")
    capsys.readouterr()
    report.main([str(tmp_path / "results/s.parquet"), *options])
    assert capsys.readouterr().out == of_folder.out
    for file in ("report.md", "report.csv"):
        assert (tmp_path / "results/s" / file).read_text() == (tmp_path / "away" / file).read_text()
    report.main([str(tmp_path / "results/s.parquet"), *options, "--output", str(tmp_path / "a/b")])
    assert (tmp_path / "a/b/report.md").read_text() == (tmp_path / "results/s/report.md").read_text()


def test_a_damaged_run_does_not_get_into_a_file_and_is_named(study, tmp_path, capsys):
    (study / "A-v0__0" / "config.json").write_text("{")
    (study / "A-v0__1" / "episodes.csv").write_text("")
    report.main([str(study), "--compact", str(tmp_path / "one.parquet")])
    output, error = capsys.readouterr()
    assert "7 runs" in output and error.count("left out") == error.count("\n") == 2
    assert {record.folder for record in read_parquet(tmp_path / "one.parquet")}.isdisjoint({"A-v0__0", "A-v0__1"})


def test_runs_that_were_all_stopped_get_into_a_file_but_not_into_a_report(tmp_path, capsys):
    study, file = tmp_path / "study", tmp_path / "one.parquet"
    folder = write_run(study, "A-v0", 1, 10.0, status="interrupted")
    report.main([str(study), "--compact", str(file)])
    assert "1 runs" in capsys.readouterr().out and len(read_parquet(file)) == 1
    for path in (study, file):
        with pytest.raises(SystemExit) as end:
            report.main([str(path), "--no-figures"])
        assert end.value.code == 2 and "finished runs" in capsys.readouterr().err
    (folder / "config.json").write_text("{")  # nor is a damaged run enough for a file
    with pytest.raises(SystemExit) as end:
        report.main([str(study), "--compact", str(file)])
    assert end.value.code == 2


def table(**columns):
    lists = {"global_step": [1], "episodic_return": [1.0]}
    names = {"folder": ["a"], "config": ["{}"], "summary": ["{}"], "episodes": [lists], "rounds": [lists]}
    return pa.table({name: x for name, x in (names | columns).items() if x is not None})


FOREIGN = {
    "text": b"folder,config\n",
    "empty": b"",
    "cut off": None,
    "no column episodes": table(episodes=None),
    "episodes numbers": table(episodes=[1]),
    "episodes lists of lists": table(episodes=[[[1]]]),
    "episodes structs of numbers": table(episodes=[{"global_step": 1}]),
    "no rows": table().slice(0, 0),
    "config numbers": table(config=[5]),
    "config null": table(config=pa.array([None], pa.string())),
    "summary binary": table(summary=[b"\xff"]),
    "episodes null": table(episodes=pa.array([None], pa.struct({"global_step": pa.list_(pa.float64())}))),
    "nothing finished": table(),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_without_runs_is_refused_in_one_line_with_code_2(content, study, tmp_path, capsys):
    path = tmp_path / "foreign.parquet"
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif content is None:
        report.main([str(study), "--compact", str(path)])
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        report.main([str(path)])
    output, error = capsys.readouterr()
    *left_out, last = error.splitlines()
    assert end.value.code == 2 and output == "" and "foreign.parquet: must be a folder" in last
    assert len(left_out) <= 1 and all(line.startswith("left out: ") for line in left_out)
    assert not (tmp_path / "foreign").exists()


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_whatever_happens_to_a_file_there_is_no_traceback(change, study, tmp_path, capsys):
    path, rng = tmp_path / "one.parquet", np.random.default_rng(0)
    report.main([str(study), "--compact", str(path)])
    whole = path.read_bytes()
    for _ in range(60):
        broken = bytearray(whole)
        if change == "cut":
            start = rng.integers(len(broken))
            del broken[start : start + rng.integers(1, 200)]
        for i in rng.integers(len(broken), size=3):
            broken[i] = rng.integers(256)
        path.write_bytes(broken)
        try:
            report.read_study([path])
        except SystemExit as end:
            assert end.code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compact", "no/folder/x.parquet"], "--compact no/folder/x.parquet: No such file"),
        (["--compact", "x.parquet", "--normalize"], "--normalize: has no meaning with --compact"),
        (["--compact", "x.parquet", "--output", "y"], "--output: has no meaning with --compact"),
        (["--output", "file/report"], "--output file/report: Not a directory"),
    ],
)
def test_where_nothing_can_be_written_one_line_says_so(words, said, study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        report.main([str(study), *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error.splitlines()[-1] and not (tmp_path / "x.parquet").exists()
