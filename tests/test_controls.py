"""What all training scripts promise alike of `--lr-control`, `--optimizer`, `--rollback` and the choice of arms."""

import io
import math

import numpy as np
import pytest
import torch

import dqn_atari_lrrl as dqn
import dqn_minatar_lrrl as minatar
import iqn_atari_lrrl as iqn
import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from bandits import Bandit, Rounds
from lrrl_utils.run import Run
from lrrl_utils.schedules import scheduled_rate
from lrrl_utils.state import capture
from peak import Peak
from tests import toy_envs

ATARI = "--padding valid --buffer-size 500 --learning-starts 40 --exploration-steps 100 --batch-size 4"
ATARI += " --bandit-interval 40"
STEPS = "--env-id tests.toy_envs:StepCounter-v0 --bandit-interval 40"
SCRIPTS = {  # module, options of a small run, timesteps of a step of the schedule
    "dqn": (dqn, ATARI, 1),
    "dqn of 4 games": (dqn, f"{ATARI} --num-envs 4", 4),
    "ppo": (ppo, f"{STEPS} --num-steps 20 --num-minibatches 2 --update-epochs 2", 20),
    "ppo of 2 environments": (ppo, f"{STEPS} --num-envs 2 --num-steps 20 --num-minibatches 2 --update-epochs 1", 40),
    "sac": (sac, f"{STEPS} --batch-size 8 --learning-starts 20", 1),
    "sac of 4 environments": (sac, f"{STEPS} --batch-size 8 --learning-starts 20 --num-envs 4", 4),
}
TOTAL = 240
CONTROLS = {  # options, rate as a function of timesteps
    "--lr-control constant --learning-rate 1e-3": lambda t: 1e-3,
    "--lr-control linear --learning-rate 1e-3": lambda t: 1e-3 * (1 - t / TOTAL),
    "--lr-control exponential --learning-rate 1e-3 --lr-decay-rate 0.01": lambda t: 1e-3 * math.exp(-0.01 * t),
    "--lr-control cosine --learning-rate 1e-3": lambda t: 1e-3 * (1 + math.cos(math.pi * t / TOTAL)) / 2,
    "--lr-control cyclic --cyclic-base-lr 1e-4 --cyclic-max-lr 1e-3 --cyclic-half-period 50": lambda t: (
        1e-4 + 9e-4 * (1 - abs(1 - t / 50 % 2))
    ),
}


@pytest.fixture(params=["dqn", "ppo", "sac"])
def script(request, monkeypatch):
    """A script's module, the options of a small run, and the timesteps of an iteration of its loop.

    IQN's loop is that of DQN, see tests/test_dqn_atari.py.
    """
    module, options, timesteps = SCRIPTS[request.param]
    toy_envs.StepCounter.total = 0
    monkeypatch.setattr("lrrl_utils.atari.make_envs", lambda args, n: toy_envs.TinyGame(n, length=100))
    return module, f"{options} --total-timesteps {TOTAL}", timesteps


def cases(shared, for_ppo, scripts=("dqn", "ppo", "sac")):
    """`shared` for each of `scripts`, whose loops are their own; `for_ppo`, which shared code decides, for PPO."""
    return [(script, shared) for script in scripts] + [("ppo", value) for value in for_ppo]


@pytest.fixture
def optimizer_steps(monkeypatch):
    """(class, learning rate, optimizer) of every step of an optimizer but its first, that of `make_moments`."""
    steps = []
    for cls in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD):

        class Spy(cls):
            def step(self, closure=None):
                if self.state:
                    steps.append((type(self).__mro__[1].__name__, self.param_groups[0]["lr"].item(), self))
                return super().step(closure)

        monkeypatch.setattr(torch.optim, cls.__name__, Spy)
    return steps


@pytest.mark.parametrize("options", CONTROLS)
def test_a_scripts_options_give_the_rates_of_the_formulas(options, script):
    module, small, _ = script
    args = module.parse_args(module.Args, [*small.split(), *options.split()])
    for t in range(TOTAL + 1):
        assert scheduled_rate(args, t) == pytest.approx(CONTROLS[options](t), rel=1e-9, abs=1e-18)


LINEAR, *OTHERS = sorted(CONTROLS, key=lambda options: "linear" not in options)


@pytest.mark.parametrize(("script", "options"), cases(LINEAR, OTHERS, SCRIPTS), indirect=["script"])
def test_every_update_uses_the_rate_of_its_timestep(options, script, train, optimizer_steps):
    module, small, timesteps = script
    train(module.main, f"{small} {options}")
    rate = CONTROLS[options]
    expected = np.array([rate(t) for t in range(0, TOTAL, timesteps)])
    used = [lr for _, lr, optimizer in optimizer_steps if module is not sac or len(optimizer.param_groups) == 1]
    assert all(np.isclose(lr, expected, rtol=1e-6, atol=0).any() for lr in used)
    assert used[-1] == pytest.approx(expected[-1], rel=1e-5)  # the last iteration has an update, in every script
    assert len(set(used)) == 1 if "constant" in options else len(set(used)) > 2


@pytest.mark.parametrize(("script", "name"), cases("rmsprop", ["sgd"]), indirect=["script"])
def test_an_optimizer_is_the_one_asked_for_with_its_momentum(name, script, train, optimizer_steps):
    module, small, _ = script
    train(module.main, f"{small} --optimizer {name} --momentum 0.75 --lr-control constant --learning-rate 1e-5")
    assert {kind for kind, *_ in optimizer_steps} == {{"rmsprop": "RMSprop", "sgd": "SGD"}[name]}
    assert {step[2].param_groups[0]["momentum"] for step in optimizer_steps} == {0.75}


def test_adamrel_counts_anew_when_the_objective_changes_and_keeps_its_moments(script, train, monkeypatch, tmp_path):
    module, small, timesteps = script
    counts = []

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            if not self.state:  # `make_moments`
                return super().step(closure)
            before = [state["exp_avg"].abs().sum().item() for state in self.state.values()]
            super().step(closure)
            counts.append(next(iter(self.state.values()))["step"].item())
            assert counts[-1] > 1 or len(counts) == 1 or all(before)

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    if module is sac:
        with pytest.raises(SystemExit) as end:
            train(module.main, f"{small} --optimizer adamrel")
        assert end.value.code == 2 and not (tmp_path / "runs1").exists()
        return
    copies = "" if module is ppo else "--target-network-frequency 60"
    train(module.main, f"{small} --optimizer adamrel --bandit uniform {copies}")
    resets = [n for n in range(1, len(counts)) if counts[n] == 1]
    if module is ppo:
        per_rollout = len(counts) // (TOTAL // timesteps)
        assert resets == list(range(per_rollout, len(counts), per_rollout))
    else:  # updates follow timesteps 44, 48, … 240; copies follow 60, 120, 180, 240
        assert resets == [5, 20, 35]


@pytest.mark.parametrize("option", ["--learning-rates sparse3", "--lr-range 1e-5 1e-3"])
def test_arms_are_chosen_by_name_from_a_scripts_own_or_are_a_range(option, script):
    module, small, _ = script
    rates = module.parse_args(module.Args, [*small.split(), *option.split()]).learning_rates
    own = [module.Args.learning_rates[arm] for arm in (0, 2, 4)]
    assert rates == pytest.approx(own if "sparse3" in option else np.geomspace(1e-5, 1e-3, 25))


@pytest.mark.parametrize("script", ["ppo", "sac"], indirect=True)
def test_a_run_may_have_25_arms(script, train, figures):
    module, small, _ = script
    run = train(module.main, f"{small} --lr-range 1e-5 1e-3 --total-timesteps 120")
    assert len(run.config["learning_rates"]) == len(run.summary["pulls"]) == 25 and "p_24" in run.rounds
    assert (run.path / "curves.png").exists()


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_automatic_rounds_end_when_they_say_so(script, train, monkeypatch):
    """Of observations as long as a script wants them, but a fiftieth of that where it is thousands of timesteps."""
    module, small, rollout = script
    durations, stretches, close = [], [], Rounds.close

    def make_rounds(bandits, interval, stretch=1, *others):
        assert interval == "auto"
        stretches.append(stretch)
        return Rounds(bandits, interval, math.ceil(stretch / 50), *others)

    monkeypatch.setattr(module, "Rounds", make_rounds)
    monkeypatch.setattr(Rounds, "close", lambda self: durations.append(self.durations) or close(self))
    monkeypatch.setattr(Rounds, "is_over", property(lambda self: len(self.observations) == 2))
    small = small.replace("--bandit-interval 40", "--bandit-interval auto --bandit-feedback reward")
    observation = {ppo: rollout, sac: 20}.get(module, 40)
    run = train(module.main, f"{small} --total-timesteps {4 * observation}")  # one before it, a round and a bit
    assert stretches == [{ppo: stretches[0], sac: 1000}.get(module, 2000)]
    assert len(run.rounds["round"]) == len(durations) == 1
    assert durations == [[observation] * 2]


@pytest.mark.parametrize(
    ("script", "reason"),
    [*cases("collapse", []), *cases("not finite", []), *cases("ruinous", [])],
    indirect=["script"],
)
def test_a_round_that_ruins_the_agent_is_undone_to_the_bit_and_charged(
    reason, script, train, optimizer_steps, monkeypatch, tmp_path
):
    module, small, timesteps = script
    total = 280
    if reason == "ruinous" and module is not ppo:  # losses are looked at every 100 steps, so longer rounds
        small, total = small.replace("--bandit-interval 40", f"--bandit-interval {100 * timesteps}"), 600 * timesteps
    at_pull, undone, failed = {}, [], []

    def training_state():
        optimizers = {id(optimizer): optimizer for *_, optimizer in optimizer_steps}
        return {
            key: [x.detach().clone() for group in optimizer.param_groups for x in group["params"]]
            + [x.clone() for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
            for key, optimizer in optimizers.items()
        }

    def pull(self, original=Bandit.pull):
        at_pull.update(training_state())
        return original(self)

    def fail(self, *args, original=Bandit.fail):
        failed.append(self.learning_rate)
        return original(self, *args)

    def log_rounds(self, *args, original=Run.log_rounds, rolled_back=None):
        if rolled_back:
            undone.append(rolled_back)
            now = training_state()
            assert now and all(at_pull.get(key) for key in now), "it happens after a round that was not the first"
            for key, tensors in now.items():
                assert all(torch.equal(x, then) for x, then in zip(tensors, at_pull[key], strict=True))
        return original(self, *args, rolled_back=rolled_back)

    monkeypatch.setattr(Bandit, "pull", pull)
    monkeypatch.setattr(Bandit, "fail", fail)
    monkeypatch.setattr(Run, "log_rounds", log_rounds)
    rates = "1e-4 3e-4"
    if reason == "collapse":
        collapsed = property(lambda self: bool(self.observations) and self.count == 2 and not undone)
        monkeypatch.setattr(Rounds, "has_collapsed", collapsed)
    else:
        rates = "1e-4 1e30" if reason == "not finite" else "1e-4 100"
        choice = property(lambda self: np.eye(2)[int(len(self.performances) == 2 and not undone)])
        monkeypatch.setattr("bandits.Uniform.probabilities", choice)
    run = train(
        module.main, f"{small} --bandit uniform --learning-rates {rates} --save-model --total-timesteps {total}"
    )
    assert run.summary["status"] == "finished" and run.summary["rollbacks"] == 1 == len(undone) == len(failed)
    if reason == "collapse":
        assert "collapsed" in undone[0]
    elif reason == "not finite":
        assert failed == [1e30] and ("not finite" in undone[0] or "ruinous" in undone[0])
    else:
        assert failed == [100] and ("ruinous" in undone[0] or module is sac)  # whose actions may be lost before
    assert run.rounds["feedback"][2] < (0 if "StepCounter" in small else 1) and len(run.rounds["round"]) >= 4
    model = torch.load(run.path / "model.pt", weights_only=True)
    assert all(torch.isfinite(x).all() for state in model.values() if isinstance(state, dict) for x in state.values())


def as_bytes(objects):
    torch.save(capture(objects), data := io.BytesIO())
    return data.getvalue()


@pytest.mark.parametrize("script", ["dqn", "ppo", "sac"], indirect=True)
def test_all_that_training_changes_goes_back_with_a_round(script, train, monkeypatch):
    """Networks, targets, optimizers, statistics: whatever a script has told `Undoable`, and that is told."""
    module, small, _ = script
    told, kept, undone = [], [], []

    class Spy(module.Undoable):
        def __init__(self, *objects):
            super().__init__(*objects)
            told.extend(objects)

        def keep(self):
            kept[:] = [as_bytes(told)]
            super().keep()

        def undo(self):
            undone.append(as_bytes(told) != kept[0])
            super().undo()
            assert as_bytes(told) == kept[0]

    monkeypatch.setattr(module, "Undoable", Spy)
    monkeypatch.setattr(Rounds, "has_collapsed", property(lambda self: bool(self.observations) and self.count == 2))
    train(module.main, f"{small} --bandit uniform --total-timesteps 280")
    assert undone == [True]
    expected = {
        dqn: ["QNetwork", "QNetwork", "Adam"],
        ppo: ["Agent", "Adam", "RunningMeanStd", "RunningMeanStd"],
        sac: ["Actor", "TwinCritics", "TwinCritics", "Tensor", "Adam", "Adam"],
    }
    assert [type(x).__name__ for x in told] == expected[module]


@pytest.mark.parametrize(
    ("module", "options", "healthy"),
    [
        (dqn, ATARI, 0.1),
        (iqn, f"{ATARI} --num-tau-samples 4 --num-tau-prime-samples 4 --num-quantile-samples 4", 2),
        (minatar, ATARI.replace("--padding valid", ""), 0.1),
        (ppo, SCRIPTS["ppo"][1], 0.1),
        (sac, SCRIPTS["sac"][1], 0.0),
    ],
)
def test_a_script_says_how_large_a_healthy_loss_is(module, options, healthy, train, monkeypatch):
    said, is_ruined_by = set(), Rounds.is_ruined_by
    monkeypatch.setattr("lrrl_utils.atari.make_envs", lambda args, n: toy_envs.TinyGame(n, length=100))

    def spy(self, sign, healthy=0.0):
        said.add(healthy)
        return is_ruined_by(self, sign, healthy)

    monkeypatch.setattr(Rounds, "is_ruined_by", spy)
    train(module.main, f"{options} --total-timesteps 120")
    assert said == {healthy}


def test_the_loss_of_a_round_that_was_undone_is_not_charged_to_the_next_arm(train, monkeypatch):
    monkeypatch.setattr("lrrl_utils.atari.make_envs", lambda args, n: toy_envs.TinyGame(n, length=100))
    failed = []

    def fail(self, *args, original=Bandit.fail):
        failed.append(self.learning_rate)
        return original(self, *args)

    monkeypatch.setattr(Bandit, "fail", fail)
    monkeypatch.setattr("bandits.Uniform.probabilities", property(lambda self: np.eye(2)[(len(failed) + 1) % 2]))
    ends = "--learning-starts 96 --bandit-interval 100"  # of rounds, when losses are logged
    options = f"{ATARI} {ends} --bandit uniform --learning-rates 1e-4 1e30 --total-timesteps 500"
    assert train(dqn.main, options).summary["rollbacks"] == 1 and failed == [1e30]


def test_without_rollback_no_round_is_undone(script, train, monkeypatch):
    module, small, _ = script
    monkeypatch.setattr(Rounds, "has_collapsed", property(lambda self: self._rollback and self.is_open))
    small += " --no-rollback --total-timesteps 120"
    run = train(module.main, small)
    assert run.summary["rollbacks"] == 0 and run.summary["status"] == "finished"
    with pytest.raises(SystemExit) as end:
        train(module.main, f"{small} --learning-rates 1e30")
    assert end.value.code == 3


@pytest.mark.parametrize(("kl", "factor", "bound"), [("far", 1 / 1.5, 1e-6), ("near", 1.5, 1e-2), ("right", 1, 1)])
def test_kl_control_divides_above_twice_the_target_and_multiplies_below_half_of_it(
    kl, factor, bound, train, optimizer_steps, monkeypatch
):
    log_ratio = {"far": 0.21, "near": 0.09, "right": 0.15}[kl]  # exp(x) - 1 - x = 0.0237, 0.0042, 0.0118
    loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *x: (*(out := loss(*x))[:3], torch.full_like(out[3], log_ratio)))
    options = "--num-steps 64 --num-minibatches 2 --update-epochs 3 --total-timesteps 448 --lr-control kl"
    train(ppo.main, f"{STEPS} {options} --learning-rate 1e-3")
    rates = [lr for _, lr, _ in optimizer_steps]
    epochs = rates[::2]
    assert rates[1::2] == epochs and len(epochs) == 21  # it changes between epochs
    exact = [1e-3 * factor**n for n in range(21)]
    assert epochs == pytest.approx([max(r, bound) if factor < 1 else min(r, bound) for r in exact], rel=1e-5)


# --- what a bandit is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "optimizer"), cases("adam", ["rmsprop", "sgd"]), indirect=["script"])
def test_peak_is_told_once_how_far_a_rate_moves_the_parameters_and_before_each_round_what_is_over_and_left_of_steps(
    optimizer, script, train, monkeypatch
):
    module, options, _ = script
    args = module.parse_args(module.Args, options.split())
    expected = args.num_envs * args.num_steps // args.num_minibatches if module is ppo else args.batch_size
    best_update = {} if module is ppo else {"best_update": 0.007, "fall": 0.0}
    told, progress = [], []
    set_update_size, pull = Peak.set_update_size, Peak.pull

    def tell(self, *size, **options):
        told.append((*size, options))
        set_update_size(self, *size, **options)

    monkeypatch.setattr(Peak, "set_update_size", tell)
    told_before = lambda self: progress.append((self.progress, self.step_share, len(told)))  # noqa: E731
    monkeypatch.setattr(Peak, "pull", lambda self: told_before(self) or pull(self))
    train(module.main, f"{options} --optimizer {optimizer}")
    ((size, batch_size, options),) = told
    assert 0 < size < math.inf and (batch_size, options) == (expected, best_update)
    if optimizer == "adam":  # √n / ‖θ‖, of n parameters as large as layers of some hundred inputs have them
        assert 1 < size < 1000
    shares, step_shares, times = zip(*progress)
    assert set(times) == {1} and list(shares) == sorted(shares) and 0 <= shares[0] < 0.5 < shares[-1] < 1
    shortened = module is dqn and optimizer != "sgd"  # the ε of the others are small
    assert step_shares[0] == 1 and all((0 < x < 1) if shortened else x == 1 for x in step_shares[1:])


def test_other_bandits_are_told_nothing_and_cost_no_step(script, train, monkeypatch):
    module, options, _ = script
    monkeypatch.setattr(module, "relative_update", None)  # a call would be an error
    train(module.main, f"{options} --bandit uniform --total-timesteps 100")


def test_each_of_two_bandits_is_told_of_its_own_network(train, monkeypatch):
    module, options, _ = SCRIPTS["sac"]
    told = []
    monkeypatch.setattr(module, "relative_update", lambda _, optimizer, *__: told.append(optimizer) or 1.0)
    train(module.main, f"{options} --total-timesteps {TOTAL} --bandit-scope separate")
    sizes = [sum(x.numel() for group in optimizer.param_groups for x in group["params"]) for optimizer in told]
    assert len(sizes) == 2 and sizes[0] > 1.5 * sizes[1] > 0  # two critics, one actor
