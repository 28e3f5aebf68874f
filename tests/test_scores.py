"""Statistics of images and the distance between them."""

import csv
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import misc
from conftest import run


def images(n=37, shape=(1, 6, 5), seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_folder(folder, batch, classes=None):
    for i, image in enumerate(batch):
        place = folder / (f"class{i % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        misc.write_png(place / f"{i:06d}.png", image)
    return folder


def covariance(rng, d, rank=None):
    a = rng.standard_normal((d, rank or 2 * d))
    return a @ a.T / a.shape[1]


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_statistics_on_any_number_of_ranks_are_those_of_numpy(tmp_path, ranks):
    """37 images do not divide by 2 or 3: none may be counted twice or left out."""
    batch = images()
    folder = write_folder(tmp_path / "images", batch, classes=2)
    run("fid.py", "--mode", "gen", "--img_folder", folder, "--dest", tmp_path / "s.npz", ranks=ranks)
    mu, sigma, metadata = misc.read_statistics(tmp_path / "s.npz")
    x = batch.flatten(1).numpy() / 255
    assert mu.dtype == sigma.dtype == np.float64 and metadata["n"] == 37
    np.testing.assert_allclose(mu, x.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.T), rtol=0, atol=1e-12)


def test_statistics_do_not_depend_on_the_batch_size():
    dataset = misc.MemoryImages(images(), torch.zeros(37))
    _, mu, sigma = misc.statistics(dataset, bsz=37)
    for bsz in (1, 5, 500):
        _, mu2, sigma2 = misc.statistics(dataset, bsz=bsz)
        assert np.array_equal(mu, mu2) and np.array_equal(sigma, sigma2)


def test_flat_and_class_folders_and_zips_hold_the_same_images(tmp_path):
    import shutil

    batch = images(8, (3, 4, 4))
    flat, classes = write_folder(tmp_path / "flat", batch), write_folder(tmp_path / "classes", batch, classes=3)
    archive = shutil.make_archive(tmp_path / "zip", "zip", classes)
    sets = [misc.ImageFiles(p) for p in (flat, classes, archive)]
    sums = [s.__getitems__(list(range(8)))[0].long().sum(0) for s in sets]
    assert torch.equal(sums[0], batch.long().sum(0)) and torch.equal(sums[1], sums[0]) and torch.equal(sums[2], sums[0])
    assert (
        sets[0].labels.tolist() == [0] * 8 and sets[1].labels.tolist() == sets[2].labels.tolist() == [0] * 3 + [1] * 3 + [2] * 2
    )


def test_statistics_files_of_other_tools_are_read(tmp_path):
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(4), covariance(rng, 4)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    assert all(np.array_equal(a, b) for a, b in zip(misc.read_statistics(tmp_path / "theirs.npz"), (mu, sigma, {})))


# ------------------------------------------------------------------------------------------------------ distance


def test_distance_of_equal_gaussians_is_zero():
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(20), covariance(rng, 20)
    assert 0 <= misc.frechet_distance(mu, sigma, mu, sigma) < 1e-9


def test_distance_of_shifted_gaussians_is_the_squared_shift():
    rng = np.random.default_rng(0)
    sigma, shift = covariance(rng, 20), rng.standard_normal(20)
    assert misc.frechet_distance(shift, sigma, 0 * shift, sigma) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_distance_of_diagonal_covariances_is_that_of_their_roots():
    rng = np.random.default_rng(0)
    a, b, mu = rng.random(20), rng.random(20), np.zeros(20)
    a[:5] = b[3:8] = 0  # zero rows, together and alone
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert misc.frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_rotated_rank_deficient_gaussians():
    """On orthogonal subspaces no mass is shared: the distance is the sum of the traces."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    a, b, mu = q[:, :10] @ q[:, :10].T, 2 * q[:, 10:25] @ q[:, 10:25].T, np.zeros(30)
    assert misc.frechet_distance(mu, a, mu, b) == pytest.approx(10 + 30, rel=1e-9)
    assert 0 <= misc.frechet_distance(mu, a, mu, a) < 1e-9


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
    assert misc.frechet_distance(mu, a, nu, b) == pytest.approx(expected, rel=1e-6)
    assert misc.frechet_distance(nu, b, mu, a) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ fid.py


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
    expected = misc.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert first == second == f"{expected:.4f}\n"
    rows = list(csv.DictReader((tmp_path / "stats.csv").read_text().splitlines()))
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["FID"] == first.strip() and rows[0]["solver"] == "heun" and rows[0]["nfe"] == "3" and rows[0]["n"] == "37"
    assert rows[0]["rho"] == "7.0" and rows[0]["reference"] == misc.file_hash(tmp_path / "a.npz")


def test_reference_statistics_of_the_digits(tmp_path):
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "d.npz")
    mu, sigma, metadata = misc.read_statistics(tmp_path / "d.npz")
    assert metadata["n"] == 1797 and len(mu) == 64
    assert np.trace(sigma) == pytest.approx(4.69, abs=0.01)
    assert (np.diag(sigma) == 0).sum() == 3  # pixels that are always empty


UNFINISHED = {"start_seed": 0, "end_seed": 9}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "neither a folder nor a zip"),
        (lambda p: p.mkdir(), "no images in"),
        (lambda p: write_folder(p, images(1)), "1 image: a covariance needs two or more"),
        (lambda p: [write_folder(p, images(5)), misc.write_png(p / "z.png", images(1, (1, 4, 4))[0])], "different sizes"),
        (lambda p: [write_folder(p, images(5)), (p / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n")], "cannot read image z.png"),
        (lambda p: [write_folder(p, images(5)), misc.write_png(p / "z.png", images(1, (1, 5, 6))[0])], "different sizes"),
        (lambda p: [write_folder(p, images(5)), misc.write_json(p / "eval.json", UNFINISHED)], "holds 5 of the 10 images"),
        (lambda p: [write_folder(p, images(5)), Image.new("RGBA", (5, 6)).save(p / "z.png")], "mode RGBA"),
    ],
)
def test_bad_folders_end_with_one_line(tmp_path, make, message):
    make(tmp_path / "x")
    done = run("fid.py", "--mode", "gen", "--img_folder", tmp_path / "x", "--dest", tmp_path / "s.npz", expect=2)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "s.npz").exists()


def test_an_error_on_one_rank_alone_ends_all_ranks_with_one_line(tmp_path):
    folder = write_folder(tmp_path / "x", images(6))
    (folder / "000003.png").write_bytes(b"broken")  # rank 1 reads it
    done = run("fid.py", "--mode", "gen", "--img_folder", folder, "--dest", tmp_path / "s.npz", ranks=2, expect=1)
    assert done.stderr.count("error: cannot read image 000003.png") == 1
    assert not (tmp_path / "s.npz").exists()
