"""Populations, piece by piece; that a whole one trains is in test_benchmark.py, for `make soak`."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lrrl_utils import tuner
from lrrl_utils.files import read_json, write_json


@pytest.fixture
def plan(tmp_path):
    words = ["--env-id", "A-v0", "--seed", "3"]
    plan = {"script": "ppo.py", "options": words, "env_id": "A-v0", "seed": 3, "folder": str(tmp_path), "keep": []}
    return plan | {"moments": [0, 100, 200]}


@pytest.fixture
def calls(monkeypatch):
    """What scripts are called with; each call leaves a finished run."""
    calls = []

    def train(script, words, log, own_session):
        assert own_session
        calls.append(words)
        if "--resume" in words:
            run = words[words.index("--resume") + 1]
        else:
            run = words[words.index("--run-dir") + 1] / "A-v0__ppo__1__17"
            run.mkdir()
            write_json(run / "config.json", {"command_line": [str(word) for word in words]})
        step = words[words.index("--total-timesteps") + 1]
        write_json(run / "summary.json", {"status": "finished", "global_step": step})

    monkeypatch.setattr(tuner, "train", train)
    monkeypatch.setattr(tuner, "step_of", lambda run: read_json(run / "summary.json")["global_step"])
    return calls


def test_a_stretch_is_trained_once_and_anew_with_other_options(plan, calls):
    first = tuner.train_stretch(plan, None, 0, 1e-3, 2)
    assert tuner.train_stretch(plan, None, 0, 1e-3, 2) == first and len(calls) == 1
    assert calls[0][:4] == plan["options"] and calls[0][4:8] == ["--seed", 3002, "--learning-rate", 1e-3]
    others = [tuner.train_stretch(plan, None, 0, 1e-3, 1), tuner.train_stretch(plan, None, 0, 1e-4, 2)]
    plan["options"] = [*plan["options"], "--gamma", "0.9"]
    others.append(tuner.train_stretch(plan, None, 0, 1e-3, 2))
    assert len(calls) == 4 and len({first, *others}) == 4


def test_a_stretch_without_the_checkpoint_of_its_end_does_not_count(plan, calls, monkeypatch):
    def train_on_a_full_disk(script, words, log, own_session, train=tuner.train):
        train(script, words, log, own_session)
        log.write_text("no space left\n")

    monkeypatch.setattr(tuner, "train", train_on_a_full_disk)
    monkeypatch.setattr(tuner, "step_of", lambda run: 0)
    with pytest.raises(RuntimeError, match="no space left"):
        tuner.train_stretch(plan, None, 0, 1e-3, 2)
    plan["moments"] = [0, 100]  # nothing goes on from the last one
    assert tuner.train_stretch(plan, None, 0, 1e-3, 2)


def test_a_stretch_goes_on_from_the_one_before_it(plan, calls, monkeypatch):
    branches = []

    def start_branch(snapshot, folder, learning_rate, key):
        folder.mkdir()
        branches.append((snapshot, folder, learning_rate, key))

    monkeypatch.setattr(tuner, "start_branch", start_branch)
    plan["keep"] = ["--keep-replay"]
    first = tuner.train_stretch(plan, None, 0, 1e-3, 2)
    second = tuner.train_stretch(plan, first, 1, 1e-2, 2)
    assert branches == [(first, second, 1e-2, (3, 2, 1))] and second.name == first.name
    assert "--keep-replay" in calls[0]
    assert calls[1] == ["--resume", second, "--env-id", "A-v0", "--total-timesteps", 200]


def test_a_stretch_counts_for_the_episodes_that_ended_in_it(tmp_path):
    (tmp_path / "episodes.csv").write_text("global_step,episodic_return,episodic_length\n90,1,9\n110,2,9\n190,4,9\n")
    assert [tuner.score_of(tmp_path, begin) for begin in (0, 100, 190)] == [pytest.approx(7 / 3), 3, 4]
    (tmp_path / "episodes.csv").write_text("global_step,episodic_return,episodic_length\n")
    write_json(tmp_path / "summary.json", {"status": "diverged", "global_step": 100})
    assert tuner.score_of(tmp_path, 0) == tuner.WORST > -math.inf
    (tmp_path / "episodes.csv").write_text("global_step,episodic_return,episodic_length\n90,1000,9\n")
    assert tuner.score_of(tmp_path, 0) == tuner.WORST  # nobody is to copy it
    (tmp_path / "episodes.csv").write_text("global_step,episodic_return,episodic_length\n")
    write_json(tmp_path / "summary.json", {"status": "finished", "global_step": 100})
    with pytest.raises(RuntimeError, match="no episode has ended"):
        tuner.score_of(tmp_path, 0)


@pytest.mark.parametrize(
    ("config", "rate"), [({"log_rate": -3}, 1e-3), ({"log_rate": -2.69}, 2e-3), ({"rate": 2e-3}, 2e-3)]
)
def test_a_member_goes_on_from_its_checkpoint_stretch_by_stretch(config, rate, plan, monkeypatch, tmp_path):
    reports, trained, pointer = [], [], tmp_path / "pointer"

    def train_stretch(plan, parent, i, rate, member):
        trained.append((parent, i, rate, member))
        run = tmp_path / f"run {i}"
        run.mkdir()
        write_json(run / "summary.json", {"status": "diverged" if i == 2 else "finished"})
        (run / "episodes.csv").write_text(f"global_step,episodic_return,episodic_length\n{100 * i + 50},{i},9\n")
        return run

    def report(metrics, checkpoint):
        with checkpoint.as_directory() as directory:
            reports.append(metrics | {"pointer": read_json(Path(directory, tuner.POINTER))})

    pointer.mkdir()
    write_json(pointer / tuner.POINTER, {"run": "run 0", "stretches": 1})
    context = SimpleNamespace(get_trial_id=lambda: "abc_00002")
    monkeypatch.setattr(tuner, "train_stretch", train_stretch)
    monkeypatch.setattr(tuner.tune, "get_context", lambda: context)
    monkeypatch.setattr(tuner.tune, "get_checkpoint", lambda: tuner.tune.Checkpoint.from_directory(pointer))
    monkeypatch.setattr(tuner.tune, "report", report)
    plan |= {"cwd": str(Path.cwd()), "gpus": 0, "range": (1e-5, 2e-3), "moments": [0, 100, 200, 300, 400]}
    tuner.train_member(config, plan)
    runs = [tmp_path / f"run {i}" for i in (1, 2, 2)]  # which is not trained on once it has diverged
    assert trained == [(Path("run 0"), 1, pytest.approx(rate), 2), (runs[0], 2, pytest.approx(rate), 2)]
    assert [x["score"] for x in reports] == [1.0, tuner.WORST, tuner.WORST]
    assert [x["pointer"] for x in reports] == [{"run": str(x), "stretches": i} for i, x in enumerate(runs, 2)]


def test_the_best_member_is_the_one_that_ended_highest():
    results = [SimpleNamespace(metrics={"score": score}) for score in (1.0, 3.0, 2.0)]
    assert tuner.best_of(results) is results[1]


@pytest.mark.parametrize("name", ["pb2", "pbt"])
def test_first_rates_are_spread_evenly_over_the_logarithm_of_the_range(name):
    scheduler, rates = tuner.make_scheduler(name, 1e-5, 1e-1, seed=3)
    (domain,) = rates.values()
    np.random.seed(0)
    drawn = np.array([domain.sample() for _ in range(1000)])
    logs = drawn if name == "pb2" else np.log10(drawn)
    assert abs(np.mean(logs) + 3) < 0.15 and logs.min() < -4.9 and logs.max() > -1.1 and logs.max() <= -1
    assert scheduler.metric == "score" and scheduler._metric_op == 1.0  # the larger, the better


class FakeTrial(SimpleNamespace):
    """What a scheduler looks at of a trial."""

    __hash__ = object.__hash__

    def __str__(self):
        return self.trial_id


def changes_of(name, order, scores):
    """What a scheduler changes of six members that report in `order`: (who, whom it copies, its new rate).

    `scores` are those of each stretch. Members 0 and 1 are the worst, 4 and 5 the best.
    """
    scheduler, rates = tuner.make_scheduler(name, 1e-5, 1e-1, seed=3)
    (key,) = rates
    first = [-4, -3.5, -3, -2.5, -2, -1.5] if name == "pb2" else [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    trials = [FakeTrial(trial_id=f"a_{i:05}", config={key: float(x)}, status="PAUSED") for i, x in enumerate(first)]
    changes = []

    def exploit(_, trial, other):
        trial.config = scheduler._get_new_config(trial, other)[0]
        changes.append((trial.trial_id, other.trial_id, trial.config[key]))

    scheduler._exploit = exploit
    scheduler._trial_state = {trial: SimpleNamespace(last_checkpoint=True) for trial in trials}
    for stretch, theirs in enumerate(scores, 1):
        for i in order:
            random.random(), np.random.random()  # Ray Tune waits
            result = {"score": theirs[i], "stretches": stretch}
            scheduler._save_trial_state(scheduler._trial_state[trials[i]], stretch, result, trials[i])
        for i in (4, 5):
            scheduler._trial_state[trials[i]].last_checkpoint = True
        for i in (0, 1):
            scheduler._checkpoint_or_exploit(trials[i], None, trials[4:], trials[:2])
            scheduler._trial_state[trials[i]].last_checkpoint = True
    return changes


SCORES = [[1, 2, 3, 4, 5, 6], [2, 3, 5, 6, 9, 8], [3, 5, 6, 9, 12, 11]]


@pytest.mark.filterwarnings("ignore")  # as `train_population` does
@pytest.mark.parametrize("name", ["pb2", "pbt"])
def test_a_population_takes_the_same_way_again_whoever_is_ready_first(name):
    changes = changes_of(name, range(6), SCORES)
    assert changes_of(name, [3, 5, 0, 2, 1, 4], SCORES) == changes
    assert len(changes) == 6 and len({rate for _, _, rate in changes[2:]}) > 1


@pytest.mark.filterwarnings("ignore")
def test_who_has_diverged_does_not_make_all_others_look_alike_to_pb2():
    diverged = [SCORES[0], *([tuner.WORST, *scores[1:]] for scores in SCORES[1:])]
    rates = [[rate for *_, rate in changes_of("pb2", range(6), scores)] for scores in (diverged, SCORES)]
    assert rates[0] == pytest.approx(rates[1], abs=0.01)  # with WORST beside them, the last two would be lower by 0.5


@pytest.mark.parametrize(("rate", "expected"), [(1.2 * 9e-2, 1e-1), (0.8 * 1.1e-5, 1e-5), (1e-3, 1e-3)])
def test_pbt_stays_within_the_range(rate, expected):
    scheduler, _ = tuner.make_scheduler("pbt", 1e-5, 1e-1, seed=3)
    assert scheduler._custom_explore_fn({"rate": rate}) == {"rate": expected}  # called with what PBT has drawn


def test_the_rates_of_a_population_are_those_that_its_best_member_had(tmp_path):
    run, options = tmp_path / "population" / "run", ("--learning-rate", "0.5", "--seed", "3")
    run.mkdir(parents=True)
    words = [*options, "--seed", "3000", "--learning-rate", "0.001", "--resume", "x", "--learning-rate", "0.002"]
    write_json(run / "config.json", {"command_line": words})
    write_json(run / "summary.json", {})
    job = SimpleNamespace(seed=3, folder=str(tmp_path), prefix="A-v0__ppo__3", options=options, stretches=[run])
    args = SimpleNamespace(tuner="pb2", population=4, tuner_range=(1e-4, 1e-2), tuner_rounds=2)
    tuner.keep_best(job, args, run, run.parent)
    (kept,) = tmp_path.glob("A-v0__ppo__3__*")
    assert read_json(kept / "config.json")["rates"] == [0.001, 0.002]


def test_the_best_member_becomes_the_run_of_the_population(plan, calls, tmp_path):
    run = tuner.train_stretch(plan, None, 0, 1e-3, 0)
    (run / "replay.bin").touch(), (run / "checkpoint.pt").touch()
    job = SimpleNamespace(seed=3, folder=str(tmp_path), prefix="A-v0__ppo__3", options=("--seed", "3"), stretches=[run])
    args = SimpleNamespace(tuner="pb2", population=4, tuner_range=(1e-4, 1e-2), tuner_rounds=2)
    tuner.keep_best(job, args, run, Path(run).parent)
    (kept,) = tmp_path.glob("A-v0__ppo__3__*")
    config = read_json(kept / "config.json")
    assert (config["seed"], config["lr_control"], config["learning_rate"]) == (3, "pb2", None)
    assert config["rates"] == [1e-3] and config["command_line"] == ["--seed", "3"]
    assert (config["population"], config["tuner_range"], config["tuner_rounds"]) == (4, [1e-4, 1e-2], 2)
    assert read_json(kept / "summary.json")["lr_control"] == "pb2"
    assert not {path.name for path in kept.iterdir()} & {"replay.bin", "checkpoint.pt"} and not run.parent.exists()
