"""What benchmark.py promises: each run of a grid once, whatever dies on the way; bad input before the first run."""

import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import benchmark
import ppo_continuous_lrrl as ppo
from lrrl_utils.command_line import parse_args
from lrrl_utils.files import lock, read_json, write_json
from lrrl_utils.scripts import status_of
from tests.conftest import ROOT, rows, wait_for

SMALL = "--num-steps 64 --num-minibatches 4 --update-epochs 1 --no-compile"
COMMAND = f"python ppo_continuous_lrrl.py {SMALL} --total-timesteps 1024"
SAC = "python sac_mujoco_lrrl.py --batch-size 8 --learning-starts 20 --no-compile --total-timesteps 1024"


@pytest.fixture
def driver(tmp_path):
    """driver(*words) starts benchmark.py as a user does; its study is tmp_path / "study"."""
    processes = []

    def run(*words):
        command = [sys.executable, str(ROOT / "benchmark.py"), "--run-dir", "study", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "BROKEN": str(tmp_path / "broken")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heed_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs of a shell may not
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heed_ctrl_c, **pipes)
        processes.append(process)
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def training(study):
    """The processes that train runs of a study."""
    found = []
    for process in psutil.process_iter():
        try:
            is_run = process.cmdline()[1].endswith("_lrrl.py") and process.cwd() == str(study.parent)
        except (psutil.Error, IndexError):
            continue
        found += [process] if is_run and process.status() != psutil.STATUS_ZOMBIE else []
    return found


def has_checkpoint(study, task):
    return any(study.glob(f"*/{task}__*/checkpoint.pt")) and bool(training(study))


def test_a_grid_goes_on_after_kills_of_workers_and_driver_and_names_what_fails(
    driver, tmp_path, train, monkeypatch, capsys
):
    study = tmp_path / "study"
    tasks = ["Pendulum-v1", "tests.toy_envs:Breaks-v0"]
    words = ["--command", f"ppo_continuous_lrrl.py {SMALL} --total-timesteps 6400", "--env-ids", *tasks]
    words += ["--variant", "a fixed rate=--lr-control constant", "--num-seeds", "1", "--start-seed", "7"]
    first = driver(*words, "--workers", "1")
    wait_for(lambda: has_checkpoint(study, tasks[0]), first)
    (process,) = training(study)
    assert process.nice() == os.nice(0)  # as if it had been started by hand
    process.parent().kill()  # the worker of Ray
    wait_for(lambda: not process.is_running(), first)
    wait_for(lambda: has_checkpoint(study, tasks[0]), first)
    (process,) = training(study)
    assert "--resume" in process.cmdline()
    first.kill()
    process.wait(120)  # no run outlives its driver
    (folder,) = study.glob("a fixed rate/Pendulum-v1__*/")
    assert status_of(folder) != "running"  # it has saved a checkpoint of its own, if it was not faster
    log = next((study / "a fixed rate").glob("Pendulum-v1__*.log")).read_text()
    assert log.count("step 64 of 6400") == 1  # it was begun once

    second = driver(*words, "--workers", "2")
    output, errors = second.communicate(timeout=600)
    assert second.returncode == 1, errors
    assert "1 of 2 runs have ended, see study" in output and "100%, 1 of 2 runs" in output
    failed = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "Breaks-v0 seed 7: exit code 1, RuntimeError: the simulator broke" in failed[0]
    options = f"--env-id {tasks[0]} --seed 7 {SMALL} --total-timesteps 6400 --lr-control constant"
    whole = train(ppo.main, f"{options} --checkpoint-interval 640")
    (folder,) = study.glob("a fixed rate/Pendulum-v1__*/")
    assert rows(folder / "episodes.csv") == rows(whole.path / "episodes.csv")
    (broken,) = study.glob("a fixed rate/tests.toy_envs:Breaks-v0__*/")
    assert status_of(broken) == "failed" and len(read_json(broken / "config.json")["resumed"]) == 1  # tried again

    monkeypatch.chdir(tmp_path)
    left_over = study / f"a fixed rate/.{folder.name.rpartition('__')[0]}"
    left_over.mkdir()  # by a population, for which "a fixed rate" stands here, whose folder was to go as a kill came
    benchmark.main(["--run-dir", "study", *words[:4], *words[5:]])
    assert not left_over.exists()
    assert capsys.readouterr().out.endswith("all 1 runs have ended, see study\n")


in_soak = pytest.mark.skipif(
    "KILLS" not in os.environ or "SCRIPT" in os.environ, reason="takes minutes: make soak runs it"
)


@pytest.mark.parametrize(
    "tuner, command, killed",
    [
        ("pb2", COMMAND, False),
        pytest.param("pb2", COMMAND, True, marks=in_soak),
        pytest.param("pbt", SAC, False, marks=in_soak),  # with a replay
        pytest.param("pbt", SAC, True, marks=in_soak),
    ],
)
def test_a_population_leaves_the_run_of_its_best_member_even_if_it_is_killed(tuner, command, killed, driver, tmp_path):
    study = tmp_path / "study"
    words = ["--command", command, "--env-ids", "Pendulum-v1", "--num-seeds", "1", "--start-seed", "3"]
    words += ["--tuner", tuner, "--population", "2", "--tuner-rounds", "2", "--workers", "2"]
    process = driver(*words)
    if killed:
        wait_for(lambda: [*study.glob(f"{tuner}/.*/0_*/*/summary.json")], process)
        process.kill()
        process.wait()
        while training(study):  # they save a checkpoint
            time.sleep(0.1)
        process = driver(*words)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert f"4 of 4 stretches, 00:00 left\n{tuner} Pendulum-v1 seed 3 has ended\n1 of 1 runs have ended" in output
    (folder,) = (study / tuner).iterdir()
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    assert (config["lr_control"], config["seed"], config["population"]) == (tuner, 3, 2)
    assert config["stretches"] == 4  # those that were there went on; who has taken the other's agent has one of its own
    assert len(config["rates"]) == 2 and all(3e-5 <= rate <= 3e-3 for rate in config["rates"])
    assert (summary["status"], summary["global_step"]) == ("finished", 1024)
    assert [row[0] for row in rows(folder / "episodes.csv")] == ["200", "400", "600", "800", "1000"]
    assert not [*folder.glob("checkpoint*"), *folder.glob("replay*")]


@pytest.fixture
def cluster(monkeypatch):
    """The address of a Ray that somebody else has started."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it depends on whether a local Ray has left a token here
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    head = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, head)
        time.sleep(5)  # until its processes know each other
        yield f"127.0.0.1:{port}"
    finally:
        for process in psutil.Process(head.pid).children(recursive=True):
            process.kill()
        head.kill()
        head.wait()


def test_a_cluster_that_is_there_trains_the_runs(driver, cluster, tmp_path):
    words = ["--command", COMMAND, "--env-ids", "Pendulum-v1", "--num-seeds", "1"]
    process = driver(*words, "--ray-address", cluster, "--variant", "mine=--bandit uniform")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "1 of 1 runs have ended" in output
    (folder,) = (tmp_path / "study" / "mine").glob("*/")
    assert status_of(folder) == "finished" and read_json(folder / "config.json")["device"] == "cpu"


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):  # what Ray is to see is written there
        yield ["--run-dir", "study", "--env-ids", "Pendulum-v1", "--command", COMMAND]


def test_a_dry_run_prints_the_commands_and_makes_nothing(study, capsys, tmp_path):
    variants = ["--variant", "a=", "--variant", "b c=--bandit uniform"]
    benchmark.main([*study, *variants, "--num-seeds", "2", "--dry-run"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [words[-1] for words in lines] == ["study/a", "study/b c", "study/a", "study/b c"]
    assert [words[words.index("--seed") + 1] for words in lines] == ["1", "1", "2", "2"]
    assert all(words[:2] == ["python", str(ROOT / "ppo_continuous_lrrl.py")] for words in lines)
    assert "uniform" in lines[1] and "uniform" not in lines[2] and "102" in lines[0]  # a checkpoint each tenth
    assert not list(tmp_path.iterdir())


def test_a_dry_run_leaves_out_what_has_ended_and_goes_on_with_what_has_a_checkpoint(study, capsys, tmp_path):
    words = [*study[:-2], "--command", "sac_mujoco_lrrl.py --keep-replay", "--variant", "a=", "--num-seeds", "3"]
    begun = {"command_line": ["--env-id", "Pendulum-v1"]}
    for seed, status in ((1, "finished"), (2, "interrupted")):
        name = f"Pendulum-v1__sac_mujoco_lrrl__{seed}__17"
        run = make_run(tmp_path / "study" / "a", status, 40, name=name, checkpoint=seed == 2)
        write_json(run / "config.json", begun)
    benchmark.main([*words, "--tuner", "pb2", "--dry-run"])
    output, errors = capsys.readouterr()
    second, third = (shlex.split(line) for line in output.splitlines())
    assert second[2:4] == ["--resume", "study/a/Pendulum-v1__sac_mujoco_lrrl__2__17"] and "--resume" not in third
    assert second[4:] == ["--env-id", "Pendulum-v1", "--keep-replay"]  # which is to be, though it was begun without
    assert third[third.index("--seed") + 1] == "3"
    assert errors.splitlines() == [
        f"left out: pb2 Pendulum-v1 seed {seed}, whose 4 members need Ray" for seed in (1, 2, 3)
    ]


def test_options_are_tried_out_where_the_runs_will_be(study, monkeypatch):
    tried = []

    def try_out(trials, gpus):
        tried.append(gpus)
        raise SystemExit(2)

    monkeypatch.setattr(benchmark, "try_out", try_out)
    for words in ([], ["--gpus-per-run", "0.5"]):
        with pytest.raises(SystemExit):
            benchmark.main([*study, *words])
    assert tried == [0, 0.5]


def make_job(folder, **changes):
    fields = {
        "variant": "",
        "env_id": "A-v0",
        "seed": 1,
        "script": "ppo_continuous_lrrl.py",
        "exp_name": "ppo",
        "options": ("--seed", "1"),
    }
    fields |= {
        "checkpoint_interval": 5,
        "folder": str(folder),
        "prefix": "A-v0__ppo__1",
        "timesteps": 100,
        "rollout": 1,
        "has_replay": False,
    }
    return benchmark.Job(**fields | changes)


def make_run(folder, status, step, name="A-v0__ppo__1__17", checkpoint=False):
    run = folder / name
    run.mkdir(parents=True)
    write_json(run / "config.json", {"command_line": ["--seed", "1", "--run-dir", "x"]})
    write_json(run / "summary.json", {"status": status, "global_step": step})
    if checkpoint:
        (run / "checkpoint.pt").touch()
    return run


def test_a_job_is_begun_resumed_or_done(tmp_path):
    job = make_job(tmp_path)
    assert job.words == ["--seed", "1", "--checkpoint-interval", "5", "--run-dir", str(tmp_path)]
    make_run(tmp_path, "finished", 100, name="A-v0__ppo__11__17")  # that of another seed
    assert (job.has_ended, job.global_step) == (False, 0)
    run = make_run(tmp_path, "interrupted", 40, checkpoint=True)
    assert job.words == ["--resume", str(run), "--env-id", "A-v0"] and job.global_step == 40
    (run / "checkpoint.pt").rename(run / "checkpoint.prev.pt")  # as a kill in the middle of a save may leave it
    assert job.words == ["--resume", str(run), "--env-id", "A-v0"]
    (run / "summary.json").unlink()
    assert (job.has_ended, job.global_step) == (False, 0)
    write_json(run / "summary.json", {"status": "diverged", "global_step": 60})
    assert (job.has_ended, job.global_step) == (True, 100)


def test_the_runs_of_a_job_are_found_by_any_name(tmp_path):
    make_run(tmp_path, "running", 1, name="A[1]__x__1__17")
    make_run(tmp_path, "running", 1, name="A1__x__1__17")
    assert [run.name for run in make_job(tmp_path, prefix="A[1]__x__1").runs] == ["A[1]__x__1__17"]


def test_a_run_without_a_checkpoint_is_begun_anew_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cwd").mkdir()
    old, calls, waited = make_run(tmp_path / "study", "running", 3), [], []

    def train(script, words, log, own_session):
        calls.append((script, words, log, own_session, Path.cwd()))
        make_run(tmp_path / "study", "finished", 100, name="A-v0__ppo__1__18")

    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark, "wait_until_free", waited.append)
    job = make_job(tmp_path / "study")
    words = job.words
    assert benchmark.run(job, 0.0, str(tmp_path / "cwd")) == ""
    assert calls == [("ppo_continuous_lrrl.py", words, job.log, True, tmp_path / "cwd")]
    assert not old.exists() and waited[0] == old


def test_a_run_that_fails_twice_is_named_with_its_last_words(tmp_path, monkeypatch):
    calls = []

    def train(script, words, log, own_session):
        calls.append(words)
        log.write_text("something\nRuntimeError: the simulator broke\n")
        make_run(tmp_path, "failed", 40, name=f"A-v0__ppo__1__{len(calls)}", checkpoint=True)
        return 1

    monkeypatch.setattr(benchmark, "train", train)
    job = make_job(tmp_path)
    assert benchmark.run(job, 0.0, os.getcwd()) == f"exit code 1, RuntimeError: the simulator broke (see {job.log})"
    assert ["--resume" in words for words in calls] == [False, True]


@pytest.fixture
def jobs_of(monkeypatch):
    """jobs_of(*words) makes jobs of the command line; what scripts make of theirs is by_word, {a word: arguments}."""
    monkeypatch.setattr(benchmark, "check_begun", None)

    def jobs_of(*words, by_word=()):
        def try_out(trials, gpus):
            arguments = {"total_timesteps": 100, "exp_name": "ppo", "num_envs": 2, "num_steps": 8, "compile": True}
            found = [[x for word, x in dict(by_word).items() if word in words] for _, words in trials]
            return [(arguments | (changes[0] if changes else {}), "") for changes in found]

        monkeypatch.setattr(benchmark, "try_out", try_out)
        return benchmark.make_jobs(parse_args(benchmark.Args, ["--env-ids", "A-v0", *words]))

    return jobs_of


def test_a_variant_decides_over_the_command(jobs_of):
    (job,) = jobs_of(
        "--num-seeds", "1", "--command", "ppo_continuous_lrrl.py --gamma 0.9", "--variant", "a=--gamma 0.8"
    )
    assert job.options == ("--gamma", "0.9", "--gamma", "0.8", "--env-id", "A-v0", "--seed", "1")


def test_a_job_is_as_long_and_has_the_name_that_its_options_make_it(jobs_of):
    words = ["--num-seeds", "1", "--variant", "a=", "--variant", "b=--exp-name mine"]
    a, b = jobs_of(*words, by_word={"mine": {"exp_name": "mine", "total_timesteps": 50}})
    assert (a.prefix, a.timesteps, a.checkpoint_interval, a.rollout) == ("A-v0__ppo__1", 100, 10, 16)
    assert (b.prefix, b.timesteps, b.checkpoint_interval, b.has_replay) == ("A-v0__mine__1", 50, 5, False)
    for interval in (0, 7):
        assert [x.checkpoint_interval for x in jobs_of(*words, "--checkpoint-interval", str(interval))] == [
            interval
        ] * 2


@pytest.mark.parametrize("compiles", [True, False])
def test_a_population_is_as_long_as_its_members_together_and_compiles_if_they_would(compiles, jobs_of):
    by_word = {"constant": {"compile": compiles, "keep_replay": False}}
    run, population = jobs_of("--num-seeds", "1", "--variant", "a=", "--tuner", "pb2", by_word=by_word)
    assert (run.variant, run.timesteps, run.options) == ("a", 100, ("--env-id", "A-v0", "--seed", "1"))
    assert (population.variant, population.timesteps, population.has_replay) == ("pb2", 400, True)
    assert ("--compile" if compiles else "--no-compile") in population.options


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_grid_when_runs_have_saved(signum, tmp_path, monkeypatch, capsys):
    calls, run = [], make_run(tmp_path, "running", 1)
    descriptor = lock(run)

    def shutdown():
        threading.Timer(0.3, lambda: (calls.append("saved"), os.close(descriptor))).start()

    monkeypatch.setattr(benchmark, "start_ray", lambda args: SimpleNamespace(shutdown=shutdown))

    def run_grid(*_):
        try:
            signal.raise_signal(signum)
        except SystemExit:
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signum)).start()  # once more
            raise SystemExit(1) from None  # as Ray does

    monkeypatch.setattr(benchmark, "run_grid", run_grid)
    with pytest.raises(SystemExit) as end:
        benchmark.work(SimpleNamespace(tuner=None), [make_job(tmp_path)])
    assert end.value.code == 128 + signum and calls == ["saved"]
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_a_signal_at_the_very_end_is_told_too(tmp_path, monkeypatch, capsys):
    shutdowns = []

    def shutdown():
        shutdowns.append(1)
        if len(shutdowns) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(benchmark, "start_ray", lambda args: SimpleNamespace(shutdown=shutdown))
    monkeypatch.setattr(benchmark, "run_grid", lambda *_: {"x": "broke"})
    with pytest.raises(SystemExit) as end:
        benchmark.work(SimpleNamespace(tuner=None), [])
    assert end.value.code == 143 and "the same command goes on" in capsys.readouterr().err


def test_what_a_population_has_left_behind_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "start_ray", lambda args: SimpleNamespace(shutdown=lambda: None))
    monkeypatch.setattr(benchmark, "run_grid", lambda *_: {})
    job = make_job(tmp_path, variant="pb2")
    make_run(tmp_path, "finished", 100)
    (job.population_folder / "tune").mkdir(parents=True)
    assert benchmark.work(SimpleNamespace(tuner="pb2"), [job]) == {} and not job.population_folder.exists()


def test_populations_are_trained_once_and_those_that_fail_are_named(tmp_path, monkeypatch, capsys):
    trained = []

    def train_population(job, args):
        trained.append(job.seed)
        if job.seed == 4:
            raise RuntimeError("Ray Tune\nbroke")
        return "it broke" if job.seed == 3 else ""

    monkeypatch.setitem(sys.modules, "lrrl_utils.tuner", SimpleNamespace(train_population=train_population))
    monkeypatch.setattr(benchmark, "start_ray", lambda args: SimpleNamespace(shutdown=lambda: None))
    monkeypatch.setattr(benchmark, "run_grid", lambda ray, args, jobs: {job.title: "failed" for job in jobs})
    make_run(tmp_path, "finished", 100)
    jobs = [make_job(tmp_path, variant="pb2", seed=seed, prefix=f"A-v0__ppo__{seed}") for seed in (1, 4, 3, 2)]
    failed = {"pb2 A-v0 seed 4": "RuntimeError: broke", "pb2 A-v0 seed 3": "it broke"}
    assert benchmark.work(SimpleNamespace(tuner="pb2"), jobs) == failed
    assert trained == [4, 3, 2]
    assert capsys.readouterr().out == "pb2 A-v0 seed 2 has ended\n"


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, ""), (0.25, "3")])
def test_a_run_that_asks_for_no_gpu_sees_none(gpus, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Ray has set it
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "finished", 100)
    assert benchmark.run(make_job(tmp_path), gpus, os.getcwd()) == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_run_that_ray_loses_is_reported_with_the_cause(tmp_path, monkeypatch):
    def get(_):
        raise ValueError("ray::run() (pid=1)\n  File x\nFileNotFoundError: no such file")

    ray = SimpleNamespace(cluster_resources=dict, exceptions=SimpleNamespace(RayError=ValueError), get=get)
    ray.remote = lambda **_: lambda function: SimpleNamespace(remote=lambda job, gpus, cwd: job.seed)
    ray.wait = lambda references, timeout: (references, [])
    failed = benchmark.run_grid(ray, SimpleNamespace(gpus_per_run=0, workers=0), [make_job(tmp_path)])
    assert failed == {"A-v0 seed 1": "ValueError: FileNotFoundError: no such file"}


def test_a_folder_begun_with_other_options_is_refused(tmp_path, capsys):
    run = make_run(tmp_path, "running", 40)
    args = SimpleNamespace(tuner="pb2", population=4, tuner_range=(1e-4, 1e-3), tuner_rounds=10)
    benchmark.check_begun(args, [make_job(tmp_path)])
    with pytest.raises(SystemExit) as end:
        benchmark.check_begun(args, [make_job(tmp_path, options=("--seed", "1", "--gamma", "0.9"))])
    assert end.value.code == 2 and "was begun with ppo --seed 1" in capsys.readouterr().err
    write_json(run / "config.json", {"command_line": ["--gamma", "0.9", "--seed", "1"]})
    job = make_job(tmp_path, variant="v", options=("--seed", "2", "--gamma", "0.9"), prefix="A-v0__ppo__2")
    benchmark.check_begun(args, [job])  # another seed, and the same options in another order
    others = [
        "--checkpoint-interval",
        "5",
        "--run-dir",
        "x",
        "--compile",
        "--resume",
        "x/y",
        "--env-id",
        "A-v0",
        "--track",
    ]
    write_json(run / "config.json", {"command_line": ["--gamma", "0.9", "--seed", "1", *others]})
    benchmark.check_begun(args, [job])  # the script has decided to compile, and the run was resumed
    for more in (["--gae-lambda", "0.9"], ["--gamma", "0.8"], ["--total-timesteps", "5"]):
        write_json(run / "config.json", {"command_line": ["--gamma", "0.9", "--seed", "1", *others, *more]})
        with pytest.raises(SystemExit) as end:
            benchmark.check_begun(args, [job])
        assert end.value.code == 2 and shlex.join(more) in capsys.readouterr().err
    write_json(run / "config.json", {"command_line": ["--gamma", "0.9", "--compile", "--seed", "1"]})
    uncompiled = make_job(tmp_path, variant="v", options=("--gamma", "0.9", "--no-compile", "--seed", "2"))
    with pytest.raises(SystemExit):
        benchmark.check_begun(args, [uncompiled])
    assert "--compile" in capsys.readouterr().err
    write_json(run / "config.json", {"command_line": ["--gamma", "0.9", "--seed", "1"]})
    job = make_job(tmp_path, variant="v", options=("--seed", "2", "--gamma", "0.8"), prefix="A-v0__ppo__2")
    with pytest.raises(SystemExit) as end:
        benchmark.check_begun(args, [job])
    assert end.value.code == 2 and "was begun with ppo --gamma 0.9" in capsys.readouterr().err
    job = make_job(tmp_path, options=("--seed", "1", "--gamma", "0.8"), prefix="A-v0__another_script__1")
    benchmark.check_begun(args, [job])  # without variants, the options name them
    write_json(run / "config.json", {"command_line": ["--gamma", "0.8", "--seed", "1"], "exp_name": "sac"})
    with pytest.raises(SystemExit) as end:
        benchmark.check_begun(args, [make_job(tmp_path, variant="v", options=("--seed", "1", "--gamma", "0.8"))])
    assert end.value.code == 2 and "was begun with sac --gamma 0.8" in capsys.readouterr().err
    write_json(run / "config.json", {"command_line": [5]})
    with pytest.raises(SystemExit) as end:
        benchmark.check_begun(args, [make_job(tmp_path)])
    assert end.value.code == 2 and "was begun with ppo 5" in capsys.readouterr().err
    for damaged in ({"command_line": None}, {"command_line": 5}, [1]):
        write_json(run / "config.json", damaged)
        with pytest.raises(SystemExit) as end:
            benchmark.check_begun(args, [make_job(tmp_path)])
        assert end.value.code == 2 and "holds no config.json of a run" in capsys.readouterr().err
    population = {"population": 4, "tuner_range": [1e-4, 1e-3], "tuner_rounds": 10}
    write_json(run / "config.json", {"command_line": ["--seed", "1"]} | population)
    job = make_job(tmp_path, variant="pb2")
    benchmark.check_begun(args, [job])
    for name, x in (("population", 5), ("tuner_range", (1e-4, 1e-2)), ("tuner_rounds", 5)):
        with pytest.raises(SystemExit) as end:
            benchmark.check_begun(SimpleNamespace(**vars(args) | {name: x}), [job])
        assert end.value.code == 2 and f"--{name.replace('_', '-')}: " in capsys.readouterr().err


def test_the_driver_refuses_a_folder_begun_with_other_options(study, refused, tmp_path):
    make_run(tmp_path / "study", "running", 40, name="Pendulum-v1__ppo_continuous_lrrl__1__17")
    assert "was begun with ppo_continuous_lrrl --seed 1" in refused(benchmark.main, study)


def test_progress_tells_what_is_done_and_how_long_the_rest_takes(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    make_run(tmp_path, "finished", 100)
    job = make_job(tmp_path, prefix="B-v0__ppo__1")
    progress = benchmark.Progress([make_job(tmp_path), job])
    make_run(tmp_path, "running", 20, name="B-v0__ppo__1__17")
    clock[0] = 60.0
    progress.update([job])
    assert capsys.readouterr().out == "60%, 1 of 2 runs, 04:00 left\n"  # 20 timesteps a minute, 80 are left
    progress.update([job])
    assert capsys.readouterr().out == ""  # not twice within half a minute
    clock[0] = 91.0
    progress.update([job])
    assert capsys.readouterr().out == "60%, 1 of 2 runs, 06:04 left\n"
    progress.update([], [job])  # it has failed
    assert capsys.readouterr().out == "100%, 1 of 2 runs, 00:00 left\n"
    make_run(tmp_path, "finished", 100, name="C-v0__ppo__1__17")
    progress = benchmark.Progress([make_job(tmp_path), third := make_job(tmp_path, prefix="C-v0__ppo__1")])
    progress.update([], [third])
    assert capsys.readouterr().out == "100%, 2 of 2 runs\n"
    assert progress.bar.total == 200
    progress.update([], [make_job(tmp_path, prefix="B-v0__ppo__1")])
    assert progress.bar.total == progress.total < 200  # a bar comes to its end, too


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--command", "nowhere_lrrl.py"], "must begin with one of dqn_atari_lrrl.py dqn_minatar_lrrl.py"),
        (["--command", "nonconvex_lrrl.py"], "nonconvex_lrrl.py is no training script"),
        (["--command", f"{COMMAND} --seed 3"], "--seed is set here"),
        (["--command", f"{COMMAND} --env-id A-v0"], "--env-id is set here"),
        (["--variant", "--lr-control constant"], "--variant"),
        (["--variant", "constant"], "must be NAME=OPTIONS"),
        (["--variant", "=--lr-control constant"], "must be NAME=OPTIONS"),
        *((["--variant", f"{name}="], "is that of a folder") for name in ("../up", "a/b", ".a", "a ", "a\tb")),
        (["--variant", "a" * 201 + "="], "is too long for a folder"),
        (["--command", "ppo_continuous_lrrl.py --help"], "ends before its run"),
        (["--variant", "a=--resume x"], "--resume is set here"),
        (["--variant", "a=--checkpoint-interval 5"], "--checkpoint-interval is set here"),
        (["--tuner", "pb2", "--tuner-range", "1e-3", "1e-3"], "--tuner-range 0.001 0.001: must be LOW HIGH"),
        (["--variant", "a=", "--variant", "a=--gamma 0.9"], "there are two variants a"),
        (["--variant", "pb2=", "--tuner", "pb2"], "there are two variants pb2"),
        (["--variant", "a=--run-dir x"], "--run-dir is set here"),
        (["--variant", "a=--gamma '0.9"], "No closing quotation"),
        (["--variant", "a=", "--variant", "b=--gamma 2"], "--variant b, Pendulum-v1: --gamma 2.0: must be in [0, 1]"),
        (["--variant", "a=--num-minibatches 3"], "--num-minibatches 3: must divide"),
        (["--variant", "a=--nonsense"], "--variant a, Pendulum-v1: "),
        (["--env-ids", "Pendulum-v1", "Nowhere-v0"], "Nowhere-v0: --env-id Nowhere-v0"),
        (["--env-ids", "Pendulum-v1", "Pendulum-v1"], "names a task twice"),
        (["--start-seed", "4294967294", "--num-seeds", "3"], "--num-seeds 3: the last seed is too large"),
        (["--start-seed", "4294967", "--num-seeds", "2", "--tuner", "pb2"], "the last seed is too large"),
        (["--ray-address", ""], "--ray-address: must be auto or HOST:PORT"),
        (["--num-seeds", "0"], "--num-seeds 0: must be in [1, inf)"),
        (["--tuner", "pb2", "--tuner-range", "1e-2", "1e-3"], "--tuner-range 0.01 0.001: must be LOW HIGH"),
        (["--population", "8"], "--population: has no meaning without --tuner pb2 or pbt"),
        (["--gpus-per-run", "-1"], "--gpus-per-run"),
        (["--gpus-per-run", "1.5"], "must be a whole number, or below 1"),
        (
            ["--tuner", "pb2", "--command", "sac_mujoco_lrrl.py --total-timesteps 40000"],
            "a first stretch of 4000 timesteps",
        ),
        (
            ["--tuner", "pbt", "--env-ids", "ALE/Pong-v5", "--command", "dqn_atari_lrrl.py --preset cleanrl"],
            "must not depend on the length",
        ),
    ],
)
def test_bad_input_is_one_line_with_code_2_and_no_folder(words, said, refused, study, tmp_path):
    assert said in refused(benchmark.main, [*study, *words])
    assert not list(tmp_path.iterdir())


def test_no_cluster_at_all_is_told(study, refused, monkeypatch):
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: None)  # as if no other Ray ran here
    monkeypatch.setattr("ray._private.services._cached_find_gcs_addresses", functools.cache(set))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "--ray-address auto: " in refused(benchmark.main, [*study, "--ray-address", "auto"])


def ignores_ctrl_c(process):
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(mask, 16) >> signal.SIGINT - 1 & 1


def test_ctrl_c_before_the_first_run_is_one_line(driver, tmp_path):
    process = driver("--env-ids", "Pendulum-v1", "--command", COMMAND)
    children = psutil.Process(process.pid).children
    wait_for(lambda: any(map(ignores_ctrl_c, children())), process)  # options are tried out
    for x in [*children(), process]:  # as a terminal does
        x.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped before the first run\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense:x"])
def test_a_cluster_that_is_not_there_is_named(address, study, refused, tmp_path):
    assert f"--ray-address {address}: " in refused(benchmark.main, [*study, "--ray-address", address])
    assert not list(tmp_path.glob("study/*"))


def test_gpus_that_ray_does_not_find_are_refused_before_the_first_run(study, refused, tmp_path, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"GPU": 128.0}}]
    monkeypatch.setattr("ray.init", lambda *_, **__: None)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    said = refused(benchmark.main, [*study, "--gpus-per-run", "64"])
    assert "--gpus-per-run 64: no machine has more than 0 GPUs" in said and not list(tmp_path.glob("study/*"))


def test_a_folder_has_one_benchmark_at_a_time(study, refused, tmp_path):
    (tmp_path / "study").mkdir()
    descriptor = lock(tmp_path / "study")
    assert "a process is still working there" in refused(benchmark.main, study)
    os.close(descriptor)


def test_the_sweep_for_wandb_has_options_that_its_script_understands():
    sweep = yaml.safe_load((ROOT / "docs/sweep.yaml").read_text())
    chosen = {name: {"value": x.get("value") or x["values"][-1]} for name, x in sweep["parameters"].items()}
    words = create_sweep_command_args({"args": chosen})["args"]  # as its agent does
    assert (sweep["program"], sweep["command"][-2:]) == ("ppo_continuous_lrrl.py", ["--track", "${args}"])
    args = parse_args(ppo.Args, ["--track", *words])
    assert (args.env_id, args.bandit, args.seed, args.total_timesteps) == ("Hopper-v5", "uniform", 5, 300_000)
