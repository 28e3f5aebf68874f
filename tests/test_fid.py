"""Statistics of sets of images, the scores between them, and fid.py."""

from dist_util import UserError

import csv
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import defaults
import fid
import inception
import misc
from conftest import golden_images, images, in_memory, launch, rgb16, run, write_folder

CPU = torch.device("cpu")


def covariance(rng, d, rank=None):
    a = rng.standard_normal((d, rank or 2 * d))
    return a @ a.T / a.shape[1]


def gaussian(mu, sigma):
    return fid.Statistics(mu, sigma, {})


def distance(mu1, sigma1, mu2, sigma2):
    return fid.frechet_distance(gaussian(mu1, sigma1), gaussian(mu2, sigma2))


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("ranks", "n"), [(1, 37), (2, 37), (3, 2)])
def test_statistics_on_any_number_of_ranks_are_those_of_numpy(tmp_path, ranks, n):
    """37 images do not divide by 2, and 2 are fewer than 3 ranks: none may be counted twice or left out."""
    batch = images(n)
    folder = write_folder(tmp_path / "images", batch, classes=2)
    where = ["--mode", "gen", "--img_folder", folder, "--dest", tmp_path / "s.npz"]
    run("fid.py", *where, "--metrics", "fid,kid", ranks=ranks)
    found = fid.read_statistics(tmp_path / "s.npz", features=True)
    order = sorted(range(n), key=lambda i: (i % 2, i))  # class folders one after the other
    x = batch[order].flatten(1).numpy() / 255
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.mu, x.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(x.T), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.features, x, rtol=0, atol=1e-7)
    assert found.metadata["n"] == n and found.metadata["image"] == [1, 6, 5] and found.metadata["features"] == "pixels"


def test_pixel_statistics_do_not_depend_on_the_batch_size(monkeypatch):
    expected = fid.measure(in_memory(images(600)), fid.Pixels(CPU))
    for size in (1, 7, 256):
        monkeypatch.setattr(fid, "BATCH", size)
        found = fid.measure(in_memory(images(600)), fid.Pixels(CPU))
        assert np.array_equal(found.mu, expected.mu) and np.array_equal(found.sigma, expected.sigma)


def test_pixel_sums_are_exact_where_float32_is_at_its_limit():
    """A full batch of white: 256 x 255^2 is just below 2^24."""
    batch = torch.full((512, 1, 2, 2), 255, dtype=torch.uint8)
    batch[0] = 254
    x = batch.flatten(1).double().numpy() / 255
    np.testing.assert_allclose(fid.measure(in_memory(batch), fid.Pixels(CPU)).sigma, np.cov(x.T), rtol=1e-9)


@pytest.fixture(scope="module")
def extract(weights):
    return fid.Inception(CPU, weights["inception"], "0" * 64)


def test_inception_statistics_are_those_of_the_features_in_any_batches(extract, monkeypatch):
    batch = golden_images("statistics", (6, 3, 32, 32))
    monkeypatch.setattr(fid, "BATCH", 4)
    found = fid.measure(in_memory(batch), extract, keep=True)
    x = torch.cat([extract(image[None]) for image in batch]).double().numpy()
    np.testing.assert_allclose(found.mu, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sigma, np.cov(x.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.features, x, rtol=1e-5, atol=1e-5)
    assert found.metadata["preprocessing"] == inception.PREPROCESSING and found.metadata["weights"] == "0" * 64


def test_inception_scores_do_not_depend_on_the_ranks_and_are_finite_for_few_images(tmp_path, weights):
    sets = {"one": golden_images("one", (3, 3, 32, 32)), "other": golden_images("other", (2, 3, 32, 32))}
    extract = fid.Inception(CPU, weights["inception"], "")
    one, other = (fid.measure(in_memory(batch), extract) for batch in sets.values())
    folders = {name: write_folder(tmp_path / name, batch) for name, batch in sets.items()}
    shared = ["--inception_weights", weights["inception"]]
    run("fid.py", "--mode", "gen", "--img_folder", folders["one"], "--dest", tmp_path / "one.npz", *shared, ranks=2)
    two = fid.read_statistics(tmp_path / "one.npz")
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-5)
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-4, atol=1e-5)
    assert two.metadata["weights"] == misc.file_hash(weights["inception"]) and two.metadata["features"] == "inception"
    done = run("fid.py", "--ref_path", tmp_path / "one.npz", "--img_folder", folders["other"], *shared)
    assert "2 images (images) for 2,048 features" in done.stderr and "3 images (reference)" in done.stderr
    assert "not the published file" in done.stderr
    assert float(done.stdout) == pytest.approx(fid.frechet_distance(one, other), rel=1e-3)


def test_features_that_are_not_finite_are_an_error(weights):
    damaged = fid.Inception(CPU, weights["inception"], "")
    next(damaged.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="the features inception are not finite"):
        fid.measure(in_memory(golden_images("one", (3, 3, 32, 32))), damaged)


def test_foreign_weights_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match="does not hold the weights of FID's InceptionV3.*Conv2d_1a"):
        fid.Inception(CPU, weights["vgg"], "")
    (tmp_path / "x.pth").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="does not hold the weights"):
        fid.Inception(CPU, tmp_path / "x.pth", "")


def test_a_subset_is_the_same_on_any_number_of_ranks(tmp_path):
    folder = write_folder(tmp_path / "images", images())
    for ranks in (1, 2):
        where = ["--mode", "gen", "--img_folder", folder, "--dest", tmp_path / f"{ranks}.npz"]
        # Without `--` torchrun takes --num for an abbreviation of a flag of its own.
        launch("--", "fid.py", *where, "--num", "20", "--seed", "3", "--metrics", "pr", ranks=ranks)
    one, two = (fid.read_statistics(tmp_path / f"{ranks}.npz", features=True) for ranks in (1, 2))
    assert np.array_equal(one.sigma, two.sigma) and torch.equal(one.features, two.features)
    assert one.metadata["n"] == 20 and one.metadata["subset"] == {"of": 37, "seed": 3}
    rows = {tuple(x) for x in (images().flatten(1) / 255).tolist()}
    chosen = {tuple(x) for x in one.features.tolist()}
    assert len(chosen) == 20 and chosen <= rows
    assert fid.subset(37, 20, 3) != fid.subset(37, 20, 4)
    assert len(set(fid.subset(2**31, 20, 3))) == 20  # without a list of them all


def test_statistics_files_of_other_tools_are_read(tmp_path):
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(4), covariance(rng, 4)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    found = fid.read_statistics(tmp_path / "theirs.npz")
    assert np.array_equal(found.mu, mu) and np.array_equal(found.sigma, sigma) and found.metadata == {}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "not a statistics file"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "does not hold finite statistics"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "does not hold finite statistics"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 1], [0, 1]])}, "sigma is not symmetric"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "does not hold finite statistics"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "not a statistics file"),
        ({"mu": np.zeros(2, complex), "sigma": np.eye(2)}, "not a statistics file"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma has negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [2, 1]])}, "sigma has negative eigenvalues"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": '{"made_by": 3}'}, "not a statistics file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": '{"made_by": {"config": {"data": 1}}}'}, "not a statistics file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": '{"subset": [1]}'}, "not a statistics file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": "[1]"}, "not a statistics file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds no features"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((5, 4))}, "does not hold finite features"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        fid.read_statistics(tmp_path / "x.npz", features=True)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.mkdir(), "x is a folder: fid.py --mode gen --img_folder .*x --dest x.npz makes statistics of images"),
        (
            lambda p: np.save(p.open("wb"), np.zeros((5, 4))),
            r"it holds one array \(5, 4\); fid.py --mode ref or --mode gen makes one",
        ),
        (
            lambda p: np.savez(p.open("wb"), m=np.zeros(3), s=np.eye(3)),
            "it holds m, s; fid.py --mode ref or --mode gen makes one",
        ),
        (lambda p: np.savez(p.open("wb"), arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "it holds arr_0; fid.py"),
        (lambda p: None, "there is no file .*x: make it with fid.py --mode ref or --mode gen"),
    ],
)
def test_what_is_no_statistics_file_is_called_what_it_is(tmp_path, write, message):
    write(tmp_path / "x")
    with pytest.raises(UserError, match=message) as caught:
        fid.read_statistics(tmp_path / "x")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- distance


def test_distance_of_equal_gaussians_is_zero():
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(20), covariance(rng, 20)
    assert 0 <= distance(mu, sigma, mu, sigma) < 1e-9


def test_distance_of_shifted_gaussians_is_the_squared_shift():
    rng = np.random.default_rng(0)
    sigma, shift = covariance(rng, 20), rng.standard_normal(20)
    assert distance(shift, sigma, 0 * shift, sigma) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_distance_of_diagonal_covariances_is_that_of_their_roots():
    rng = np.random.default_rng(0)
    a, b, mu = rng.random(20), rng.random(20), np.zeros(20)
    a[:5] = b[3:8] = 0  # zero rows, together and alone
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_rotated_rank_deficient_gaussians():
    """On orthogonal subspaces no mass is shared: the distance is the sum of the traces."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    a, b, mu = q[:, :10] @ q[:, :10].T, 2 * q[:, 10:25] @ q[:, 10:25].T, np.zeros(30)
    assert distance(mu, a, mu, b) == pytest.approx(10 + 30, rel=1e-9)
    assert 0 <= distance(mu, a, mu, a) < 1e-9


@pytest.mark.parametrize("rank", [None, 7])
def test_distance_is_symmetric_and_agrees_with_singular_values(rank):
    """tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2)."""
    rng = np.random.default_rng(0)
    a, b, mu, nu = covariance(rng, 20, rank), covariance(rng, 20), rng.standard_normal(20), rng.standard_normal(20)

    def root(m):
        values, vectors = np.linalg.eigh(m)
        return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T

    singular = scipy.linalg.svdvals(root(a) @ root(b)).sum()
    expected = ((mu - nu) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * singular
    assert distance(mu, a, nu, b) == pytest.approx(expected, rel=1e-6)
    assert distance(nu, b, mu, a) == pytest.approx(expected, rel=1e-6)


def test_distance_of_nearly_singular_covariances_keeps_its_digits():
    """Spectra over twelve orders of magnitude, the same axes: the distance of diagonal covariances."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    a, b = np.logspace(0, -12, 60), np.logspace(-12, 0, 60)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    rotated = ((q * values) @ q.T for values in (a, b))
    rotated = [(m + m.T) / 2 for m in rotated]
    assert distance(np.zeros(60), rotated[0], np.zeros(60), rotated[1]) == pytest.approx(expected, rel=1e-6)


def test_no_score_is_printed_as_minus_zero():
    assert [fid.show(x) for x in (-0.0, -1e-9, 0.0, 1.23456, -0.5)] == ["0.0000", "0.0000", "0.0000", "1.2346", "-0.5000"]


# ----------------------------------------------------------------------------------------------- kid, precision, recall


def test_kid_is_the_mean_of_brute_force_estimates_over_blocks():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 5, generator=generator), torch.rand(31, 5, generator=generator)
    value, error = fid.kid(x, y)

    def shuffled(z, seed):
        return np.array_split(z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))].double().numpy(), 10)

    k = lambda a, b: (a @ b / 5 + 1) ** 3
    estimates = []
    for a, b in zip(shuffled(x, 0), shuffled(y, 1)):
        aa = np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j])
        bb = np.mean([k(p, q) for i, p in enumerate(b) for j, q in enumerate(b) if i != j])
        estimates.append(aa + bb - 2 * np.mean([k(p, q) for p in a for q in b]))
    assert value == pytest.approx(np.mean(estimates), rel=1e-9)
    assert error == pytest.approx(np.std(estimates, ddof=1) / 10**0.5, rel=1e-9)


def test_kid_is_unbiased_and_its_standard_error_is_honest():
    """In one dimension the kernel is (xy + 1)^3, whose discrepancy is the sum of C(3, p) (difference of p-th moments)^2."""
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        x, y = rng.standard_normal((60, 1)), 0.5 + 0.7 * rng.standard_normal((50, 1))
        value, error = fid.kid(torch.from_numpy(x), torch.from_numpy(y))
        values.append(value)
        errors.append(error)
    m, s2 = 0.5, 0.49
    moments = np.array([m, m**2 + s2 - 1, m**3 + 3 * m * s2])
    exact = (np.array([3, 3, 1]) * moments**2).sum()
    assert np.mean(values) == pytest.approx(exact, abs=4 * np.std(values) / 300**0.5)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(values), rel=0.4)
    assert abs(np.mean(values) - exact) < 0.25 * np.std(values)  # a biased estimate would be off by more


def test_kid_of_images_that_correspond_is_not_biased():
    """Such as two models' images of the same seeds: a common shuffle would put each into its counterpart's block.

    With blocks of 50 that bias would be 40 times that of 2,000 dependent pairs, and 30 standard errors.
    """
    values, errors = [], []
    for seed in range(10):
        x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(seed))
        value, error = fid.kid(x, x + 1e-3, block=50)
        values.append(value)
        errors.append(error)
    assert abs(np.mean(values)) < 2 * np.mean(errors)


@pytest.mark.parametrize("block", [4, 2000])
def test_precision_and_recall_are_those_of_brute_force(block):
    rng = np.random.default_rng(0)
    real, fake = (
        rng.integers(0, 4, (40, 3)).astype(float),
        rng.integers(1, 6, (30, 3)).astype(float),
    )  # with duplicates and ties

    def brute(centres, points):
        inside = 0
        for p in points:
            for i, c in enumerate(centres):
                reach = sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[2]
                if np.linalg.norm(p - c) <= reach + 1e-9:
                    inside += 1
                    break
        return inside / len(points)

    found = fid.precision_recall(torch.from_numpy(real).float(), torch.from_numpy(fake).float(), block=block)
    assert found == pytest.approx((brute(real, fake), brute(fake, real)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_precision_and_recall_of_equal_far_and_nested_sets():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert fid.precision_recall(x, x.clone()) == (1, 1)
    assert fid.precision_recall(x, x + 100) == (0, 0)
    same = torch.ones(20, 4)  # every reach is zero: equal images are within it all the same
    assert fid.precision_recall(same, same.clone()) == (1, 1)
    narrow = 0.01 * x  # a generator of averages: precise, and covering little
    precision, recall = fid.precision_recall(x, narrow)
    assert precision > 0.9 and recall < 0.1


def test_scores_need_enough_images():
    with pytest.raises(UserError, match="kid needs 20 images or more"):
        fid.kid(torch.zeros(19, 2), torch.zeros(99, 2))
    with pytest.raises(UserError, match="kid needs 60 images or more"):  # else a block would hold very many of one set
        fid.kid(torch.zeros(59, 2), torch.zeros(30_000, 2))
    with pytest.raises(UserError, match="more than 3 images"):
        fid.precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))


# -------------------------------------------------------------------------------------------------------- comparability


def described(**change):
    return {"n": 5000, "image": [3, 32, 32], "features": "inception", "weights": "a", "precision": "float32", **change}


@pytest.mark.parametrize(
    "change", [{"features": "pixels"}, {"weights": "b"}, {"image": [3, 64, 64]}, {"preprocessing": "x"}, {"precision": "half"}]
)
def test_statistics_made_differently_are_not_compared_unless_forced(change, capsys):
    reference = fid.Statistics(np.zeros(4), np.eye(4), described(preprocessing="y"))
    other = described(preprocessing="y") | change
    with pytest.raises(UserError, match=f"{next(iter(change))}.*--force"):
        fid.check_comparable(reference, 4, other)
    fid.check_comparable(reference, 4, other, force=True)
    assert "warning: comparing what differs" in capsys.readouterr().err
    with pytest.raises(UserError, match="has 4 features and the images 5"):
        fid.check_comparable(reference, 5, other, force=True)


def test_the_number_of_images_may_differ_and_silence_is_warned_of(capsys):
    reference = fid.Statistics(np.zeros(4), np.eye(4), described())
    fid.check_comparable(reference, 4, described(n=3000))
    assert capsys.readouterr().err == ""
    fid.check_comparable(reference, 4, {})
    assert "statistics of the images do not say how they were made" in capsys.readouterr().err
    fid.check_comparable(reference, 4, described(n=100))
    assert "100 images (images) for 2,048 features" in capsys.readouterr().err


def test_features_follow_the_data_and_the_reference():
    ours, theirs = gaussian(np.zeros(4), np.eye(4)), gaussian(np.zeros(2048), np.eye(1))
    ours.metadata = {"features": "pixels"}
    chosen = [fid.choose_features("auto", channels) for channels in (1, 3)]
    assert chosen == ["pixels", "inception"] and fid.choose_features("pixels", 3) == "pixels"
    assert fid.choose_features("auto", 3, ours) == "pixels" and fid.choose_features("auto", 1, theirs) == "inception"
    with pytest.raises(UserError, match="--features is inception, but the reference holds pixels"):
        fid.choose_features("inception", 3, ours)


# --------------------------------------------------------------------------------------------------------------- fid.py


def test_fid_prints_one_number_and_appends_a_row(tmp_path):
    write_folder(tmp_path / "a", images())
    write_folder(tmp_path / "b", images(seed=1))
    config = {"task": {"mode": "denoiser"}, "sampling": {"ode_solver": "heun", "rho": 7.0}}
    record = {"sha256": "abc", "step": 7, "nfe": 3, "start_seed": 0, "end_seed": 36, "config": config}
    (tmp_path / "b" / "eval.json").write_text(json.dumps(record))
    run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "a", "--dest", tmp_path / "a.npz")
    run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "b", "--dest", tmp_path / "b.npz")
    shared = ["fid.py", "--mode", "fid", "--ref_path", tmp_path / "a.npz", "--csv", tmp_path / "stats.csv"]
    first = run(*shared, "--stat_path", tmp_path / "b.npz").stdout
    second = run(*shared, "--img_folder", tmp_path / "b", ranks=2).stdout
    a, b = (x.flatten(1).numpy() / 255 for x in (images(), images(seed=1)))
    expected = distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert first == second == f"{expected:.4f}\n"
    rows = list(csv.DictReader((tmp_path / "stats.csv").read_text().splitlines()))
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["source"] == str(tmp_path / "b") and rows[0]["ref_path"] == str(tmp_path / "a.npz")
    assert rows[0]["image"] == "1x6x5" and rows[0]["subset_seed"] == rows[0]["forced"] == ""
    assert rows[0]["FID"] == first.strip() and rows[0]["solver"] == "heun" and rows[0]["nfe"] == "3" and rows[0]["n"] == "37"
    (tmp_path / "link.csv").symlink_to("stats.csv")
    run(*shared[:-1], tmp_path / "link.csv", "--stat_path", tmp_path / "b.npz")
    assert (tmp_path / "link.csv").is_symlink() and len((tmp_path / "stats.csv").read_text().splitlines()) == 4
    assert rows[0]["rho"] == "7.0" and rows[0]["reference"] == misc.file_hash(tmp_path / "a.npz")


def test_a_row_tells_a_subset_and_a_forced_comparison(tmp_path):
    """Another subset is another score: without its seed the row could not be repeated."""
    write_folder(tmp_path / "a", images())
    run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "a", "--dest", tmp_path / "a.npz")
    shared = ["fid.py", "--ref_path", tmp_path / "a.npz", "--csv", tmp_path / "t.csv", "--img_folder", tmp_path / "a"]
    run(*shared, "--num", "20", "--seed", "3", "--force")
    (row,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (row["n"], row["subset_of"], row["subset_seed"], row["forced"]) == ("20", "37", "3", "True")


def test_reference_statistics_of_the_digits(tmp_path):
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "d.npz")
    found = fid.read_statistics(tmp_path / "d.npz")
    assert found.metadata["n"] == 1797 and len(found.mu) == 64
    assert np.trace(found.sigma) == pytest.approx(4.69, abs=0.01)
    assert (np.diag(found.sigma) == 0).sum() == 3  # pixels that are always empty


def test_several_scores_are_printed_by_name(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_folder(tmp_path / name, images(seed=seed))
        where = ["--img_folder", tmp_path / name, "--dest", tmp_path / f"{name}.npz"]
        run("fid.py", "--mode", "gen", *where, "--metrics", "fid,kid,pr")
    shared = ["fid.py", "--ref_path", tmp_path / "a.npz", "--metrics", "fid,kid,pr", "--csv", tmp_path / "t.csv"]
    first = run(*shared, "--stat_path", tmp_path / "b.npz").stdout
    second = run(*shared, "--img_folder", tmp_path / "b", ranks=2).stdout
    x, y = (images(seed=seed).flatten(1) / 255 for seed in (0, 1))
    expected = [fid.frechet_distance(*(fid.read_statistics(tmp_path / f"{name}.npz") for name in "ab"))]
    expected += [*fid.kid(x, y), *fid.precision_recall(x, y)]
    names = ("fid", "kid", "kid_stderr", "precision", "recall")
    assert first == second == "".join(f"{name} {value:.4f}\n" for name, value in zip(names, expected))
    row = next(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [float(row[name]) for name in names[1:]] == pytest.approx(expected[1:], abs=1e-7)
    zero = run("fid.py", "--ref_path", tmp_path / "a.npz", "--stat_path", tmp_path / "a.npz").stdout
    assert zero == "0.0000\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_straight_from_the_model_have_the_statistics_of_its_files(trained, tmp_path, ranks):
    model = ["--checkpoint", trained["characteristic"], "--num_steps", "2", "--end_seed", "10", "--eval_bsz", "3"]
    run("eval.py", *model, "--workdir", tmp_path / "images", ranks=ranks)
    run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "images", "--dest", tmp_path / "files.npz", ranks=ranks)
    run("fid.py", "--mode", "gen", *model, "--dest", tmp_path / "straight.npz", ranks=ranks)
    files, straight = (fid.read_statistics(tmp_path / f"{name}.npz") for name in ("files", "straight"))
    assert np.array_equal(files.mu, straight.mu) and np.array_equal(files.sigma, straight.sigma)
    assert files.metadata["made_by"] == straight.metadata["made_by"] and straight.metadata["n"] == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files.npz", "images", "straight.npz"]


UNFINISHED = {"start_seed": 0, "end_seed": 9}


def bad_image(write, name="z.png"):
    """A folder of five good images and a bad one."""

    def make(folder):
        write_folder(folder, images(5))
        write(folder / name)

    return make


def array(**arrays):
    def make(path):
        np.savez(path.with_suffix(".npz"), **arrays)

    return make


def locked_zip(path):
    """A zip whose only image says that it is encrypted."""
    write_folder(path.with_name("locked"), images(1))
    data = bytearray(Path(shutil.make_archive(path, "zip", path.with_name("locked"))).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)


def cut_array(path):
    """An npz that holds fewer bytes than the shape of its array asks for."""
    np.savez(path.with_suffix(".npz"), arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    data = path.with_suffix(".npz").read_bytes().replace(b"(5, 8, 8, 3)", b"(9, 8, 8, 3)")
    path.with_suffix(".npz").write_bytes(data)


BAD_SETS = {
    "missing": (lambda p: None, "there is no folder or zip of images"),
    "empty": (lambda p: p.mkdir(), "no images in"),
    "empty but for others": (lambda p: [p.mkdir(), (p / "a.txt").touch()], "among 1 files, such as a.txt"),
    "one image": (lambda p: write_folder(p, images(1)), "1 image: a covariance needs two or more"),
    "sizes": (bad_image(lambda p: misc.write_png(p, images(1, (1, 4, 4))[0])), "among the 6 in"),
    "turned": (bad_image(lambda p: misc.write_png(p, images(1, (1, 5, 6))[0])), "000000.png is 6x5x1, z.png is 5x6x1"),
    "grey and colour": (bad_image(lambda p: misc.write_png(p, images(1, (3, 6, 5))[0])), "z.png is 6x5x3"),
    "truncated": (
        bad_image(lambda p: p.write_bytes((p.parent / "000000.png").read_bytes()[:-30])), "cannot read image z.png, one of 6"
    ),
    "cut after its signature": (bad_image(lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n")), "cannot read image z.png, one of 6"),
    "no image": (bad_image(lambda p: p.write_text("hello")), "z.png, one of 6 in"),
    "unfinished": (bad_image(lambda p: misc.write_json(p, UNFINISHED), "eval.json"), "holds 5 of the 10 images"),
    "record of another kind": (bad_image(lambda p: misc.write_json(p, {**UNFINISHED, "config": 3}), "eval.json"), "is damaged"),
    "locked": (lambda p: locked_zip(p), "is encrypted"),
    "array cut short": (cut_array, "npz file with an array `arr_0`"),
    "transparent": (bad_image(lambda p: Image.new("RGBA", (5, 6)).save(p)), "it has transparent pixels"),
    "16 bits": (bad_image(lambda p: p.write_bytes(rgb16())), "it has 16 bits"),
    "array of floats": (array(arr_0=np.zeros((5, 4, 4, 3))), "expected uint8 images (N, H, W, 1 or 3)"),
    "array of channels first": (array(arr_0=np.zeros((5, 3, 8, 8), np.uint8)), "expected uint8 images"),
    "array by another name": (array(images=np.zeros((5, 8, 8, 3), np.uint8)), "npz file with an array `arr_0`"),
    "array of objects": (array(arr_0=np.array([None])), "npz file with an array `arr_0`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_sets_of_images_end_with_one_line(tmp_path, name):
    make, message = BAD_SETS[name]
    make(tmp_path / "x")
    source = tmp_path / "x.npz" if "array" in name else tmp_path / "x"
    done = run("fid.py", "--mode", "gen", "--img_folder", source, "--dest", tmp_path / "s.npz", expect=2)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("name", ["truncated", "sizes", "one image", "empty", "16 bits"])
def test_bad_sets_end_all_ranks_with_one_line(tmp_path, name):
    """The bad image is the sixth, which the second rank reads, and the first does not."""
    make, message = BAD_SETS[name]
    make(tmp_path / "x")
    done = run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "x", "--dest", tmp_path / "s.npz", ranks=2, expect=2)
    assert done.stderr.count("error: ") == 1 and message in done.stderr and not (tmp_path / "s.npz").exists()


def test_a_stray_file_is_passed_over_and_counted(tmp_path):
    bad_image(lambda p: p.touch(), "notes.txt")(tmp_path / "x")
    done = run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "x", "--dest", tmp_path / "s", ranks=2)
    assert done.stderr.count("holds 5 images and 1 other files, such as notes.txt: passed over") == 1
    assert fid.read_statistics(tmp_path / "s.npz").metadata["n"] == 5


def test_errors_in_reading_processes_are_one_line_too(tmp_path):
    BAD_SETS["truncated"][0](tmp_path / "x")
    where = ["--img_folder", tmp_path / "x", "--dest", tmp_path / "s.npz", "--num_workers", "2"]
    done = run("fid.py", "--mode", "gen", *where, expect=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot read image z.png, one of 6"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_with_other_columns_is_left_alone(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    (tmp_path / "t.csv").write_text("a,b\n")
    shared = ["--ref_path", tmp_path / "a.npz", "--stat_path", tmp_path / "a.npz", "--csv", tmp_path / "t.csv"]
    done = run("fid.py", *shared, expect=2)
    assert "has other columns" in done.stderr and (tmp_path / "t.csv").read_text() == "a,b\n" and done.stdout == ""
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    assert "cannot read --csv" in run("fid.py", *shared, expect=2).stderr


def test_a_constant_set_has_statistics_that_are_read(tmp_path):
    write_folder(tmp_path / "a", torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "a", "--dest", tmp_path / "a.npz")
    assert run("fid.py", "--ref_path", tmp_path / "a.npz", "--stat_path", tmp_path / "a.npz").stdout == "0.0000\n"


def test_the_ending_of_a_statistics_file_is_added(tmp_path):
    """So that `--dest stats/x` and `--ref_path stats/x.npz` are one file, as in the reference's README."""
    done = run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "stats" / "x")
    assert done.stdout == f"{tmp_path}/stats/x.npz\n" and [p.name for p in (tmp_path / "stats").iterdir()] == ["x.npz"]
    again = ["--ref_path", tmp_path / "stats" / "x.npz", "--stat_path", tmp_path / "stats" / "x.npz"]
    assert run("fid.py", "--mode", "fid", *again).stdout == "0.0000\n"


def test_a_row_begins_on_a_line_of_its_own(tmp_path):
    """Also where somebody's editor took the last newline away."""
    (tmp_path / "a.npz").touch()
    for _ in range(3):
        row = fid.table_row({"fid": 1.5}, {"n": 7}, tmp_path / "a")
        fid.append_row(tmp_path / "t.csv", row)
        (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().rstrip("\n"))
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [(row["FID"], row["n"]) for row in rows] == [("1.5000", "7")] * 3


def test_two_that_add_a_row_at_the_same_time_take_turns(tmp_path):
    (tmp_path / "a.npz").touch()
    first, second = (fid.table_row({"fid": value}, {"n": 7}, tmp_path / "a") for value in (1.5, 2.5))
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as append_row() holds it
    other = threading.Thread(target=fid.append_row, args=(tmp_path / "t.csv", second))
    other.start()
    other.join(0.3)
    assert other.is_alive()
    fid.write_table(tmp_path / "t.csv", [first])
    os.close(handle)
    other.join()
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["FID"] for row in rows] == ["1.5000", "2.5000"]


def test_a_folder_whose_name_is_not_text_has_a_row(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write_folder(folder, images())
    run("fid.py", "--mode", "gen", "--img_folder", folder, "--dest", tmp_path / "a")
    shared = ["fid.py", "--ref_path", tmp_path / "a.npz", "--csv", tmp_path / "t.csv"]
    for source in (["--img_folder", folder], ["--stat_path", tmp_path / "a.npz"]):
        assert run(*shared, *source).stdout == "0.0000\n"
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["source"] for row in rows] == [f"{tmp_path}/\\udcff"] * 2


def score_of(folder, reference):
    """The distance of a folder's images to the statistics in a file, as fid.py computes it."""
    settings = defaults.FidRun(ref_path=str(reference), img_folder=str(folder))
    found = fid.read_statistics(reference)
    return fid.frechet_distance(found, fid.make_statistics(settings, {}, ["fid"], CPU, found))


def test_grey_pictures_that_were_saved_as_colour_have_the_score_of_the_grey_ones(tmp_path):
    reference, grey = images(), images(seed=1)
    fid.write_statistics(tmp_path / "a.npz", fid.measure(reference, fid.load_features("pixels")))
    write_folder(tmp_path / "grey", grey)
    write_folder(tmp_path / "rgb", grey.expand(-1, 3, -1, -1))
    assert score_of(tmp_path / "rgb", tmp_path / "a.npz") == score_of(tmp_path / "grey", tmp_path / "a.npz") > 0
    coloured = grey[5].expand(3, -1, -1).clone()
    coloured[0, 0, 0] ^= 1
    misc.write_png(tmp_path / "rgb" / "000005.png", coloured)
    done = run("fid.py", "--ref_path", tmp_path / "a.npz", "--img_folder", tmp_path / "rgb", expect=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "grey" in lines[0] and "000005.png has colours" in lines[0] and done.stdout == ""
    np.savez(tmp_path / "rgb.npz", arr_0=grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert score_of(tmp_path / "rgb.npz", tmp_path / "a.npz") == score_of(tmp_path / "grey", tmp_path / "a.npz")
