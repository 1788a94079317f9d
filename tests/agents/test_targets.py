"""Targets, with figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spiking_rl.agents.targets import double_q_targets, lambda_returns


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).reshape(-1, 1)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool).reshape(-1, 1)


def test_lambda_returns_by_hand() -> None:
    got = lambda_returns(column(1, 1, 1), column(10, 20, 30), flags(0, 0, 0), flags(0, 0, 0), 0.5, 0.5)
    # G3 = 1 + .5*30 = 16; G2 = 1 + .5*(.5*20 + .5*16) = 10; G1 = 1 + .5*(.5*10 + .5*10) = 6
    np.testing.assert_allclose(got, column(6, 10, 16))


def test_a_terminated_episode_ends_the_return() -> None:
    got = lambda_returns(column(1, 2, 4), column(9, 9, 9), flags(0, 1, 0), flags(0, 1, 0), 1.0, 1.0)
    np.testing.assert_allclose(got, column(3, 2, 13))


def test_a_truncated_episode_bootstraps_from_its_final_observation() -> None:
    got = lambda_returns(column(1, 2, 4), column(9, 7, 9), flags(0, 0, 0), flags(0, 1, 0), 1.0, 1.0)
    # Step 2 is cut: 2 + V(final) = 9, and nothing of step 3 leaks into it.
    np.testing.assert_allclose(got, column(10, 9, 13))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_lambda_returns_equal_the_sum_of_n_step_returns(lam: float) -> None:
    rng = np.random.default_rng(0)
    length, gamma = 6, 0.9
    rewards, values = (rng.normal(size=(length, 1)).astype(np.float32) for _ in range(2))
    none = np.zeros((length, 1), dtype=bool)
    got = lambda_returns(rewards, values, none, none, gamma, lam)

    def n_step(t: int, n: int) -> float:
        return float(sum(gamma**k * rewards[t + k, 0] for k in range(n)) + gamma**n * values[t + n - 1, 0])

    for t in range(length):
        longest = length - t
        expected = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, longest))
        expected += lam ** (longest - 1) * n_step(t, longest)
        assert got[t, 0] == pytest.approx(expected, abs=1e-5)


def test_lambda_returns_name_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"rewards \(3, 1\).*done \(2, 1\)"):
        lambda_returns(column(1, 1, 1), column(1, 1, 1), flags(0, 0, 0), flags(0, 0), 0.9, 0.9)


def test_double_q_takes_the_online_choice_and_the_target_value() -> None:
    online = torch.tensor([[1.0, 2.0], [5.0, 0.0]])
    target = torch.tensor([[100.0, 3.0], [7.0, 100.0]])
    rewards, dones = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    got = double_q_targets(rewards, dones, 0.5, online, target)
    assert got.tolist() == [[2.5], [1.0]]
    # n-step returns bring a discount per sample.
    got = double_q_targets(rewards, torch.zeros(2, 1), torch.tensor([[0.5], [0.25]]), online, target)
    assert got.tolist() == [[2.5], [2.75]]
