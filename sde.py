"""The mathematics: interpolant, transport, preconditioning, grids, steps, samplers and losses.

Pure functions on tensors.  Nothing here reads a file, an options object or a random number generator: noise arrives as an
argument.  `t = 0` is data and `t = 1` is noise (arXiv 2405.05512, section 2):

    Xt = alpha(t) X0 + beta(t) Z,   alpha(t) = 1 - t,   beta(t) = sqrt(t (2 - t)),   alpha^2 + beta^2 = 1

Shapes: images `x` and denoised images `d` are (B, ...); times `t`, `s` are (B,) tensors or 0-d tensors; a coefficient has
the shape of its time.  `denoise(x, t)` is the denoiser E[X0 | Xt = x]; `flow_map(x, t, s)` carries x from time t to time s.
Coefficients are computed in the dtype of the times and only then cast to that of the images.
"""

import math

import torch


def like(c, x):
    """A coefficient of shape (B,) or () made to multiply images (B, ...) of x's dtype."""
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def alpha(t):
    """Weight of the data in Xt."""
    return 1 - t


def beta(t):
    """Weight of the noise in Xt: sqrt(1 - alpha^2), written so that small t keeps its digits."""
    return (t * (2 - t)).sqrt()


def log_sigma(t):
    """ln(beta/alpha), the logarithm of EDM's noise level; as if t were 1e-10 at least and alpha 1e-6, so that it is finite."""
    return (t.clamp(min=1e-10).log() + (2 - t).log()) / 2 - alpha(t).clamp(min=1e-6).log()


def interpolate(x0, z, t):
    """Xt = alpha X0 + beta Z."""
    return like(alpha(t), x0) * x0 + like(beta(t), x0) * z


def velocity(x, d, t):
    """dx/dt of the probability-flow ODE, (alpha x - D) / beta^2, t > 0 (paper, eq. of the characteristic)."""
    return (like(alpha(t), x) * x - d) / like(t * (2 - t), x)


def score(x, d, t):
    """Gradient of log density of Xt, (alpha D - x) / beta^2, t > 0 (Tweedie)."""
    return (like(alpha(t), x) * d - x) / like(t * (2 - t), x)


def transport(x, d, t, s):
    """T(x, d; t, s): where the ODE carries x from t to s if the denoiser is constantly d.  t, s in [0, 1].

    Up, to s > t, it needs t > 0: at data every noise has the same state.  leave_data() is for that.

    T = (beta_s/beta_t) x + (alpha_s - alpha_t beta_s/beta_t) d.  Near t = s the weight of d is a difference of nearly
    equal numbers; as (t - s) [alpha_s (2 - t - s) / (beta_t + beta_s) + beta_s] / beta_t, from beta_t^2 - beta_s^2 =
    (t - s)(2 - t - s), it loses no digits.  At t = s the result is x itself, t = 0 included.
    """
    keep, pull = transport_weights(t, s)
    return like(keep, x) * x + like(pull, x) * d


def transport_weights(t, s):
    """Weights of x and of d in T(x, d; t, s)."""
    beta_t, beta_s = beta(t), beta(s)
    one = torch.ones_like(beta_t)
    safe = torch.where(beta_t > 0, beta_t, one)  # only t = s = 0 has beta_t = 0
    keep = torch.where(t == s, one, beta_s / safe)
    pull = (t - s) * (alpha(s) * (2 - t - s) / torch.where(beta_t > 0, beta_t + beta_s, one) + beta_s) / safe
    return keep, pull


def leave_data(x0, s):
    """alpha_s x0: where the ODE carries images x0 from t = 0 to a small time s.

    The limit of transport(x0, D(x0, t), t, s) as t -> 0: D(x, t) = x + O(t) there, so that the noise in x0, which is
    (x0 - alpha_t D) / beta_t, vanishes.  What it leaves out is the score, by which the ODE moves an image s |score| more.
    """
    return like(alpha(s), x0) * x0


def data_between(x, y, t, s):
    """The image d with T(x, d; t, s) = y, for s < t: what a constant denoiser would have to be to lead from x to y."""
    keep, pull = transport_weights(t, s)
    return (y - like(keep, x) * x) / like(pull, x)


def preconditioning(t, sigma):
    """(c_in, c_skip, c_out) for data of standard deviation `sigma`: unit-variance input and target for the network.

    w = Var Xt = (alpha sigma)^2 + beta^2; c_in = 1/sqrt(w); c_skip = alpha sigma^2 / w; c_out = beta sigma / sqrt(w).
    """
    w = (alpha(t) * sigma) ** 2 + t * (2 - t)
    return w.rsqrt(), alpha(t) * sigma**2 / w, beta(t) * sigma * w.rsqrt()


def loss_weight(t, sigma):
    """1 / c_out^2 = w / (beta^2 sigma^2): every time then weighs the same in the network's own units.  t > 0."""
    beta2 = t * (2 - t)
    return ((alpha(t) * sigma) ** 2 + beta2) / (beta2 * sigma**2)


def evenly(n, t_max, t_min, there, back):
    """(n + 1,) float64 times t_max = t_0 > ... > t_{n-1} = t_min > t_n = 0, of which there(t) is linear up to t_{n-1}.

    there() gets the two ends, (2,), and back() is its inverse.  n = 1 gives (t_max, 0): one step, all the way.
    """
    first, last = there(torch.tensor([t_max, t_min], dtype=torch.float64))
    ts = back(first + torch.arange(n, dtype=torch.float64) / max(n - 1, 1) * (last - first))
    ts[0] = t_max
    if n > 1:
        ts[-1] = t_min
    return torch.cat([ts, torch.zeros(1, dtype=torch.float64)])


def grid(n, t_max, t_min, rho=1.0):
    """evenly() in t^(1/rho)."""
    return evenly(n, t_max, t_min, lambda t: t ** (1 / rho), lambda u: u**rho)


def cosine_grid(n, t_max, t_min, rho=1.0):
    """evenly() in an angle whose sin^2 is t^(1/rho): fine at both ends.

    Near t = 0 details appear, on a scale of beta = sqrt(2t).  Near t = 1 large shapes do, when alpha^2 = (1 - t)^2 times their
    variance, which is far above a pixel's, is about 1.  A second-order solver needs short steps in both.
    """
    return evenly(n, t_max, t_min, lambda t: (t ** (0.5 / rho)).asin(), lambda angle: angle.sin() ** (2 * rho))


def karras_grid(n, t_max, t_min, rho=7.0):
    """evenly() in sigma^(1/rho), sigma = beta/alpha (EDM, arXiv 2206.00364, eq. 5); t_max < 1."""

    def back(u):
        square = u ** (2 * rho)
        w = (1 + square).sqrt()
        return square / (w * (1 + w))  # 1 - alpha = 1 - 1/w, without cancellation

    return evenly(n, t_max, t_min, lambda t: (beta(t) / alpha(t)) ** (1 / rho), back)


GRIDS = {"t": grid, "cosine": cosine_grid, "karras": karras_grid}


def start(z, mean, eps):
    """State at t = 1 - eps from noise z, (B, ...), and the data's mean, (...): eps mean + sqrt(1 - eps^2) z.

    To first order z + eps mean.  Plus: v(x, 1) = -mean and the step in t is -eps.
    """
    return math.sqrt(1 - eps**2) * z + eps * mean


def slerp(a, b, u):
    """The point at the share u (B,) of the arc from a to b, (B, ...): [sin((1 - u) w) a + sin(u w) b] / sin w, w their angle.

    On it normals keep their length, where the straight line is shorter.  The line where they are parallel.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).double().clamp(-1, 1)
    w = cosine.arccos()
    share = lambda r: torch.where(w.sin() > 1e-4, (r * w).sin() / w.sin(), r)
    return like(share(1 - u), a) * a + like(share(u), b) * b


# --------------------------------------------------------------------------------------------------------- steps
# A step takes x from time t down to s < t.  The flow map is such a step.  These make others from a denoiser, which also go up,
# for 0 < t < s < 1.


def euler_step(denoise, x, t, s):
    """Order 1 on the velocity.  One call."""
    return x + like(s - t, x) * velocity(x, denoise(x, t), t)


def deis_step(denoise, x, t, s):
    """Order 1, exponential integrator (DDIM): exact while the denoiser is constant along the path.  One call."""
    return transport(x, denoise(x, t), t, s)


def heun_step(denoise, x, t, s):
    """Order 2: Heun's on the velocity where beta_t^2 and beta_s^2 differ by a factor of 4 at most, else deis_step.

    Two calls, or one.  An error e of the predicted state comes back as -e (t - s) alpha_s / (2 beta_s^2), a quarter to a half
    of e beta_t^2 / beta_s^2: speckles, where s is near data.  Up from there, an error e of the denoiser at t is carried to s
    as e (beta_s^2 / beta_t^2) / 4: the velocity near data cannot be trusted over so long a step.
    On a GPU each step waits for the device, to know whether any image is corrected.
    """
    d = denoise(x, t)
    to_s = transport(x, d, t, s)
    beta2_t, beta2_s = t * (2 - t), s * (2 - s)
    corrects = (beta2_t <= 4 * beta2_s) & (beta2_s <= 4 * beta2_t) & (s > 0)
    if not corrects.any():
        return to_s
    v, safe = velocity(x, d, t), torch.where(corrects, s, torch.ones_like(t))
    end = x + like(s - t, x) * v
    corrected = x + like(s - t, x) * (v + velocity(end, denoise(end, safe), safe)) / 2
    return torch.where(corrects.reshape(-1, *[1] * (x.ndim - 1)), corrected, to_s)


def edm_step(denoise, x, t, s):
    """Order 2: Heun's on x/alpha in sigma = beta/alpha (EDM, arXiv 2206.00364, algorithm 1), t < 1; deis_step at s = 0.

    deis_step is its Euler step.  Two calls, or one.  On a GPU each step waits for the device, as in heun_step.
    """
    to_s, corrects = transport(x, denoise(x, t), t, s), s > 0
    if not corrects.any():
        return to_s
    safe = torch.where(corrects, s, t)
    keep, pull = alpha(safe) / alpha(t), 1 - beta(t) * alpha(safe) / (alpha(t) * beta(safe))
    slope = to_s - like(alpha(safe), x) * denoise(to_s, safe)
    corrected = (like(keep, x) * x + to_s + like(pull, x) * slope) / 2
    return torch.where(corrects.reshape(-1, *[1] * (x.ndim - 1)), corrected, to_s)


class DPMStep:
    """Order 2, exponential, multistep (DPM-Solver++ 2M, arXiv 2211.01095): T(x, d + h/(2 h') (d - d'); t, s).  One call.

    d' is the denoised image of the step before; h and h' are the two steps in log(alpha/beta).  deis_step where there was no
    step before, where h > 2 h' (as at s = 0), and after churn.  It remembers the step before: one instance for one trajectory.
    """

    def __init__(self):
        self.before = None  # the last step's d, and the logarithm at both of its ends

    def __call__(self, denoise, x, t, s):
        d, at_t, at_s = denoise(x, t), *(torch.log(alpha(r) / beta(r)) for r in (t, s))
        ahead = d
        if self.before is not None:
            d_before, start, end = self.before
            ratio = (at_s - at_t) / (end - start)
            ratio = torch.where((ratio <= 2) & (end == at_t), ratio, torch.zeros_like(ratio))
            ahead = d + like(ratio / 2, x) * (d - d_before)
        self.before = d, at_t, at_s
        return transport(x, ahead, t, s)


# All that a new solver needs is a line here: a step, or a class whose instances are steps that remember.
SOLVERS = {"euler": euler_step, "heun": heun_step, "deis": deis_step, "dpm": DPMStep, "edm": edm_step}


def solver(name, denoise):
    """The step(x, t, s) of a solver for one trajectory."""
    step = SOLVERS[name]() if isinstance(SOLVERS[name], type) else SOLVERS[name]
    return lambda x, t, s: step(denoise, x, t, s)


def ancestral_step(denoise, noise, x, t, s):
    """One step of the reverse SDE dX = [f - g^2 score] dt + g dW, f = -x/(1-t), g^2 = 2/(1-t), for t < 1.

    Exact while the denoiser is constant: a draw from the posterior of X_s given X_t = x and X0 = D, with r = alpha_t/alpha_s,
    mean r beta_s^2/beta_t^2 x + alpha_s (1 - r^2)/beta_t^2 D and variance beta_s^2/beta_t^2 (1 - r^2).  `noise()` returns
    standard normals of x's shape.
    """
    d = denoise(x, t)
    r = alpha(t) / alpha(s)
    ratio = s * (2 - s) / (t * (2 - t))
    fresh = (t - s) * (2 - t - s) / alpha(s) ** 2  # 1 - r^2
    mean = like(r * ratio, x) * x + like(alpha(s) * fresh / (t * (2 - t)), x) * d
    return mean + like((ratio * fresh).sqrt(), x) * noise()


def churn(x, t, gamma, t_max, noise):
    """Noise mollification: (x, t) -> (x', t'), t' = min((1 + gamma) t, t_max), with the law of Xt' where x has that of Xt.

    x' = r x + sqrt(1 - r^2) eps with r = alpha_t'/alpha_t.
    """
    back = ((1 + gamma) * t).clamp(max=t_max).maximum(t)
    r = alpha(back) / alpha(t)
    fresh = (back - t) * (2 - t - back) / alpha(t) ** 2  # 1 - r^2
    return like(r, x) * x + like(fresh.clamp(min=0).sqrt(), x) * noise(), back


def sample(step, x, ts, before_step=None):
    """Yield the state at each time of the grid `ts` (n + 1,), x itself first, by n calls of step(x, t, s).

    `before_step(x, t) -> (x, t)` may move the state first (churn).  Times reach the step as (B,) tensors.
    """
    yield x
    for t, s in zip(ts[:-1], ts[1:]):
        t, s = t.expand(x.shape[0]), s.expand(x.shape[0])
        if before_step is not None:
            x, t = before_step(x, t)
        x = step(x, t, s)
        yield x


# -------------------------------------------------------------------------------------------------------- losses
# All return one value per image, (B,).


def l2(a, b):
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def huber(a, b):
    """Pseudo-Huber sqrt(|a - b|^2 + c^2) - c with c = 0.03 sqrt(dimension) (arXiv 2310.14189)."""
    c = 0.03 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


DISTANCES = {"l2": l2, "huber": huber}  # and lpips.py's


def denoising_loss(d, x0, t, sigma):
    """Stage 1: w/(beta^2 sigma^2) |D(Xt, t) - X0|^2, the mean over pixels; d = D(Xt, t), t in (0, 1]."""
    return loss_weight(t, sigma).to(x0.dtype) * l2(d, x0)


def pair_probabilities(K, one_step, to_data):
    """(K, K + 1) probabilities of regressing the state at grid point k on the one at l > k (entry [k, l]).

    A share `one_step` goes to the pair (0, K), a share `to_data` evenly to the pairs with l = K, the rest evenly to all pairs.
    """
    p = torch.triu(torch.ones(K, K + 1, dtype=torch.float64), diagonal=1)
    p *= (1 - one_step - to_data) / p.sum()
    p[:, K] += to_data / K
    p[0, K] += one_step
    return p


def trajectory_losses(denoise, states, k, l, ts, x0, z, t, sigma, distance, on_data=False, target=None):
    """Paper's regression on discretised characteristics, and the stage-1 loss at s = t, in one forward pass.

    denoise     D(x, t, s) of the student
    states      (2, B, ...) teacher states at grid points k and l, (B,) indices with k < l, of the grid ts (K + 1,)
    x0, z, t    (B', ...) images and noise and (B',) times for the stage-1 loss; B' may be 0
    on_data     compare the images D(x_k, t_k, t_l) and data_between(x_k, x_l) instead: equal exactly when the states are, and
                free of noise, for a distance that is meant for images
    target      (B', ...) what the stage-1 loss asks for instead of x0: what a guided teacher says
    Returns the distances of G(x_k, t_k, t_l) to x_l, (B,), and the stage-1 losses, (B',).
    """
    x_k, x_l = states
    d = denoise(torch.cat([x_k, interpolate(x0, z, t)]), torch.cat([ts[k], t]), torch.cat([ts[l], t]))
    d_k, d_0 = d.split([len(x_k), len(x0)])
    if on_data:
        distances = distance(d_k, data_between(x_k, x_l, ts[k], ts[l]))
    else:
        distances = distance(transport(x_k, d_k, ts[k], ts[l]), x_l)
    return distances, denoising_loss(d_0, x0 if target is None else target, t, sigma)


def semigroup_losses(denoise, ema, teacher_step, x0, z, i, n, k, ts, z_dsm, t, sigma, distance, target=None):
    """Consistency of the flow map along the teacher's ODE (as in CTM, arXiv 2310.02279), and the stage-1 loss.

    With t = ts[i] > u = ts[i + n] >= s = ts[k] and x_u found from x_t by n teacher steps, compares G_ema(G(x_t, t, s), s, 0)
    with G_ema(stopgrad G(x_u, u, s), s, 0).  Pairs with s = u tie the flow map to the teacher, all others tie it to itself.

    denoise, ema   D(x, t, s) of the student and of its moving average (which must not require gradients)
    teacher_step   step(x, t, s)
    i, n, k        (B,) indices i and k into the grid ts (K + 1,), and the number n of teacher steps, for all images the same
    x0, z          (B, ...) images and noise at time ts[i]; z_dsm, t: noise and times of the stage-1 loss on the same images
    target         as in trajectory_losses
    Returns the distances and the stage-1 losses, (B,) each.
    """
    x_t, x_dsm = interpolate(x0, z, ts[i]), interpolate(x0, z_dsm, t)
    s, zero = ts[k], torch.zeros_like(ts[k])

    def to_data(x):
        return transport(x, ema(x, s, zero), s, zero)

    with torch.no_grad():
        x_u = x_t
        for done in range(n):
            x_u = teacher_step(x_u, ts[i + done], ts[i + done + 1])
        stepped = to_data(transport(x_u, denoise(x_u, ts[i + n], s), ts[i + n], s))
    d, d_dsm = denoise(torch.cat([x_t, x_dsm]), torch.cat([ts[i], t]), torch.cat([s, t])).chunk(2)
    estimate = to_data(transport(x_t, d, ts[i], s))
    return distance(estimate, stepped), denoising_loss(d_dsm, x0 if target is None else target, t, sigma)


def guided(strong, weak, w):
    """weak + w (strong - weak): the denoiser `strong` pushed away from a `weak` one; `strong` itself for w = 1.

    With the denoiser of all classes as `weak` it is classifier-free guidance (arXiv 2207.12598), with a worse network of the
    same data autoguidance (arXiv 2406.02507).
    """
    return weak + w * (strong - weak)


def adaptive_weight(gradient, other):
    """|gradient| / |other|, at most 1e4: times this, the loss of the second gradient pulls as hard as that of the first."""
    return (gradient.norm() / other.norm().clamp(min=1e-12)).clamp(max=1e4)
