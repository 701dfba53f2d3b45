"""The pages keep their word: commands run, code runs, links lead somewhere, the page of options is up to date.

Shell blocks are run by bash itself, with every program replaced by a note of how it was called. What was called is then
run for real, in this process and at a tiny size.
"""

import ast
import importlib
import math
import re
import runpy
import shutil
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

import bandits
import benchmark
import landscape
import nonconvex_lrrl as nonconvex
from lrrl_utils import checkpoints, roofline, run, speed
from lrrl_utils.command_line import parse_args
from lrrl_utils.scripts import split_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {  # programs that a block may call but this test does not: why
    "pip": "downloads",
    "make": "calls what is run here, or these tests",
    "apt-get": "changes the machine",
    "tensorboard": "serves for ever",
    "wandb": "needs the network",
    "git": "works on the repository",
    "diff": "is no program of ours",
}
NOT_OURS = "cleanrl/"  # scripts of others
MEASURE = "results/atari_feedback/measure.py"
SLOW = {"compile", "track", "capture_video"}  # switches with tests of their own
WRAPPERS = {"srun", "env", "nohup"}

PPO = {"num_steps": 256, "num_minibatches": 4, "update_epochs": 1, "total_timesteps": 1024}
SAC = {"total_timesteps": 110, "learning_starts": 64, "batch_size": 16, "buffer_size": 200}
DQN = {"total_timesteps": 500, "learning_starts": 450, "batch_size": 4, "buffer_size": 600}  # a game must end
DQN |= {"target_network_frequency": 50, "padding": "valid"}
IQN = {**DQN, "num_tau_samples": 4, "num_tau_prime_samples": 4, "num_quantile_samples": 4}
MINATAR = {key: x for key, x in DQN.items() if key != "padding"}
TINY = {"ppo_continuous_lrrl": PPO, "sac_mujoco_lrrl": SAC, "dqn_atari_lrrl": DQN, "iqn_atari_lrrl": IQN}
TINY |= {"dqn_minatar_lrrl": MINATAR, "nonconvex_lrrl": {"num_seeds": 1, "num_starts": 2, "num_steps": 10}}
TINY_IF_GIVEN = {"bandit_interval": 64, "checkpoint_interval": 64, "exploration_steps": 40, "eval_episodes": 0}


STUBS = {  # what a piece of Python leaves to the reader
    "collect_rollout": lambda: ([1.0, 2.0], [3.0]),
    "update": lambda learning_rate: None,
}


# --- blocks -----------------------------------------------------------------------------------------------------------


def blocks_of(text):
    """(language, text) of the fenced blocks of a page, and of the indented ones, which have no language."""
    fenced = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = fenced.findall(text)
    indented = re.findall(r"(?<=\n\n)((?: {4}[^\n]*\n|\n)+)", fenced.sub("", text) + "\n")
    return blocks + [("", re.sub("^ {4}", "", block, flags=re.MULTILINE)) for block in indented if block.strip()]


def is_shell(language, text):
    programs = "|".join(["python", "for", "while", "cp", "mkdir", *WRAPPERS, *NOT_RUN])
    starts = re.search(rf"^\s*([A-Z_]+=\S* )*({programs}) ", text, re.MULTILINE)
    return language in ("sh", "bash", "shell", "console") or (not language and starts)


def find_blocks(wanted):
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}")
        for page in PAGES
        for i, (language, text) in enumerate(blocks_of(page.read_text()))
        if wanted(language, text)
    ]


def calls_of(text, folder):
    """How a shell block calls programs, [[program, argument, …], …]: bash runs it, and finds none of them."""
    notes = folder / "calls"
    note = 'command_not_found_handle() { printf "%s\\0" "$#" "$@" >> "$CALLS"; }'
    text = re.sub(r"<[\w '-]+>", "X", text)  # what a reader puts in
    environment = {"PATH": "/no-such-folder", "CALLS": str(notes)}
    command = [shutil.which("bash"), "-e", "-c", f"{note}\n{text}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    words, calls = notes.read_text().split("\0")[:-1], []
    while words:
        count = int(words.pop(0))
        calls.append(words[:count])
        del words[:count]
    return calls


# --- calls, made small ------------------------------------------------------------------------------------------------


def value_of(words, option):
    return words[words.index(option) + 1] if option in words else None


def as_words(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def shrink(name, words):
    """The words of a command line, and others behind them that make the run a tiny one."""
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    envs = int(value_of(words, "--num-envs") or 1)
    scaled = {"total_timesteps", "learning_starts", "buffer_size"}
    options = {option: x * envs if option in scaled else x for option, x in TINY[name].items()}
    if name == "nonconvex_lrrl":
        return words + as_words(options)
    if "resume" in given:
        options = {option: 10_000 for option in given & {"total_timesteps"}}
    options |= {option: x for option, x in TINY_IF_GIVEN.items() if option in given}
    return words + as_words(options) + [f"--no-{option.replace('_', '-')}" for option in sorted(SLOW & given)]


def run_script(name, words):
    """A program of ours, in this process; its command line is `words`."""
    if name in TINY:
        words = shrink(name, words)
    if name == "report" and any(Path(word).suffix == ".parquet" and has_many_runs(Path(word)) for word in words):
        words = [*words, "--no-figures"]  # which take long and look like those of few runs
    module = importlib.import_module(name)
    assert Path(module.__file__).parent == ROOT
    module.main(words)


def has_many_runs(path):
    return path.exists() and path.stat().st_size > 500_000


def stop_at_checkpoint(monkeypatch):
    """From now on, a run gets a SIGTERM when it has saved a checkpoint."""
    write = checkpoints.write_checkpoint

    def write_and_stop(*arguments):
        write(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "write_checkpoint", write_and_stop)


def prepare_run(name, words, monkeypatch):
    """A run folder for --resume: that of a run that was stopped."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at_checkpoint(patch)
        run_script(name, [*words, "--checkpoint-interval", "64", "--run-dir", "stopped"])
    assert end.value.code == 128 + signal.SIGTERM
    return max(Path("stopped").glob(f"*__{name}__*"), key=lambda folder: folder.stat().st_mtime_ns)


def put_in_place(path, has):
    """Let `path`, a folder as a page names it, be there: a run of these tests, or what is published."""
    path = Path(path)
    if not path.exists() and (ROOT / path).is_dir():  # the runs, without the reports of them
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
        for run_folder in (ROOT / path).iterdir():
            if run_folder.is_dir():
                (path / run_folder.name).symlink_to(run_folder)
    if not path.exists():
        pattern = re.sub(r"__\d+$", "__*", path.name)
        found = [folder for folder in path.parent.glob(pattern) if (folder / has).exists()]
        assert found, f"{path} is what no command before has made"
        return str(found[0])
    return str(path)


def report_on(words):
    """report.py without figures, which have tests of their own, on a published study or on runs of these tests."""
    path, *words = words
    if (ROOT / path).is_file() and "--compact" not in words:
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]  # those of --also
        run_script("report", [str(ROOT / path), *words, "--no-figures", "--output", "published"])
    else:
        run_script("report", [put_in_place(path, "."), *words, "--no-figures"])


def play(words, monkeypatch):
    """play.py without pictures, which take long and need a driver: a model is loaded, and an episode played."""
    import play as module

    folder, make_env = put_in_place(words[0], "model.pt"), module.environments.make_env
    monkeypatch.setattr(module.gym.wrappers, "RecordVideo", lambda env, *_, **__: env)
    monkeypatch.setattr(module.environments, "make_env", lambda args, render: make_env(args))
    module.main([folder, *words[1:], *(["--episodes", "1"] if "--episodes" in words else [])])


def run_measure():
    """The script with one game, two rounds and two steps."""
    source = (ROOT / MEASURE).read_text()
    small = source.replace("range(40)", "range(2)").replace("range(250)", "range(2)")
    small, count = re.subn(r"GAMES = \[.*?\]", 'GAMES = ["Breakout"]', small, flags=re.DOTALL)
    assert (small.count("range(2)"), count) == (2, 1)
    exec(compile(small, MEASURE, "exec"), {"__name__": "__main__"})


def read_options(trials, gpus=0):
    """Stands in for `try_out`, which takes long: what is refused ends the runs, which are of the same options."""
    modules = [importlib.import_module(script.removesuffix(".py")) for script, _ in trials]
    return [(vars(module.parse_args(module.Args, words)), "") for module, (_, words) in zip(modules, trials)]


def run_benchmark(words, done, monkeypatch):
    """The jobs of a grid; then a tiny run of each variant in this process, but for those that differ in numbers."""
    monkeypatch.setattr(benchmark, "try_out", read_options)
    jobs = benchmark.make_jobs(parse_args(benchmark.Args, words))
    variants = {job.variant: job for job in reversed(jobs)}
    for job in variants.values():
        call = tuple("1" if is_number(word) else word for word in [job.script, *job.options])
        if call not in done or job is jobs[0]:  # a report needs a run
            run_script(job.script.removesuffix(".py"), [*job.options, "--run-dir", job.folder])
        done.add(call)


def is_number(word):
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def try_landscape(words):
    """Whether the script takes the command; branches have tests of their own."""
    read_options([split_command(parse_args(landscape.Args, words).command, landscape.SET_HERE)])


@pytest.fixture(scope="module")
def done():
    """(folder, call) of what was run, but for its seed."""
    return set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands of all pages are run."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def at_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    for module, function in ((run, "plot_curves"), (nonconvex, "plot")):
        monkeypatch.setattr(module, function, lambda *_, **__: None)  # takes longer than a tiny run, and has tests
    for name in ("docs", "results/atari_feedback"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for study in ROOT.glob("results/*.parquet"):
        if not (folder / "results" / study.name).exists():  # a command may have made it
            (folder / "results" / study.name).symlink_to(study)
    (folder / "calls").unlink(missing_ok=True)
    for name in TINY:  # `cp` is not run
        importlib.import_module(name)


def without_seed(words):
    words, i = [*words], words.index("--seed") if "--seed" in words else None
    if i is not None:
        del words[i : i + 2]
    return tuple(words)


def make_call(words, done, monkeypatch):
    """Run `words`, a program and its arguments; only one seed of each."""
    while words[0] in WRAPPERS or re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *words = words
    if program in NOT_RUN:
        return
    if program == "cp":
        assert (ROOT / words[0]).is_file()
        return
    assert program in ("python", "python3"), f"{program}: is in no list of this test"
    if words[:2] == ["-m", "timeit"]:
        timeit.main(["-n", "1", "-r", "1", *words[2:]])
        return
    if words[:2] == ["-m", "lrrl_utils.speed"]:  # takes minutes, and has tests
        assert set(words[2:]) <= speed.RUNS.keys()
        return
    if words == ["-m", "lrrl_utils.roofline"]:
        roofline.main(repeats=1)
        return
    if words[:3] == ["-m", "cProfile", "-s"]:  # a script's run, measured
        words = words[4:]
    path, *words = words
    if path.startswith(NOT_OURS):
        return
    assert (ROOT / path).is_file(), f"there is no {path}"
    call = without_seed([path, *words])
    if call in done:
        return
    done.add(call)
    name = path.removesuffix(".py")
    if path == MEASURE:
        run_measure()
    elif name == "benchmark":
        run_benchmark(words, done, monkeypatch)
    elif name == "landscape":
        try_landscape(words)
    elif name == "play":
        play(words, monkeypatch)
    elif name == "report":
        report_on(words)
    elif "--resume" in words:
        i = words.index("--resume")
        task = re.match(r"(?:.*/)?(\w+-v\d)__", words[i + 1])
        stopped = prepare_run(name, ["--env-id", task[1]] if task else [], monkeypatch)
        run_script(name, [*words[:i], "--resume", str(stopped), *words[i + 2 :]])
    else:
        run_script(name, words)


@pytest.mark.parametrize("text", find_blocks(is_shell))
def test_the_commands_of_a_page_run(text, at_work, folder, done, monkeypatch):
    for words in calls_of(text, folder):
        make_call(words, done, monkeypatch)


# --- Python -----------------------------------------------------------------------------------------------------------


def try_bandit(cls):
    bandit = cls([1e-4, 1e-3, 1e-2], seed=1)
    for performance in (0.1, 0.5, 0.2):
        bandit.observe(performance)
        bandit.pull()
        assert bandit.probabilities.sum() == pytest.approx(1)
        bandit.update(performance)


def indented_alike(text):
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("text", find_blocks(lambda language, _: language == "python"))
def test_the_python_code_of_a_page_runs(text, at_work):
    sources = [indented_alike(path.read_text()) for path in ROOT.glob("*.py")]
    excerpt = [re.escape(piece.strip()) for piece in indented_alike(text).split("\n...\n")]
    if any(re.search(r"\n.*\n".join(excerpt), source, re.DOTALL) for source in sources):
        return  # an excerpt, of lines that follow each other but for those at `...`
    stands_alone = re.search(r"^(import|from) ", text, re.MULTILINE)
    namespace = dict(STUBS if stands_alone else vars(bandits))  # else it is to be put into that file
    exec(compile(text, "page", "exec"), namespace)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and issubclass(namespace[node.name], bandits.Bandit):
            try_bandit(namespace[node.name])


# --- pages ------------------------------------------------------------------------------------------------------------


def anchor_of(heading):
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\(.*?\)", "", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(anchor_of, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit_on_a_screen(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 135 and not line.startswith("|")]
    assert not long


def test_the_readme_takes_at_most_250_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_page_of_options_is_what_its_script_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "docs/make_options.py"), run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs/options.md").read_text()


def test_the_pages_name_no_option_that_is_not_there():
    known = set(re.findall(r"`--([\w-]+)`", (ROOT / "docs/options.md").read_text()))
    known |= {"help", "index-url", "logdir", "signal", "time", "xla_cpu_multi_thread_eigen"}  # of others
    others = re.compile(
        r"--(upload-model|hf-entity|anneal-lr|no-anneal-lr|q-lr|policy-lr|bandit-memory)\b"
    )  # CleanRL's
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*\w)(?![\w-])", others.sub("", page.read_text())))
        assert {name for name in named if name.removeprefix("no-") not in known} == set(), page
