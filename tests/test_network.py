"""The network against values and names of the established implementations, and the denoiser's identities."""

import json
import shutil

import numpy as np
import pytest
import torch

import network
import sde
from conftest import GOLDEN, golden_tensor

MNIST = {"img_resolution": 28, "img_channels": 1, "model_channels": 32, "channel_mult": (1, 2, 2), "attn_resolutions": (14,)}
CIFAR = {"img_resolution": 32, "img_channels": 3}
SMALL = {"img_resolution": 16, "img_channels": 3, "model_channels": 32, "channel_mult": (1, 2), "attn_resolutions": (8,)}
SETTINGS = {
    "mnist-denoiser": MNIST,
    "mnist-characteristic": dict(MNIST, two_times=True),
    "cifar-denoiser": CIFAR,
    "cifar-characteristic": dict(CIFAR, two_times=True),
    "small-conditional": dict(SMALL, num_blocks=1, label_dim=10, two_times=True),
    "small-ncsnpp": dict(SMALL, num_blocks=2, architecture="ncsnpp"),
}


@pytest.fixture(scope="module", params=SETTINGS)
def golden(request):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"network-{request.param}.npz").items()}
    net = network.UNet(**SETTINGS[request.param]).eval()
    keep = ("resample_filter", "freqs")
    state = {k: v if k.endswith(keep) else golden_tensor(k, tuple(v.shape)) for k, v in net.state_dict().items()}
    if "freqs" in arrays:
        state["map_noise.freqs"] = arrays["freqs"]
    net.load_state_dict(state)
    return request.param, net, arrays


def test_state_dict_has_the_published_names_and_shapes(golden):
    name, net, _ = golden
    published = json.loads((GOLDEN / "network-keys.json").read_text())[name]
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == published


def test_output_equals_the_established_implementation(golden):
    _, net, a = golden
    with torch.no_grad():
        y = net(a["x"], a["t"], a.get("s"), label=a.get("label"))
        alone = net(a["x"][:1], a["t"][:1], a["s"][:1] if "s" in a else None, label=a["label"][:1] if "label" in a else None)
    assert (y - a["y"]).norm() / a["y"].norm() < 1e-5
    assert (alone - a["y"][:1]).norm() / a["y"][:1].norm() < 1e-5  # batch size 1


def tiny(two_times=False, **more):
    settings = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), **more}
    torch.manual_seed(0)
    return network.Denoiser(network.UNet(8, 1, two_times=two_times, **settings), sigma_data=0.5).eval()


def shake(module):
    """Weights away from their near-zero initial values, so that outputs depend on everything."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_student_starts_as_one_teacher_step():
    teacher, student = tiny(), tiny(two_times=True)
    shake(teacher), shake(student)
    network.start_from_teacher(student.net, teacher.net)
    x, t, s = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.5, 0.2, 0.9]), torch.tensor([0.0, 0.4, 0.2, 0.1])
    torch.testing.assert_close(student.flow_map(x, t, s), sde.deis_step(teacher, x, t, s))


def test_student_can_leave_its_start():
    """The s-branch is at zero but its gradient is not."""
    teacher, student = tiny(), tiny(two_times=True)
    shake(teacher)
    network.start_from_teacher(student.net, teacher.net)
    student(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.4])).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in student.net.named_parameters() if ".affine_s.weight" in n)


def test_flow_map_boundary_conditions():
    model = tiny(two_times=True)
    shake(model)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 0.5, 0.01])
    assert torch.equal(model.flow_map(x, t, t), x)
    torch.testing.assert_close(model.flow_map(x, t, torch.zeros(3)), model(x, t, torch.zeros(3)))


def test_denoiser_is_the_identity_at_data():
    model = tiny()
    shake(model)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(x, torch.zeros(2)), x)


def test_times_in_float64_give_images_in_float32():
    model = tiny(two_times=True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert model.flow_map(x, t, t / 2).dtype == torch.float32


def test_label_dropout_hides_labels_in_training_only():
    model = tiny(label_dim=3, label_dropout=1.0, dropout=0.0)
    shake(model)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.2])
    a, b = (torch.nn.functional.one_hot(torch.tensor(labels), 3).float() for labels in ([0, 1], [2, 0]))
    assert not torch.equal(model(x, t, label=a), model(x, t, label=b))
    model.train()
    assert torch.equal(model(x, t, label=a), model(x, t, label=b))


def test_labels_may_be_numbers_and_are_asked_for():
    model = tiny(label_dim=3)
    shake(model)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.2]), torch.tensor([2, 0])
    expected = model(x, t, label=torch.nn.functional.one_hot(labels, 3).float())
    for kind in (torch.long, torch.int32, torch.uint8):
        assert torch.equal(model(x, t, label=labels.to(kind)), expected)
    with pytest.raises(ValueError, match="3 classes: give it `label`"):
        model(x, t)
    with pytest.raises(ValueError, match="`label`"):
        model.net(x, t)


@pytest.mark.parametrize("two_times", [False, True])
def test_bf16_is_for_the_network_alone_and_stays_near_float32(two_times):
    plain = tiny(two_times)
    shake(plain)
    fast, seen = plain.at("bf16"), set()
    plain.net.dec["8x8_aux_conv"].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1e-3, 0.2, 0.7, 0.999])
    times = (t, t / 2) if two_times else (t,)
    a, b = plain(x, *times), fast(x, *times)
    assert seen == {torch.float32, torch.bfloat16} and a.dtype == b.dtype == torch.float32
    assert 0 < (a - b).norm() < 0.02 * a.norm()
    b.square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in plain.parameters() if p.grad is not None)
    assert plain.precision == "fp32" and fast.state_dict().keys() == plain.state_dict().keys()


def test_dropout_zeroes_its_share_keeps_the_mean_and_is_seeded():
    x = torch.ones(4, 3, 101, 7, requires_grad=True)  # of a size that four does not divide
    torch.manual_seed(0)
    y = network.dropout(x, 0.3)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - 19661 / 2**16)).item()}
    assert abs((y == 0).float().mean() - 0.3) < 0.02
    assert torch.equal(network.dropout(x, 0), x) and not network.dropout(x, 1).any()
    for part in (y[0], y[-1], y.flatten()[::4], y.flatten()[3::4]):  # all bits of a random number are random
        assert abs((part == 0).float().mean() - 0.3) < 0.04
    assert network.dropout(torch.ones(10**6), 0.99).mean().item() == pytest.approx(1, abs=0.05)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(network.dropout(x, 0.3), y)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 0.05, marks=pytest.mark.slow)])
def test_compiled_network_computes_the_same_and_keeps_its_names(precision, tolerance):
    small = {"channel_mult": (1,), "attn_resolutions": ()}  # compiling takes up to a minute
    plain, compiled = tiny(two_times=True, **small), tiny(two_times=True, **small)
    shake(plain)
    compiled.load_state_dict(plain.state_dict())
    network.compile_in_place(compiled.net)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1e-3, 0.2, 0.7, 0.999])
    images, gradients = [], []
    for model in (plain, compiled):
        images.append(model.at(precision)(x, t, t / 2))
        images[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for a, b in (images, gradients):
        assert (a - b).norm() < tolerance * a.norm()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
