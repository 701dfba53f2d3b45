"""What iqn_atari_lrrl.py promises beyond test_dqn_atari.py, which tests both scripts: quantiles and their loss."""

import math

import numpy as np
import pytest
import torch

import iqn_atari_lrrl as iqn


def test_the_quantile_loss_equals_a_slow_reference():
    """Dabney et al. (2018), eq. 3, over tables that stand for the networks' answers."""
    batch, num_actions, n, m, n_prime, kappa = 3, 2, 4, 6, 5, 0.7
    rng = np.random.default_rng(0)
    draw = lambda *shape: torch.from_numpy(2 * rng.standard_normal(shape).astype(np.float32))  # noqa: E731

    class Table:
        """Answers with a table of quantile values."""

        def __init__(self, num_taus):
            self.values = draw(batch, num_taus, num_actions)
            self.taus = torch.from_numpy(rng.random((batch, num_taus), np.float32))

        def quantile_values(self, obs, num_taus):
            assert self.values.shape[1] == num_taus
            return self.values, self.taus

    online, target = Table(n), Table(m + n_prime)
    args = iqn.Args(num_tau_samples=n, num_quantile_samples=m, num_tau_prime_samples=n_prime, kappa=kappa)
    obs, actions = torch.zeros(batch), torch.tensor([0, 1, 1])
    rewards, discounts = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.9, 0.0, 0.5])
    loss, _ = iqn.td_loss(online, target, args, obs, actions, rewards, obs, discounts)

    total = 0.0
    for b in range(batch):
        best = int(target.values[b, :m].mean(0).argmax())  # the first m quantiles choose the action
        for i in range(n):
            for j in range(n_prime):
                u = rewards[b] + discounts[b] * target.values[b, m + j, best] - online.values[b, i, actions[b]]
                u, tau = u.item(), online.taus[b, i].item()
                huber = u**2 / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)
                total += abs(tau - (u < 0)) * huber / kappa / n_prime / batch
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_quantile_values_are_those_of_the_paper():
    """Eq. 4: features times a ReLU layer over cosines of the quantile; here of 1 to 64 times πτ, as in Dopamine."""
    torch.manual_seed(0)
    network = iqn.QNetwork(3, 8)
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    values, taus = network.quantile_values(obs, 5)
    assert values.shape == (2, 5, 3) and taus.shape == (2, 5) and taus.min() >= 0 and taus.max() < 1
    features = network.features(obs / 255)
    for b in range(2):
        for i in range(5):
            cosines = torch.tensor([math.cos(math.pi * k * taus[b, i].item()) for k in range(1, 65)])
            embedding = torch.relu(network.embedding[0].weight @ cosines + network.embedding[0].bias)
            expected = network.head(features[b] * embedding)
            assert torch.allclose(values[b, i], expected, atol=1e-4)
    torch.manual_seed(1)
    q_values = network.q_values(obs)
    torch.manual_seed(1)
    assert torch.equal(q_values, network.quantile_values(obs, 8)[0].mean(1))


def test_quantiles_learn_a_distribution():
    """Returns of 0 or 1 with equal probability: the quantiles below a half go to 0, those above to 1."""
    torch.manual_seed(0)
    network = iqn.QNetwork(1, 32, "valid")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    obs, actions, discounts = torch.full((16, 4, 84, 84), 100), torch.zeros(16, dtype=torch.int64), torch.zeros(16)
    args = iqn.Args(num_tau_samples=8, num_tau_prime_samples=1, kappa=0.1)
    for _ in range(110):
        rewards = torch.randint(0, 2, (16,)).float()
        loss, _ = iqn.td_loss(network, network, args, obs, actions, rewards, obs, discounts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, taus = network.quantile_values(obs[:1], 200)
    assert values[taus < 0.3].mean() < 0.2 and values[taus > 0.7].mean() > 0.8


def test_it_has_dopamines_defaults():
    assert (iqn.Args.num_tau_samples, iqn.Args.num_tau_prime_samples, iqn.Args.num_quantile_samples) == (64, 64, 32)
    assert (iqn.Args.update_horizon, iqn.Args.learning_rate, iqn.Args.optimizer_eps) == (3, 5e-5, 3.125e-4)
    assert iqn.Args.kappa == 1.0
