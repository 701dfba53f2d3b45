"""What sac_mujoco_lrrl.py promises: credit, scopes, losses against slow references, replay, and that it learns."""

import math
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sac_mujoco_lrrl as sac
from tests import toy_envs
from tests.conftest import RunFolder, only_folder

SCRIPT = "sac_mujoco_lrrl.py"
SMALL = "--batch-size 8 --learning-starts 20 --bandit-interval 20"


@pytest.fixture
def step_counter():
    toy_envs.StepCounter.total = 0
    return f"--env-id tests.toy_envs:StepCounter-v0 {SMALL}"


@pytest.fixture
def rates(monkeypatch):
    """What the optimizers' steps used: (timesteps taken, "critic", rate) or (…, "actor", rate, temperature's rate)."""
    steps = []

    class SpyAdam(torch.optim.Adam):
        def step(self, closure=None):
            groups = [group["lr"].item() for group in self.param_groups]
            if self.state:  # else it is the step of `make_moments`
                steps.append((toy_envs.StepCounter.total, "critic" if len(groups) == 1 else "actor", *groups))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", SpyAdam)
    return steps


# --- the bandit in the loop -------------------------------------------------------------------------------------------


def test_a_round_is_credited_with_the_rewards_earned_while_its_rate_is_in_use(train, step_counter, rates):
    run = train(sac.main, f"{step_counter} --total-timesteps 200 --bandit uniform")
    assert run.rounds["global_step"].tolist() == list(range(41, 200, 20))  # the first update follows timestep 21
    for end, rate, performance in zip(*(run.rounds[x] for x in ("global_step", "learning_rate", "performance"))):
        assert performance == np.mean(np.arange(end - 19, end + 1))  # the reward of timestep t is t
        used = {step[2:] for step in rates if step[1] == "critic" and end - 20 <= step[0] < end}
        assert used == {(np.float32(rate),)}
    assert len(set(run.rounds["learning_rate"])) > 1


def test_the_return_feedback_waits_for_an_episode(train, step_counter):
    run = train(sac.main, f"{step_counter} --total-timesteps 120 --bandit-interval 1 --bandit-feedback return")
    assert run.rounds["global_step"].tolist() == list(range(30, 121, 10))
    assert run.rounds["performance"].tolist() == run.episodes["episodic_return"][2:].tolist()


def test_the_first_actions_are_random_and_fill_the_box(train, step_counter, monkeypatch):
    actions, add = [], sac.ReplayBuffer.add
    monkeypatch.setattr(sac.Actor, "act", lambda self, obs, noise: np.full((len(obs), 1), 0.125, np.float32))
    monkeypatch.setattr(
        sac.ReplayBuffer, "add", lambda self, obs, a, *x: actions.append(a.item()) or add(self, obs, a, *x)
    )
    train(sac.main, f"{step_counter} --learning-starts 50 --total-timesteps 60")
    assert len(set(actions[:50])) == 50 and min(actions) < -0.8 and max(actions) > 0.8
    assert 0.125 not in actions[:50] and actions[50:] == [0.125] * 10


SCOPES = {  # how the three rates are made of the arms of the critics' and of the actor's bandit
    "joint": lambda critic, actor: (critic, 0.5 * critic, 2 * critic),
    "separate": lambda critic, actor: (critic, actor, 2 * critic),
    "critic": lambda critic, actor: (critic, 0.5 * 1e-2, 2 * 1e-2),
    "actor": lambda critic, actor: (1e-2, actor, 2 * 1e-2),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_controls_its_own_rates_and_keeps_the_others_in_proportion(scope, train, step_counter, rates):
    options = f"{step_counter} --total-timesteps 300 --bandit uniform --bandit-scope {scope} --alpha-lr-ratio 2"
    options += " --policy-lr-ratio 0.5" if scope in ("joint", "critic") else ""
    options += " --learning-rate 1e-2" if scope in ("critic", "actor") else ""
    run = train(sac.main, options)
    arms = {name: [] for name in ("critic", "actor")}
    names = run.rounds["controller"] if scope == "separate" else [sac.CONTROLLERS[scope][0]] * len(run.rounds["round"])
    for name, end, rate in zip(names, run.rounds["global_step"], run.rounds["learning_rate"]):
        arms[name] += [(end, rate)]
    assert ("controller" in run.rounds) == (scope == "separate")
    assert run.rounds["round"].tolist() == sorted([*range(1, 14)] * (2 if scope == "separate" else 1))
    for n in range(13):
        end = 41 + 20 * n
        critic, actor = (dict(arms[name]).get(end) for name in ("critic", "actor"))
        expected = SCOPES[scope](critic, actor)
        used = [step for step in rates if end - 20 <= step[0] < end]
        assert {step[2] for step in used if step[1] == "critic"} == {np.float32(expected[0])}
        for rate in {step[2:] for step in used if step[1] == "actor"}:
            assert rate == pytest.approx(expected[1:], rel=1e-6)
    if scope == "separate":
        assert [rate for _, rate in arms["critic"]] != [rate for _, rate in arms["actor"]]
        pulls = {name: sum(counts) for name, counts in run.summary["pulls"].items()}
        assert pulls == {"critic": 13, "actor": 13}
        critic, actor = (run.rounds["controller"] == name for name in ("critic", "actor"))
        assert (run.rounds["performance"][critic] == run.rounds["performance"][actor]).all()
    else:
        assert sum(run.summary["pulls"]) == 13


@pytest.mark.parametrize("control", ["constant", "linear"])
def test_without_a_bandit_all_rates_follow_the_control_in_proportion(control, train, step_counter, rates):
    options = f"--total-timesteps 100 --lr-control {control} --learning-rate 1e-2 --target-network-frequency 3"
    run = train(sac.main, f"{step_counter} {options}")
    assert np.isnan(run.rounds["arm"]).all() and run.summary["pulls"] is None and len(run.rounds["round"]) == 3
    for step, network, *used in rates:
        rate = 1e-2 * (1 - (step - 1) / 100 if control == "linear" else 1)
        expected = [rate] if network == "critic" else [0.3 * rate, rate]
        assert used == pytest.approx(expected, rel=1e-5)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_log_probabilities_equal_a_numerical_integral():
    """Of a one-dimensional density: a piece of probability between two actions is that of the noise between them."""
    torch.manual_seed(0)
    actor = sac.Actor(2, np.array([-1.0]), np.array([5.0])).double()
    actor.layers[-1].bias.data = torch.tensor([0.8, 0.3], dtype=torch.float64)
    noise = torch.linspace(-7, 7, 40_001, dtype=torch.float64)[:, None]
    obs = torch.tensor([[0.3, -2.0]], dtype=torch.float64).expand(len(noise), 2)
    actions, log_probs = actor.get_action_and_log_prob(obs, noise)
    assert torch.equal(actions, actor.get_action(obs, noise)) and actions.min() > -1 and actions.max() < 5
    density = log_probs.exp()
    pieces = (density[1:] + density[:-1]) / 2 * actions[:, 0].diff()
    cumulative = pieces.cumsum(0)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
    assert cumulative.detach().numpy() == pytest.approx(normal.cdf(noise[1:, 0]).numpy(), abs=1e-6)


def test_log_probabilities_of_several_dimensions_agree_with_torch_distributions():
    torch.manual_seed(0)
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 5.0, 2.5])
    actor = sac.Actor(4, low, high).double()
    obs, noise = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    mean, log_std = actor(obs)
    transforms = [
        torch.distributions.TanhTransform(),
        torch.distributions.AffineTransform(torch.tensor((high + low) / 2), torch.tensor((high - low) / 2)),
    ]
    policy = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), transforms)
    actions, log_probs = actor.get_action_and_log_prob(obs, noise)
    assert log_probs.tolist() == pytest.approx(policy.log_prob(actions).sum(1).tolist(), rel=1e-6)
    assert (log_std >= -5).all() and (log_std <= 2).all()


def test_log_probabilities_stay_finite_where_tanh_is_one():
    actor = sac.Actor(1, np.array([-1.0]), np.array([1.0]))
    actor.layers[-1].bias.data = torch.tensor([40.0, 3.0])
    _, log_probs = actor.get_action_and_log_prob(torch.zeros(1, 1), torch.ones(1, 1))
    assert 50 < log_probs.item() < 100


def test_an_actor_reaches_the_bounds_of_its_box_and_its_mean_action_has_no_noise():
    low, high = np.array([-1.0, 0.0]), np.array([5.0, 0.5])
    actor = sac.Actor(1, low, high)
    obs = torch.zeros(1, 1)
    assert actor.get_action(obs, torch.full((1, 2), 1e6)).tolist() == [high.tolist()]
    assert actor.get_action(obs, torch.full((1, 2), -1e6)).tolist() == [low.tolist()]
    mean, _ = actor(obs)
    assert torch.allclose(
        actor.get_action(obs, 0), torch.tanh(mean) * torch.tensor([3, 0.25]) + torch.tensor([2, 0.25])
    )


def slow_critic(critics, which, obs, action):
    """One critic's value of one observation and action, layer by layer."""
    x = torch.cat([obs, action])
    for layer in (1, 2, 3):
        weight, bias = (getattr(critics, f"{kind}{layer}")[which] for kind in ("weight", "bias"))
        x = x @ weight + bias[0]
        x = x.clamp(min=0) if layer < 3 else x
    return x.item()


def test_the_losses_equal_a_slow_reference():
    torch.manual_seed(0)
    actor = sac.Actor(3, -np.ones(2), np.ones(2))
    critics, target_critics = sac.TwinCritics(3, 2), sac.TwinCritics(3, 2)
    log_alpha = torch.tensor(math.log(0.7), requires_grad=True)
    batch = 6
    obs, next_obs, actions, noise = torch.randn(6, 3), torch.randn(6, 3), torch.rand(6, 2), torch.randn(6, 2)
    rewards, terminations = torch.randn(batch), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    next_actions, next_log_probs = actor.get_action_and_log_prob(next_obs, noise)
    own_actions, log_probs = actor.get_action_and_log_prob(obs, noise)
    squares, policy = [], []
    for i in range(batch):
        smaller = min(slow_critic(target_critics, which, next_obs[i], next_actions[i]) for which in (0, 1))
        target = rewards[i].item()
        if not terminations[i]:
            target += 0.9 * (smaller - 0.7 * next_log_probs[i].item())
        squares.append([(slow_critic(critics, which, obs[i], actions[i]) - target) ** 2 for which in (0, 1)])
        smaller = min(slow_critic(critics, which, obs[i], own_actions[i]) for which in (0, 1))
        policy.append(0.7 * log_probs[i].item() - smaller)
    minibatch = (obs, actions, next_obs, rewards, terminations)
    args = SimpleNamespace(gamma=0.9)
    loss, values = sac.critic_loss(actor, critics, target_critics, log_alpha, args, minibatch, noise)
    assert loss.item() == pytest.approx(np.mean(squares, axis=0).sum(), rel=1e-5) and values.shape == (2, batch)
    loss.backward()
    assert all(p.grad is None for p in (*actor.parameters(), *target_critics.parameters(), log_alpha))
    loss, _ = sac.actor_loss(actor, critics, log_alpha, obs, noise)
    assert loss.item() == pytest.approx(np.mean(policy), rel=1e-5)


def test_networks_start_as_those_of_cleanrl_do():
    torch.manual_seed(0)
    critics = sac.TwinCritics(11, 3)
    for layer, (inputs, outputs) in enumerate(((14, 256), (256, 256), (256, 1)), 1):
        reference = torch.nn.Linear(inputs, outputs)
        for kind in ("weight", "bias"):
            ours, theirs = getattr(critics, f"{kind}{layer}"), getattr(reference, kind)
            bound = 1 / math.sqrt(inputs)
            assert ours.numel() == 2 * theirs.numel() and ours.abs().max() <= bound
            assert outputs == 1 or ours.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(critics.weight2[0], critics.weight2[1])


@pytest.fixture
def stored(monkeypatch):
    """The rows that a run stored, a list of arrays per column."""
    columns = [[] for _ in range(5)]

    def add(self, *arrays, add=sac.ReplayBuffer.add):
        for column, array in zip(columns, arrays):
            column.extend(np.array(array))
        return add(self, *arrays)

    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    return columns


def test_only_terminations_end_what_is_bootstrapped_and_no_transition_crosses_a_reset(train, stored):
    train(sac.main, f"--env-id tests.toy_envs:TwoEnds-v0 {SMALL} --total-timesteps 30")
    obs, _, next_obs, rewards, terminations = (np.array(column).squeeze() for column in stored)
    cycle = 6 * [(1, 2, False), (2, 3, False), (3, 4, True), (1, 2, False), (2, 3, False)]  # terminated, then truncated
    assert [*zip(obs.tolist(), next_obs.tolist(), terminations.tolist())] == cycle and set(rewards) == {1}


def test_the_replay_holds_the_latest_transitions_and_draws_them_uniformly():
    rng = np.random.default_rng(0)
    replay = sac.ReplayBuffer(10, 2, 1, "cpu")
    count = 0
    for k in (1, 3, 3, 3, 3):
        n = np.arange(count, count + k)
        replay.add(n[:, None] + [[0, 0.25]], n[:, None] + 0.5, n[:, None] + [[1, 1.25]], 100.0 * n, n % 2 == 0)
        count += k
        draws = replay.sample(rng, 4000)
        obs, actions, next_obs, rewards, terminations = (x.numpy() for x in draws)
        n, counts = np.unique(obs[:, 0], return_counts=True)
        assert n.tolist() == list(range(max(count - 10, 0), count))
        assert counts.min() > 0.75 * 4000 / len(n)
        n = obs[:, 0]
        assert (obs[:, 1] == n + 0.25).all() and (actions[:, 0] == n + 0.5).all() and (rewards == 100 * n).all()
        assert (next_obs == obs + 1).all() and (terminations == (n % 2 == 0)).all()
        assert rewards.shape == terminations.shape == (4000,)


def test_the_default_replay_is_small_and_taken_as_it_fills():
    before = psutil.Process().memory_info().rss
    replay = sac.ReplayBuffer(sac.Args.buffer_size, 17, 6, "cpu")  # HalfCheetah
    assert replay.rows.nbytes < 1e9
    for _ in range(100):
        replay.add(*(np.ones((10, size)) for size in (17, 6, 17)), np.ones(10), np.zeros(10))
    assert psutil.Process().memory_info().rss - before < 10e6


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_updates_per_timestep_do_not_depend_on_how_many_environments_there_are(
    num_envs, frequency, train, rates, step_counter
):
    options = f"{step_counter} --bandit uniform --total-timesteps 80 --num-envs {num_envs}"
    train(sac.main, f"{options} --policy-frequency {frequency}")
    counts = {name: sum(step[1] == name for step in rates) for name in ("critic", "actor")}
    assert counts == {"critic": 60, "actor": frequency * (80 // frequency - 20 // frequency)}


@pytest.mark.parametrize("period", [1, 5])
def test_target_critics_take_over_a_share_of_the_critics_at_their_period(period, train, step_counter, monkeypatch):
    parameters = []

    def spy(actor, critics, target_critics, *rest):
        parameters.append([[p.detach().clone() for p in network.parameters()] for network in (critics, target_critics)])
        return critic_loss(actor, critics, target_critics, *rest)

    critic_loss = sac.critic_loss
    monkeypatch.setattr(sac, "critic_loss", spy)
    options = f"--bandit uniform --total-timesteps 50 --tau 0.25 --target-network-frequency {period}"
    train(sac.main, f"{step_counter} {options}")
    assert all(torch.equal(a, b) for a, b in zip(*parameters[0]))
    for n, ((_, before), (critics, after)) in enumerate(zip(parameters, parameters[1:])):
        share = 0.25 if (21 + n) % period == 0 else 0
        for critic, old, new in zip(critics, before, after):
            assert torch.allclose(new, share * critic + (1 - share) * old, atol=1e-7)


@pytest.mark.parametrize(("log_std", "direction"), [(-5, 1), (0, -1)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target_and_falls_while_it_is_above(
    log_std, direction, train, step_counter, monkeypatch
):
    def forward(self, obs):  # entropies of about -3.6 and 0.6 nats; the target is -1
        return 0 * self.layers(obs)[:, :1], torch.full((len(obs), 1), float(log_std))

    def spy(actor, critics, log_alpha, *rest):
        alphas.append(log_alpha.exp().item())
        return actor_loss(actor, critics, log_alpha, *rest)

    actor_loss, alphas = sac.actor_loss, []
    monkeypatch.setattr(sac.Actor, "forward", forward)
    monkeypatch.setattr(sac, "actor_loss", spy)
    train(sac.main, f"{step_counter} --total-timesteps 60")
    assert alphas[0] == 1 and (np.diff(alphas) * direction > 0).all()
    alphas.clear()
    train(sac.main, f"{step_counter} --total-timesteps 60 --no-autotune --alpha 0.3")
    assert alphas == [pytest.approx(0.3)] * len(alphas)


def test_compiled_updates_stay_close_to_plain_ones_and_every_rate_runs_the_same_code(train, monkeypatch):
    counter, real_compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real_compile(function, backend=counter))
    options = f"--env-id Pendulum-v1 {SMALL} --total-timesteps 80 --bandit uniform --bandit-interval 5 --save-model"
    runs = [train(sac.main, options), train(sac.main, f"{options} --compile")]
    assert counter.frame_count == 2 and len(set(runs[1].rounds["learning_rate"])) > 2
    a, b = (torch.load(run.path / "model.pt", weights_only=True)["critics"] for run in runs)
    assert all(torch.allclose(a[name], b[name], atol=0.02) for name in a)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(start, tmp_path):
    options = "--env-id Hopper-v5 --batch-size 64 --total-timesteps 400 --learning-starts 200"
    options += " --bandit-interval 50 --num-envs 2"
    command = f"{SCRIPT} {options} --save-model --seed"
    processes = [start(f"{command} {seed}") for seed in (3, 3, 4)]
    for process in processes:
        assert process.wait() == 0, process.communicate()
    runs = [RunFolder(path) for path in (tmp_path / "runs").iterdir()]
    same = [run for run in runs if run.config["seed"] == 3]
    (other,) = [run for run in runs if run.config["seed"] == 4]
    for name in ("episodes.csv", "rounds.csv"):
        assert same[0].bytes(name) == same[1].bytes(name) != other.bytes(name)
    a, b = (torch.load(run.path / "model.pt", weights_only=True) for run in same)
    assert all(torch.equal(a[part][name], b[part][name]) for part in a for name in a[part])


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedPendulum-v5", "tests.toy_envs:OddSpaces-v0"])
def test_one_or_many_environments_of_any_bounded_box_task(env_id, train):
    run = train(sac.main, f"--env-id {env_id} --num-envs 3 {SMALL} --total-timesteps 101 --eval-episodes 1")
    assert run.summary["status"] == "finished" and run.summary["global_step"] == 99
    assert len(run.summary["eval_returns"]) == 1 and (run.episodes["global_step"] % 3 == 0).all()


def test_a_run_of_two_bandits_draws_both_and_the_saved_actor_loads(train, figures):
    run = train(sac.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 401 --bandit-scope separate --save-model")
    assert (run.path / "curves.png").stat().st_size > 10_000
    sac.Actor(3, np.array([-2.0]), np.array([2.0])).load_state_dict(
        torch.load(run.path / "model.pt", weights_only=True)["actor"]
    )


def test_it_learns_to_push_a_point_home(train):
    """The last 10 of 25 episodes return more than -12 on average; random play returns about -30."""
    options = "--batch-size 64 --learning-starts 100 --total-timesteps 500 --lr-control constant --learning-rate 3e-3"
    run = train(sac.main, f"--env-id tests.toy_envs:Point-v0 {options}")
    assert run.episodes["episodic_return"][-10:].mean() > -12


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_rate_that_diverges_ends_the_run_with_code_3_and_is_named(train, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        train(sac.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 4000 --no-rollback --learning-rates 1e30")
    run = only_folder(tmp_path / "runs1")
    assert end.value.code == 3 and run.summary["status"] == "diverged"
    assert "1e+30 (critics)" in capsys.readouterr().err


def test_an_environment_that_returns_nan_is_named_and_not_the_learning_rate(train, capsys, step_counter, monkeypatch):
    monkeypatch.setattr(
        toy_envs.StepCounter, "step", lambda self, action: (self.observe(math.nan), 0.0, False, False, {})
    )
    with pytest.raises(SystemExit) as end:
        train(sac.main, f"{step_counter} --total-timesteps 100")
    assert end.value.code == 3 and "StepCounter-v0 has returned" in capsys.readouterr().err
