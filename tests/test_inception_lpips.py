"""The two borrowed networks against values of the published implementations, and against mistakes made with them before."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inception
import lpips
from conftest import GOLDEN, golden_images

SHAPES = {"rgb32": (3, 3, 32, 32), "rgb28": (2, 3, 28, 28), "rect": (2, 3, 48, 64), "rgb299": (1, 3, 299, 299)}
PAIRS = {"a64": (3, 3, 64, 64), "b33": (2, 3, 33, 47), "c224": (1, 3, 224, 224)}


@pytest.fixture(scope="module")
def state(weights):
    return torch.load(weights["inception"], weights_only=True)


@pytest.fixture(scope="module")
def net(state):
    return inception.Inception(state)


def error(net, name, features=2048):
    """Greatest difference from the published features, relative to the greatest of them."""
    expected = np.load(GOLDEN / "inception-features.npz")[f"{name}-{features}"]
    return abs(net(golden_images(name, SHAPES[name]), features).numpy() - expected).max() / abs(expected).max()


# ------------------------------------------------------------------------------------------------------ Inception


@pytest.mark.parametrize("features", inception.FEATURES)
@pytest.mark.parametrize("name", SHAPES)
def test_inception_has_the_published_features(net, name, features):
    assert error(net, name, features) < 1e-5


def test_inception_is_the_same_without_folding(state):
    assert error(inception.Inception(state, fold=False), "rect") < 1e-5


def interpolating(monkeypatch, **change):
    real = F.interpolate
    monkeypatch.setattr(inception.F, "interpolate", lambda x, **options: real(x, **{**options, **change}))


def batch_norm(net, change):
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            change(module)


MUTANTS = {
    "batch statistics": lambda net, m: torch.nn.Module.train(net.net, True),
    "another norm epsilon": lambda net, m: batch_norm(net, lambda bn: setattr(bn, "eps", 1e-5)),
    "average pooling in the last block": lambda net, m: setattr(net.net.Mixed_7c, "pool", inception._average),
    "maximum pooling in the last but one": lambda net, m: setattr(net.net.Mixed_7b, "pool", inception._maximum),
    "padding counted": lambda net, m: m.setattr(inception, "_average", lambda x: F.avg_pool2d(x, 3, stride=1, padding=1)),
    "aligned corners": lambda net, m: interpolating(m, align_corners=True),
    "nearest neighbours": lambda net, m: interpolating(m, mode="nearest", align_corners=None),
    "no scaling to [-1, 1]": lambda net, m: m.setattr(
        inception.F, "interpolate", lambda x, real=F.interpolate, **options: (real(x, **options) + 1) / 2
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_golden_features_notice(state, monkeypatch, mutant):
    net = inception.Inception({k: v.clone() for k, v in state.items()}, fold=False)  # batch statistics overwrite the stored
    MUTANTS[mutant](net, monkeypatch)
    assert error(net, "rgb28") > 1e-4


def test_large_images_are_resized_without_antialias(net, monkeypatch):
    """Without it each pixel of the half-size image is the mean of four, here of 2 x 2 with a chosen mean."""
    small = golden_images("resize", (1, 3, 299, 299)) // 2 + 60
    bump = torch.tensor([[40, -40], [-40, 40]]).repeat(299, 299)
    large = (small.repeat_interleave(2, 2).repeat_interleave(2, 3).int() + bump).to(torch.uint8)
    expected = net(small, 192)
    torch.testing.assert_close(net(large, 192), expected, rtol=1e-4, atol=1e-4)
    for change in ({"antialias": True}, {"align_corners": True}):
        with monkeypatch.context() as patch:
            interpolating(patch, **change)
            assert (net(large, 192) - expected).abs().max() > 1e-2


def test_inception_stays_in_evaluation_mode_inside_a_parent_in_training(state):
    net = inception.Inception(state, fold=False)
    parent = torch.nn.Sequential(net).train()
    assert parent.training and not any(module.training for module in net.modules())
    assert error(net, "rgb28") < 1e-5


def test_inception_runs_in_float32_without_tf32_and_leaves_the_settings(net):
    cudnn, seen = torch.backends.cudnn, []
    hook = net.net.Mixed_5b.register_forward_hook(lambda *_: seen.append((cudnn.enabled, cudnn.allow_tf32, _[2].dtype)))
    before = (cudnn.enabled, cudnn.allow_tf32)
    with torch.autocast("cpu", torch.bfloat16):
        net(golden_images("rgb28", SHAPES["rgb28"]), 768)
    hook.remove()
    assert seen == [(True, False, torch.float32)] and before == (cudnn.enabled, cudnn.allow_tf32)


def test_inception_features_do_not_depend_on_the_batch(net):
    images = golden_images("batch", (5, 3, 32, 32))
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, rtol=1e-5, atol=1e-5)


def test_inception_repeats_grey_and_refuses_what_is_not_uint8(net):
    grey = golden_images("grey", (2, 1, 28, 28))
    assert torch.equal(net(grey, 64), net(grey.repeat(1, 3, 1, 1), 64))
    for wrong in (grey.float(), grey[0], grey.repeat(1, 2, 1, 1)):
        with pytest.raises(ValueError, match="must be uint8"):
            net(wrong)
    with pytest.raises(ValueError, match="one of"):
        net(grey, 1000)


def test_inception_loads_without_counters_and_without_random_numbers(state):
    before = torch.get_rng_state()
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(bare) < len(state)
    assert error(inception.Inception(bare), "rgb28") < 1e-5
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "change", [{"fc.bias": None}, {"more": torch.zeros(1)}, {"Mixed_7c.branch_pool.conv.weight": torch.zeros(1)}]
)
def test_other_inception_weights_are_refused_by_name(state, change):
    wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=next(iter(change)).replace(".", "[.]")):
        inception.Inception(wrong)


# ---------------------------------------------------------------------------------------------------------- LPIPS


def pair(name, shape):
    return (golden_images(name + end, shape).float() / 255 for end in "xy")


@pytest.fixture(scope="module", params=["max", "avg"])
def distance(weights, request):
    return lpips.LPIPS(weights["piq"], weights["vgg"], pooling=request.param), request.param


@pytest.mark.parametrize("name", PAIRS)
def test_lpips_has_the_published_values(distance, name):
    net, pooling = distance
    expected = torch.from_numpy(np.load(GOLDEN / "lpips-values.npz")[f"{name}-{pooling}"])
    torch.testing.assert_close(net(*pair(name, PAIRS[name])), expected, rtol=1e-5, atol=0)


def test_lpips_reads_both_formats(weights):
    x, y = pair("b33", PAIRS["b33"])
    values = lpips.LPIPS(weights["piq"], weights["vgg"])(x, y)
    assert values.shape == (2,)
    torch.testing.assert_close(lpips.LPIPS(weights["lpips"], weights["vgg"])(x, y), values)


def test_lpips_of_grey_images_is_that_of_three_equal_channels(distance):
    net, _ = distance
    x, y = (image[:, :1] for image in pair("b33", PAIRS["b33"]))
    torch.testing.assert_close(net(x, y), net(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    assert torch.equal(net(x, x), torch.zeros(2))


def test_lpips_gradients_reach_images_alone(distance):
    net, _ = distance
    x, y = pair("b33", PAIRS["b33"])
    assert not any(p.requires_grad for p in net.parameters()) and not net.features(y)[0].requires_grad
    x.requires_grad_()
    net(x, y).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())


def test_lpips_gradient_is_finite_where_features_are_zero(weights):
    net = lpips.LPIPS(weights["piq"], weights["vgg"])
    net.vgg[2].bias[:32] = -1e3
    x, y = pair("b33", PAIRS["b33"])
    net.vgg[2].weight[32:] *= (torch.arange(32) % 2 == 0).float()[:, None, None, None]
    net.vgg[2].bias[32:] = -0.3  # some feature vectors are zero now, others are not
    zero = net.features(x)[0].square().sum(1) == 0
    assert 0 < zero.sum() < zero.numel()
    x.requires_grad_()
    net(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e3 and x.grad.abs().max() > 0
    net.vgg[2].bias.fill_(-1e3)  # all are
    x.grad = None
    net(x, y).sum().backward()
    assert x.grad.isfinite().all()


def test_lpips_adds_its_epsilon_to_the_norm(weights):
    """Features scaled by 1e-9: f / (|f| + 0.1) in units of the unscaled ones; an epsilon under the root gives 1e-4 of it."""
    net = lpips.LPIPS(weights["piq"], weights["vgg"])
    x = next(pair("b33", PAIRS["b33"]))
    unscaled = net.vgg[:4]((x - net.mean) / net.std)
    net.vgg[2].weight *= 1e-9
    net.vgg[2].bias *= 1e-9
    expected = unscaled / (unscaled.square().sum(1, keepdim=True).sqrt() + 0.1)
    torch.testing.assert_close(net.features(x)[0], expected, rtol=1e-4, atol=1e-6)


def test_lpips_takes_norms_in_float32_under_autocast(distance):
    net, _ = distance
    x, y = pair("a64", PAIRS["a64"])
    with torch.autocast("cpu", torch.bfloat16):
        assert net.vgg[0](x).dtype == torch.bfloat16
        features, values = net.features(x), net(x, y)
    assert all(f.dtype == torch.float32 for f in features) and values.dtype == torch.float32
    torch.testing.assert_close(features[0].square().sum(1), torch.ones(3, 64, 64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, net(x, y), rtol=0.05, atol=0)


def test_lpips_resizes_small_images_alone():
    assert lpips.at_vgg_size(torch.zeros(1, 3, 28, 28)).shape == (1, 3, 224, 224)
    assert lpips.at_vgg_size(torch.zeros(1, 3, 256, 256)).shape == (1, 3, 256, 256)


def test_lpips_refuses_unknown_options(weights):
    with pytest.raises(ValueError, match="pooling"):
        lpips.LPIPS(weights["piq"], weights["vgg"], pooling="mean")


def test_lpips_refuses_other_images(distance):
    with pytest.raises(ValueError, match="16 pixels or more"):
        distance[0](torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="floating-point"):
        distance[0](*2 * [torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])


def test_lpips_weights_saved_as_parameters_get_no_gradient(weights, tmp_path):
    lin = [torch.nn.Parameter(vector) for vector in torch.load(weights["piq"])]
    torch.save(lin, tmp_path / "lin.pt")
    net = lpips.LPIPS(tmp_path / "lin.pt", weights["vgg"])
    assert not any(tensor.requires_grad for tensor in (*net.parameters(), *net.buffers()))


def test_lpips_refuses_other_files_and_runs_no_code(weights, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save([torch.zeros(3)] * 5, tmp_path / "short.pth")
    for lin, vgg, message in (
        (tmp_path / "hostile.pth", weights["vgg"], "not a file of tensors"),
        (weights["piq"], tmp_path / "hostile.pth", "not a file of tensors"),
        (tmp_path / "short.pth", weights["vgg"], "does not hold LPIPS weights"),
        (weights["vgg"], weights["vgg"], "does not hold LPIPS weights"),
        (weights["piq"], weights["piq"], "features.0.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            lpips.LPIPS(lin, vgg)
    assert not (tmp_path / "executed").exists()
