"""benchmarks/theory.py: its closed forms, its distance, its networks, and the program in small."""

import math
import sys

import pytest
import torch

import network
import sde
from conftest import ROOT, launch

sys.path.insert(0, str(ROOT / "benchmarks"))

import theory


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_the_denoiser_is_the_posterior_mean_by_quadrature(t):
    target, t = theory.TARGET, torch.tensor(t, dtype=torch.float64)
    axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    to_means = (x0[:, None] - target.means).square().sum(2)
    log_prior = torch.logsumexp(target.weights.log() - to_means / (2 * target.std**2), 1)
    x = sde.interpolate(target.sample(4, torch.Generator().manual_seed(0)), noise(4, 2), t)
    log_likelihood = -(x[:, None] - sde.alpha(t) * x0).square().sum(2) / (2 * sde.beta(t) ** 2)
    posterior = torch.softmax(log_prior + log_likelihood, 1)
    torch.testing.assert_close(target.denoise(x, t.expand(4)), posterior @ x0, rtol=1e-6, atol=1e-6)


def test_the_target_has_the_mean_and_deviation_that_it_says():
    for purpose in ("test", "comparison"):
        x = theory.draw(200_000, purpose, 0)
        assert x.shape == (200_000, 2)
        torch.testing.assert_close(x.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=5e-3)
        assert x.var(0).mean().sqrt().item() == pytest.approx(theory.TARGET.sigma(), abs=5e-3)
    torch.testing.assert_close(theory.TARGET.weights @ theory.TARGET.means, torch.zeros(2, dtype=torch.float64))


def test_orders_on_the_curved_grid(monkeypatch):
    monkeypatch.setattr(theory, "STEPS", (64, 128))
    errors = theory.solver_errors(2.0)
    assert max(errors.pop(theory.EXACT)) < 1e-9
    orders = {name: math.log2(coarse / fine) for name, (coarse, fine) in errors.items()}
    assert orders.pop("edm") > 2  # not yet where it settles
    assert orders == pytest.approx({"euler": 1, "deis": 1, "heun": 2, "dpm": 2}, abs=0.1)


def test_the_distance_of_a_set_from_itself_and_from_a_shifted_copy():
    x, shift = noise(200, 2), torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert theory.wasserstein(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-7)
    assert theory.wasserstein(x, x + shift) == pytest.approx(0.5)


def test_a_student_starts_as_one_step_of_its_teacher():
    teacher, student = (network.Denoiser(theory.MLP(3, two_times)) for two_times in (False, True))
    torch.nn.init.normal_(teacher.net.output.weight)
    network.start_from_teacher(student.net, teacher.net)
    x, t = noise(5, 3).float(), torch.linspace(0.1, 0.9, 5)
    assert torch.equal(student(x, t, t / 2), teacher(x, t)) and student(x, t, t / 2).abs().sum() > 0


def test_the_program_in_small(tmp_path):
    small = ("--seeds", "1", "--points", "5", "20", "--images", "20", "--steps", "1", "--processes", "1", "--dest", tmp_path)
    out = launch("benchmarks/theory.py", "--only", "rate", *small).stdout
    assert out.startswith("| 2-Wasserstein distance | n = 5 | n = 20 |") and "| d = 64, out of the plane | 0." in out
    assert "The floor, 20 points" in out and [path.name for path in tmp_path.iterdir()] == ["theory-rate.png"]
