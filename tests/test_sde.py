"""The mathematics against closed forms."""

import math
from fractions import Fraction

import pytest
import torch

import sde
from conftest import Gaussian


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def last(states):
    *_, x = states
    return x


# --------------------------------------------------------------------------------------------------- interpolant


def test_velocity_is_the_time_derivative_of_the_exact_flow(gaussian):
    x, t, h = noise(5, 3), times(0.05, 0.2, 0.5, 0.8, 0.99), 1e-6
    numeric = (gaussian.flow_map(x, t, t + h) - gaussian.flow_map(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(sde.velocity(x, gaussian.denoise(x, t), t), numeric, rtol=1e-6, atol=1e-7)


def test_velocity_at_pure_noise_is_minus_the_mean(gaussian):
    x, one = noise(4, 3), times(1, 1, 1, 1)
    torch.testing.assert_close(sde.velocity(x, gaussian.denoise(x, one), one), -gaussian.mean.expand(4, 3))


def test_score_is_the_gradient_of_the_log_density(gaussian):
    x, t = noise(4, 3), times(0.01, 0.3, 0.7, 1.0)
    exact = -(x - (1 - t)[:, None] * gaussian.mean) / gaussian.variance(t)[:, None]
    torch.testing.assert_close(sde.score(x, gaussian.denoise(x, t), t), exact)


def test_exact_flow_map_is_a_semigroup_and_the_identity_at_equal_times(gaussian):
    x, t, u, s = noise(4, 3), times(0.9, 0.5, 1, 0.3), times(0.5, 0.4, 0.2, 0.3), times(0.1, 0, 0, 0.2)
    torch.testing.assert_close(gaussian.flow_map(gaussian.flow_map(x, t, u), u, s), gaussian.flow_map(x, t, s))
    torch.testing.assert_close(gaussian.flow_map(x, t, t), x)


# ----------------------------------------------------------------------------------------------------- transport


def test_transport_solves_the_ode_of_a_constant_denoiser():
    d, z, t, s = noise(4, 3), noise(4, 3, seed=1), times(1, 0.9, 0.5, 0.01), times(0.3, 0, 0.49, 0.001)
    torch.testing.assert_close(sde.transport(sde.interpolate(d, z, t), d, t, s), sde.interpolate(d, z, s))


def test_transport_to_the_same_time_is_the_identity_even_at_data():
    x, d = noise(4, 3), noise(4, 3, seed=1)
    t = times(0, 1e-5, 0.5, 1)
    assert torch.equal(sde.transport(x, d, t, t), x)


def test_transport_to_data_is_the_denoised_image():
    x, d, t = noise(3, 3), noise(3, 3, seed=1), times(1e-5, 0.5, 1)
    torch.testing.assert_close(sde.transport(x, d, t, torch.zeros_like(t)), d)


@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.5])
def test_transport_in_float32_loses_no_digits(t, gap):
    """Its two weights, against exact arithmetic on the same float32 times: the naive forms are off by up to 100 %."""
    t32 = torch.tensor([t], dtype=torch.float32)
    s32 = t32 * (1 - gap)
    ft, fs = Fraction(t32.item()), Fraction(s32.item())

    def root(value):  # exact rational to 40 digits
        scale = 10**80
        return Fraction(math.isqrt(value.numerator * scale // value.denominator), 10**40)

    bt, bs = root(ft * (2 - ft)), root(fs * (2 - fs))
    keep, pull = bs / bt, ((1 - fs) * bt - (1 - ft) * bs) / bt
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert abs(Fraction(sde.transport(one, zero, t32, s32).item()) / keep - 1) < 1e-6
    assert abs(Fraction(sde.transport(zero, one, t32, s32).item()) / pull - 1) < 1e-6


def test_transport_up_undoes_transport_down():
    x, d, t, s = noise(4, 3), noise(4, 3, seed=1), times(1, 0.9, 0.5, 0.01), times(0.3, 1e-6, 0.49, 0.001)
    torch.testing.assert_close(sde.transport(sde.transport(x, d, t, s), d, s, t), x, rtol=1e-9, atol=1e-9)


def test_slerp_joins_its_ends_and_keeps_the_length_of_noise():
    a, b, u = noise(1, 3, 64, 64), noise(1, 3, 64, 64, seed=1), times(0, 0.3, 0.5, 1)
    arc = sde.slerp(a, b, u)
    torch.testing.assert_close(arc[[0, 3]], torch.cat([a, b]))
    assert (arc.flatten(1).std(1) - 1).abs().max() < 0.02
    torch.testing.assert_close(sde.slerp(a, b, u), sde.slerp(b, a, 1 - u))
    torch.testing.assert_close(sde.slerp(a, a, u), a.expand(4, 3, 64, 64))
    assert sde.slerp(a, -a, u).isfinite().all() and sde.slerp(0 * a, a, u).isfinite().all()


def test_data_between_is_the_image_that_transport_needs():
    x, d, t, s = noise(6, 3), noise(6, 3, seed=1), times(1, 1, 0.5, 0.3, 1e-3, 0.9), times(0, 0.9, 0.499, 0.0, 1e-5, 0.1)
    torch.testing.assert_close(sde.data_between(x, sde.transport(x, d, t, s), t, s), d, rtol=1e-9, atol=1e-9)


def test_transport_has_finite_gradients_at_data_time():
    x = noise(2, 3).requires_grad_()
    zero = times(0, 0)
    sde.transport(x, x * 2, zero, zero).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


# ----------------------------------------------------------------------------------------------- preconditioning


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_loss_weight_times_c_out_squared_is_one(sigma):
    t = torch.linspace(1e-5, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(sde.loss_weight(t, sigma) * sde.preconditioning(t, sigma)[2] ** 2, torch.ones_like(t))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_preconditioned_input_and_target_have_unit_variance(sigma):
    """For X0 of standard deviation sigma: Var(c_in Xt) = 1 and Var((X0 - c_skip Xt)/c_out) = 1, at every t."""
    t = torch.linspace(1e-3, 1, 20, dtype=torch.float64)
    c_in, c_skip, c_out = sde.preconditioning(t, sigma)
    a, b = sde.alpha(t), sde.beta(t)
    one = torch.ones_like(t)
    torch.testing.assert_close(c_in**2 * (a**2 * sigma**2 + b**2), one)
    torch.testing.assert_close(((1 - c_skip * a) ** 2 * sigma**2 + (c_skip * b) ** 2) / c_out**2, one)


def test_denoising_loss_is_smallest_at_the_exact_denoiser(gaussian):
    x0 = gaussian.mean + gaussian.sigma * noise(4000, 3)
    t = torch.linspace(0.01, 1, 4000, dtype=torch.float64)
    xt = sde.interpolate(x0, noise(4000, 3, seed=1), t)
    d = gaussian.denoise(xt, t)
    exact = sde.denoising_loss(d, x0, t, gaussian.sigma).mean()
    # weighted so that the exact denoiser of a Gaussian of the assumed sigma leaves the variance of a unit target
    assert abs(exact - 1) < 0.05
    for other in (d + 0.1, 1.2 * d, 0.8 * d):
        assert sde.denoising_loss(other, x0, t, gaussian.sigma).mean() > exact


# ---------------------------------------------------------------------------------------------------- grid, start


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_grid_has_n_points_evenly_spaced_in_the_root_then_zero(rho):
    ts = sde.grid(5, 0.999, 0.01, rho)
    assert len(ts) == 6 and ts[0] == 0.999 and ts[4] == 0.01 and ts[5] == 0
    gaps = (ts[:5] ** (1 / rho)).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4))


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_cosine_grid_has_n_points_evenly_spaced_in_an_angle_then_zero(rho):
    ts = sde.cosine_grid(5, 0.999, 0.01, rho)
    assert len(ts) == 6 and ts[0] == 0.999 and ts[4] == 0.01 and ts[5] == 0
    gaps = (ts[:5] ** (0.5 / rho)).asin().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4))
    steps = -sde.cosine_grid(101, 0.999, 0.001).diff()[:-1]
    assert torch.allclose(steps, steps.flip(0)) and steps[0] < steps[50] / 10  # alike at both ends, and short there


@pytest.mark.parametrize("name", sde.GRIDS)
def test_a_grid_of_one_step_goes_all_the_way(name):
    assert sde.GRIDS[name](1, 0.999, 0.01).tolist() == [0.999, 0]


def test_start_moves_towards_the_mean(gaussian):
    """One exact ODE step from t = 1 to 1 - eps adds +eps mean, up to eps^2."""
    z, eps = noise(4, 3), 1e-3
    one = times(1, 1, 1, 1)
    exact = gaussian.flow_map(z, one, one - eps)
    started = sde.start(z, gaussian.mean, eps)
    assert (started - exact).abs().max() < 3 * eps**2
    assert (z - eps * gaussian.mean - exact).abs().max() > eps * gaussian.mean.abs().max()


# -------------------------------------------------------------------------------------------------------- solvers


def solver_error(name, n, target):
    """Error at data of a solver that starts on the exact trajectory."""
    z = noise(6, 3, seed=3)
    ts = sde.grid(n, 1.0, 1e-3, rho=2)
    one = torch.ones(6, dtype=torch.float64)
    end = last(sde.sample(sde.solver(name, target.denoise), z, ts[:-1]))  # to t_min: the last step has an order of its own
    return (end - target.flow_map(z, one, one * 1e-3)).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("deis", 1), ("dpm", 2)])
def test_solvers_converge_at_their_order(name, order):
    target = Gaussian(torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64), 0.5)
    errors = [solver_error(name, n, target) for n in (41, 81, 161)]
    observed = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
    assert observed == pytest.approx([order, order], abs=0.15), (errors, observed)


def test_the_cosine_grid_serves_a_second_order_solver_of_large_and_small_shapes():
    """As images have them, of standard deviations of 10, 1 and 0.05: ten steps of dpm are nearer than where they are even."""
    one, errors = torch.ones(6, dtype=torch.float64), {}
    for sigma, times_nearer in ((10.0, 2), (1.0, 3), (0.05, 1)):
        target, z = Gaussian(torch.zeros(3, dtype=torch.float64), sigma), noise(6, 3, seed=3)
        exact = target.flow_map(z, one * 0.999, one * 0)
        for name in ("t", "cosine"):
            end = last(sde.sample(sde.solver("dpm", target.denoise), z, sde.GRIDS[name](10, 0.999, 1e-3, 1.0)))
            errors[name] = ((end - exact).abs().max() / exact.abs().max()).item()
        assert times_nearer * errors["cosine"] < errors["t"], (sigma, errors)


def way_up(name, n, target, x, t_min=1e-3):
    """The end, at t = 0.999, of a solver that starts from x at t_min."""
    return last(sde.sample(sde.solver(name, target.denoise), x, sde.grid(n, 0.999, t_min, rho=2)[:-1].flip(0)))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("deis", 1), ("dpm", 2), ("edm", 2)])
def test_solvers_converge_at_their_order_upwards_and_there_and_back(name, order):
    """From images to noise the ODE is the same, and the steps go to s > t."""
    target = Gaussian(torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64), 0.5)
    x, low, high = target.mean + 0.5 * noise(6, 3, seed=3), times(1e-3).expand(6), times(0.999).expand(6)
    errors, returned = [], []
    for n in (161, 321, 641):
        up = way_up(name, n, target, x)
        errors.append((up - target.flow_map(x, low, high)).abs().max().item())
        back = last(sde.sample(sde.solver(name, target.denoise), up, sde.grid(n, 0.999, 1e-3, rho=2)[:-1]))
        returned.append((back - x).abs().max().item())
    observed = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
    assert observed == pytest.approx([order, order], abs=0.2), (errors, observed)
    observed = [math.log2(returned[i] / returned[i + 1]) for i in (0, 1)]
    assert observed[1] > order - 0.2, (returned, observed)


def test_images_leave_the_data_up_to_the_order_of_the_time(gaussian):
    """What is left out is the score: s (x - mean) / sigma^2."""
    x, zero = gaussian.mean + 0.5 * noise(4, 3), times(0).expand(4)
    for s in (1e-3, 1e-4):
        exact = gaussian.flow_map(x, zero, zero + s)
        missing = s * (x - gaussian.mean) / gaussian.sigma**2
        torch.testing.assert_close(exact - sde.leave_data(x, zero + s), missing, rtol=20 * s, atol=0)


def test_leaving_the_data_is_the_limit_of_a_step_from_ever_closer_to_it(gaussian):
    x, s = gaussian.mean + 0.5 * noise(4, 3), times(1e-3).expand(4)
    steps = [sde.deis_step(gaussian.denoise, x, times(t).expand(4), s) for t in (1e-7, 1e-11)]
    errors = [(step - sde.leave_data(x, s)).abs().max().item() for step in steps]
    assert errors[1] < errors[0] / 50 and errors[1] < 1e-6


@pytest.mark.parametrize("name", ["deis", "dpm"])
def test_exponential_solvers_are_exact_on_a_point_mass_upwards(name):
    """What an image has beyond the point is noise, and grows with it."""
    target, z = PointMass(), noise(5, 3, seed=1)
    x = sde.interpolate(target.mean.expand(5, 3), z, times(1e-3).expand(5))
    expected = sde.interpolate(target.mean.expand(5, 3), z, times(0.999).expand(5))
    torch.testing.assert_close(way_up(name, 4, target, x), expected)


def test_heun_corrects_up_to_a_ratio_of_four_upwards_too():
    """Euler's predictor from near data overshoots: the velocity there is that of noise that grows as the root of t."""
    target, z = PointMass(), noise(5, 3, seed=1)
    x = sde.interpolate(target.mean.expand(5, 3), z, times(1e-3).expand(5))
    expected = sde.interpolate(target.mean.expand(5, 3), z, times(0.999).expand(5))
    ts = sde.grid(20, 0.999, 1e-3)[:-1].flip(0)
    plain = lambda x, t, s: plain_heun_step(target.denoise, x, t, s)
    ours = (last(sde.sample(sde.solver("heun", target.denoise), x, ts)) - expected).abs().max()
    assert ours < 0.1 and (last(sde.sample(plain, x, ts)) - expected).abs().max() > 10 * ours


@pytest.mark.parametrize("name", ["deis", "dpm"])
def test_exponential_solvers_are_exact_on_a_point_mass(name):
    point, z = noise(1, 3), noise(5, 3, seed=1)
    step = sde.solver(name, lambda x, t: point.expand_as(x))
    states = list(sde.sample(step, z, sde.grid(3, 1.0, 0.1)))
    for x, t in zip(states, (1.0, 0.55, 0.1, 0.0)):
        torch.testing.assert_close(x, sde.interpolate(point.expand(5, 3), z, torch.tensor(t, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("name", "n", "calls"), [("euler", 4, 4), ("deis", 4, 4), ("dpm", 4, 4), ("heun", 4, 6), ("heun", 20, 38), ("heun", 1, 1)]
)
def test_number_of_network_calls(name, n, calls, gaussian):
    count = []

    def denoise(x, t):
        assert t.shape == (2,) and (t > 0).all()
        count.append(t)
        return gaussian.denoise(x, t)

    last(sde.sample(sde.solver(name, denoise), noise(2, 3), sde.grid(n, 0.999, 1e-3)))
    assert len(count) == calls


@pytest.mark.parametrize("name", list(sde.SOLVERS))
def test_one_step_lands_on_data_not_at_t_min(name, gaussian):
    z = noise(4, 3)
    end = last(sde.sample(sde.solver(name, gaussian.denoise), z, sde.grid(1, 0.999, 1e-3)))
    t = times(0.999).expand(4)
    expected = z - 0.999 * sde.velocity(z, gaussian.denoise(z, t), t) if name == "euler" else gaussian.denoise(z, t)
    torch.testing.assert_close(end, expected)


def plain_heun_step(denoise, x, t, s):
    """Heun's everywhere but at data, as the reference has it."""
    v = sde.velocity(x, denoise(x, t), t)
    end = x + sde.like(s - t, x) * v
    return end if not s.any() else x + sde.like(s - t, x) * (v + sde.velocity(end, denoise(end, s), s)) / 2


@pytest.mark.parametrize("n", [5, 10, 20])
def test_heun_does_not_amplify_the_error_of_a_denoiser(n):
    """The corrector divides by beta_s^2, which is small near data: images would be speckled."""
    target = Gaussian(torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64), 0.01)  # narrow, as images are in most directions
    learned = lambda x, t: target.denoise(x, t) + 0.01 * torch.sin(1e4 * t)[:, None]
    z, ts = noise(50, 3), sde.grid(n, 0.999, 1e-5)

    def speckle(step):
        return (last(sde.sample(lambda x, t, s: step(learned, x, t, s), z, ts)) - target.mean).abs().max()

    assert speckle(sde.heun_step) < 0.1 and speckle(plain_heun_step) > 50


def test_heun_corrects_up_to_a_ratio_of_four_of_the_noise():
    """beta_t^2 <= 4 beta_s^2, each image by its own times."""
    s = times(0.1, 0.1, 0.1)
    limit = 1 - (1 - 4 * s * (2 - s)).sqrt()
    t = limit + times(-1e-6, 1e-6, -0.05)
    seen = []

    def denoise(x, r):
        seen.append(r)
        return 0 * x

    x = noise(3, 2)
    ended = sde.heun_step(denoise, x, t, s)
    assert len(seen) == 2 and torch.equal(ended[1], sde.deis_step(lambda x, r: 0 * x, x, t, s)[1])
    plain = plain_heun_step(lambda x, r: 0 * x, x, t, s)
    torch.testing.assert_close(ended[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(ended[1], plain[1])


def test_heun_mixes_images_at_data_and_before_it(gaussian):
    """Times differ between images: each gets the step it would get alone."""
    x, t, s = noise(3, 3), times(0.5, 0.5, 0.1), times(0.3, 0.0, 0.0)
    together = sde.heun_step(gaussian.denoise, x, t, s)
    for i in range(3):
        alone = sde.heun_step(gaussian.denoise, x[i : i + 1], t[i : i + 1], s[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_steps_broadcast_times_over_images():
    x, t, s = noise(2, 3, 4, 4), times(0.9, 0.2), times(0.5, 0.1)
    for name in sde.SOLVERS:
        step = lambda: sde.solver(name, lambda x, t: x * sde.like(t, x))
        out = step()(x, t, s)
        for i in range(2):
            torch.testing.assert_close(out[i : i + 1], step()(x[i : i + 1], t[i : i + 1], s[i : i + 1]))


def test_dpm_extrapolates_the_denoiser_linearly_in_log_snr():
    """Its rule as DESIGN has it, by hand: d + h/(2 h') (d - d') where h <= 2 h', d alone elsewhere and after churn."""
    log_snr = lambda t: math.log((1 - t) / math.sqrt(t * (2 - t)))
    denoise = lambda x, t: sde.like(t, x).expand_as(x)
    x, grid = noise(2, 3), [0.9, 0.6, 0.4, 0.01, 0.0]
    step, before = sde.solver("dpm", denoise), None
    for t, s in zip(grid, grid[1:]):
        extra = 0.0
        if before is not None and s > 0:
            ratio = (log_snr(s) - log_snr(t)) / (log_snr(t) - log_snr(before))
            extra = ratio / 2 * (t - before) if ratio <= 2 else 0.0
        assert (extra != 0) == (t == 0.6)  # 0.4 -> 0.01 is a long step, then comes data
        expected = sde.transport(x, torch.full_like(x, t + extra), *times(t, s))
        ended = step(x, times(t, t), times(s, s))
        torch.testing.assert_close(ended, expected)
        x, before = ended, t

    step = sde.solver("dpm", denoise)
    step(x, times(0.6, 0.6), times(0.4, 0.4))
    churned = step(x, times(0.5, 0.5), times(0.3, 0.3))  # from 0.4 back to 0.5
    torch.testing.assert_close(churned, sde.deis_step(denoise, x, times(0.5, 0.5), times(0.3, 0.3)))


# ------------------------------------------------------------------------------------------------------ randomness


def test_reverse_sde_step_has_the_drift_and_diffusion_of_the_sde(gaussian):
    """(mean - x)/(s - t) -> f - g^2 score and variance/(t - s) -> g^2 as the step shrinks."""
    x, t, h = noise(4, 3), times(0.2, 0.5, 0.9, 0.99), 1e-7
    mean = sde.ancestral_step(gaussian.denoise, lambda: torch.zeros_like(x), x, t, t - h)
    spread = sde.ancestral_step(gaussian.denoise, lambda: torch.ones_like(x), x, t, t - h) - mean
    g2 = (2 / (1 - t))[:, None]
    drift = -x / (1 - t)[:, None] - g2 * sde.score(x, gaussian.denoise(x, t), t)
    torch.testing.assert_close((mean - x) / -h, drift, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(spread**2 / h, g2.expand_as(x), rtol=1e-3, atol=1e-4)


def test_reverse_sde_samples_the_target(gaussian):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    step = lambda x, t, s: sde.ancestral_step(gaussian.denoise, draw, x, t, s)
    x = last(sde.sample(step, sde.start(draw(), gaussian.mean, 1e-3), sde.grid(200, 0.999, 1e-3, rho=2)))
    torch.testing.assert_close(x.mean(0), gaussian.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((3,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)


def test_churn_keeps_the_marginal(gaussian):
    """Xt becomes Xt' exactly: the coefficients turn the law at t into that at t'."""
    t = times(0.1, 0.5, 0.9)
    moved, back = sde.churn(torch.ones(3, 1, dtype=torch.float64), t, 0.3, 0.95, lambda: torch.zeros(3, 1))
    torch.testing.assert_close(back, times(0.13, 0.65, 0.95))
    r = moved.squeeze(1)
    fresh = sde.churn(torch.zeros(3, 1, dtype=torch.float64), t, 0.3, 0.95, lambda: torch.ones(3, 1))[0].squeeze(1)
    torch.testing.assert_close(r * (1 - t), 1 - back)  # the mean's factor
    torch.testing.assert_close(r**2 * gaussian.variance(t) + fresh**2, gaussian.variance(back))


def test_churn_without_gamma_or_beyond_t_max_does_nothing():
    x = noise(2, 3)
    for gamma, t_max in ((0.0, 0.999), (0.5, 0.2)):
        moved, back = sde.churn(x, times(0.3, 0.999), gamma, t_max, lambda: torch.ones_like(x))
        assert torch.equal(moved, x) and torch.equal(back, times(0.3, 0.999))


def test_churned_ode_still_samples_the_target(gaussian):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    step = lambda x, t, s: sde.heun_step(gaussian.denoise, x, t, s)
    move = lambda x, t: sde.churn(x, t, 0.2, 0.999, draw)
    x = last(sde.sample(step, sde.start(draw(), gaussian.mean, 1e-3), sde.grid(60, 0.999, 1e-3), move))
    torch.testing.assert_close(x.mean(0), gaussian.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((3,), 0.5, dtype=torch.float64), atol=0.03, rtol=0)


# ---------------------------------------------------------------------------------------------------------- losses


class PointMass(Gaussian):
    """deis is exact here, so the teacher's discrete solution is the exact characteristic, and D(x, t, s) is the point."""

    def __init__(self):
        super().__init__(torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64), 0.0)

    def denoise_between(self, x, t, s):
        return self.mean.expand_as(x)


K = 8


@pytest.fixture
def stage2():
    target = PointMass()
    step = lambda x, t, s: sde.deis_step(target.denoise, x, t, s)
    x0, z, z2 = target.mean.expand(50, 3), noise(50, 3), noise(50, 3, seed=1)
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    return target, step, sde.grid(K, 1 - 1e-3, 1e-3), x0, z, z2, t


@pytest.mark.parametrize("on_data", [False, True])
@pytest.mark.parametrize("distance", list(sde.DISTANCES.values()))
def test_trajectory_loss_is_zero_at_the_exact_flow_map(stage2, distance, on_data):
    target, step, ts, x0, z, z2, t = stage2
    states = torch.stack(list(sde.sample(step, sde.interpolate(x0, z, ts[0].expand(50)), ts)))
    pair = torch.multinomial(
        sde.pair_probabilities(K, 0.2, 0.2).flatten(), 50, True, generator=torch.Generator().manual_seed(0)
    )
    k, l = pair // (K + 1), pair % (K + 1)
    assert (k < l).all() and (l <= K).all()
    which = torch.arange(50)
    chosen = states[torch.stack([k, l]), which]
    exact = target.denoise_between
    d, dsm = sde.trajectory_losses(exact, chosen, k, l, ts, x0, z2, t, 1.0, distance, on_data)
    assert d.shape == dsm.shape == (50,) and d.abs().max() < 1e-12 and dsm.max() < 1e-12
    wrong = lambda x, t, s: exact(x, t, s) + 0.1 * x
    d, dsm = sde.trajectory_losses(wrong, chosen, k, l, ts, x0, z2, t, 1.0, distance, on_data)
    assert d.min() > 0 and dsm.min() > 0


@pytest.mark.parametrize("distance", list(sde.DISTANCES.values()))
@pytest.mark.parametrize("n", [1, 3, K])
def test_semigroup_loss_is_zero_at_the_exact_flow_map(stage2, distance, n):
    target, step, ts, x0, z, z2, t = stage2
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(K + 1 - n, (50,), generator=generator)
    j = i + n
    k = j + (torch.rand(50, generator=generator) * (K + 1 - j)).long()
    assert (k <= K).all()
    exact = target.denoise_between
    arguments = (step, x0, z, i, n, k, ts, z2, t, 1.0, distance)
    d, dsm = sde.semigroup_losses(exact, exact, *arguments)
    assert d.shape == dsm.shape == (50,) and d.abs().max() < 1e-12 and dsm.max() < 1e-12
    d, dsm = sde.semigroup_losses(lambda x, t, s: exact(x, t, s) + 0.1 * x, exact, *arguments)
    assert d.mean() > 0 and dsm.min() > 0


def test_semigroup_target_carries_no_gradient(stage2):
    """Only the student's long jump learns; the short one, its target, is held still."""
    target, step, ts, x0, z, z2, t = stage2
    exact, factor = target.denoise_between, torch.ones((), dtype=torch.float64, requires_grad=True)
    i, j, k = torch.zeros(50).long(), torch.full((50,), 2), torch.full((50,), K)
    with torch.no_grad():
        factor.fill_(1.1)
    d, _ = sde.semigroup_losses(lambda x, t, s: factor * exact(x, t, s), exact, step, x0, z, i, 2, k, ts, z2, t, 1.0, sde.l2)
    (gradient,) = torch.autograd.grad(d.mean(), factor)
    with torch.no_grad():
        goal = sde.transport(
            sde.interpolate(x0, z, ts[j]), 1.1 * exact(sde.interpolate(x0, z, ts[j]), ts[j], ts[k]), ts[j], ts[k]
        )
        x_t = sde.interpolate(x0, z, ts[i])
        slope = exact(x_t, ts[i], ts[k])
        made = sde.transport(x_t, 1.1 * slope, ts[i], ts[k])
    torch.testing.assert_close(gradient, (2 * (made - goal) * slope).mean())


def test_pair_probabilities_favour_the_named_pairs():
    p = sde.pair_probabilities(4, 0.3, 0.2)
    assert p.shape == (4, 5) and p.sum().item() == pytest.approx(1)
    assert (p.tril() == 0).all()
    rest = 0.5 / 10
    assert p[1, 2].item() == pytest.approx(rest)
    assert p[2, 4].item() == pytest.approx(rest + 0.05)
    assert p[0, 4].item() == pytest.approx(rest + 0.05 + 0.3)


def test_huber_is_quadratic_near_and_linear_far():
    zero = torch.zeros(1, 4, dtype=torch.float64)
    c = 0.03 * 2
    near, far = zero + 1e-5, zero + 1e3
    assert sde.huber(near, zero).item() == pytest.approx((near**2).sum().item() / (2 * c), rel=1e-4)
    assert sde.huber(far, zero).item() == pytest.approx(2e3 - c, rel=1e-6)
    a = noise(1, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(sde.huber(a, a.detach()).sum(), a)
    assert torch.isfinite(gradient).all()  # equal images


def test_adaptive_weight_balances_the_gradients():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, other = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    gradients = (torch.autograd.grad(value, w)[0] for value in (loss, other))
    assert sde.adaptive_weight(*gradients).item() == pytest.approx(10)
