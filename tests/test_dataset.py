"""Images in: files of every kind, class folders, zips and arrays, pixels, and batches in their order."""

from dist_util import UserError

import ctypes
import gzip
import io
import json
import os
import re
import shutil
import struct
import zipfile
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import dataset
import defaults
import misc
from conftest import TINY_NETWORK, TINY_RUN, images, in_memory, rgb16, run, tiny_config, write_folder
from processes import Job

# ---------------------------------------------------------------------------------------------------------- image files


def test_flat_class_and_nested_folders_zips_and_arrays_hold_the_same_images(tmp_path):
    batch = images(8, (3, 4, 4))
    flat, classes = write_folder(tmp_path / "flat", batch), write_folder(tmp_path / "classes", batch, classes=3)
    shutil.copytree(classes, tmp_path / "nested" / "more" / "deeper")
    archive = shutil.make_archive(tmp_path / "zip", "zip", classes)
    np.savez(tmp_path / "stored.npz", arr_0=batch.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "packed.npz", batch.permute(0, 2, 3, 1).numpy(), np.zeros(8))  # guided-diffusion: labels too
    paths = (flat, classes, tmp_path / "nested", archive, tmp_path / "stored.npz", tmp_path / "packed.npz")
    sets = [dataset.open_images(p)[0] for p in paths]
    for one in sets:
        assert one.shape == (3, 4, 4)
        assert torch.equal(one.batch(list(range(8)))[0].long().sum(0), batch.long().sum(0))
    assert sets[0].labels.tolist() == [0] * 8
    assert sets[1].labels.tolist() == sets[3].labels.tolist() == [0] * 3 + [1] * 3 + [2] * 2


def test_pictures_are_converted_without_loss(tmp_path):
    """Black and white, grey with alpha, palettes and opaque RGBA: the same pixels as 8-bit grey or RGB."""
    rgb = Image.fromarray(images(1, (3, 6, 5))[0].permute(1, 2, 0).numpy())
    grey = Image.fromarray(images(1, (1, 6, 5))[0, 0].numpy())
    palette = rgb.quantize(8)
    opaque, grey_opaque = rgb.copy(), grey.copy()
    opaque.putalpha(255)
    grey_opaque.putalpha(255)
    cases = {
        "rgb": (rgb, rgb), "grey": (grey, grey), "palette": (palette, palette.convert("RGB")), "opaque": (opaque, rgb),
        "grey-opaque": (grey_opaque, grey), "bits": (grey.convert("1"), grey.convert("1").convert("L")),
    }  # fmt: skip
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / f"{name}.png")
        found = dataset.decode((tmp_path / f"{name}.png").read_bytes())
        assert found.mode == expected.mode and found.tobytes() == expected.tobytes(), name


def test_only_the_documented_formats_are_decoded(tmp_path):
    Image.new("RGB", (5, 6)).save(tmp_path / "x.png", format="TIFF")
    with pytest.raises(OSError, match="cannot identify"):
        dataset.decode((tmp_path / "x.png").read_bytes())


def test_a_link_that_leads_back_does_not_repeat_images(tmp_path):
    write_folder(tmp_path / "a", images(4), classes=2)
    (tmp_path / "a" / "class0" / "again").symlink_to(tmp_path / "a")
    assert len(dataset.ImageFiles(tmp_path / "a")) == 4


def test_of_a_folder_and_a_link_to_it_the_first_name_counts(tmp_path, monkeypatch):
    """In whatever order the file system lists them."""
    write_folder(tmp_path / "x" / "b", images(4))
    (tmp_path / "x" / "a").symlink_to(tmp_path / "x" / "b")
    real = os.walk

    def backwards(*args, **options):
        for place, folders, files in real(*args, **options):
            folders.sort(reverse=True)
            yield place, folders, files

    for walk in (real, backwards):
        monkeypatch.setattr(os, "walk", walk)
        found = dataset.ImageFiles(tmp_path / "x")
        assert [name[0] for name in found.names] == ["a"] * 4


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(rgb16()), "16 bits"),
        (lambda p: Image.fromarray(np.full((6, 5), 40000, np.uint16)).save(p), "16 bits"),
        (lambda p: Image.new("RGBA", (5, 6), (1, 2, 3, 254)).save(p), "transparent"),
        (lambda p: Image.new("LA", (5, 6), (1, 0)).save(p), "transparent"),
        (lambda p: Image.new("P", (5, 6)).save(p, transparency=0), "transparent"),
        (lambda p: Image.new("RGB", (5, 6)).save(p, transparency=(0, 0, 0)), "transparent"),
        (lambda p: Image.new("CMYK", (5, 6)).save(p, format="JPEG"), "mode CMYK"),
        (lambda p: Image.new("L", (5, 6)).save(p, save_all=True, append_images=[Image.new("L", (5, 6), 9)]), "2 frames"),
    ],
)
def test_pictures_that_would_lose_something_are_refused(tmp_path, write, message):
    write(tmp_path / "x.png")
    with pytest.raises(ValueError, match=message):
        dataset.decode((tmp_path / "x.png").read_bytes())


def test_the_fingerprint_of_images_tells_others_apart_and_a_zip_from_its_folder_not(tmp_path):
    for name, level in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name / "x").mkdir(parents=True)
        for i in range(70):
            shade = level if i == 35 else i
            Image.new("L", (4, 4), shade).save(tmp_path / name / "x" / f"{i:03d}.png")
        shutil.make_archive(tmp_path / name, "zip", tmp_path / name)
    found = {path.name: dataset.ImageFiles(path, 4, 1).fingerprint() for path in tmp_path.iterdir()}
    assert found["a"] == found["b"] == found["a.zip"] != found["c"] == found["c.zip"]
    (tmp_path / "b" / "x" / "035.png").rename(tmp_path / "b" / "x" / "100.png")
    assert dataset.ImageFiles(tmp_path / "b", 4, 1).fingerprint() != found["a"]
    images, labels = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4), torch.tensor([0, 1])
    variants = [(images, labels), (images.flip(0), labels), (images, labels.flip(0))]
    assert len({dataset.MemoryImages(*variant).fingerprint() for variant in variants}) == 3


# -------------------------------------------------------------------------------------------------------------- classes


def zip_of(path, names, labels=..., picture=None):
    """A zip of small pictures by these names, exactly as they are written, and a dataset.json with `labels` if given."""
    picture = picture or encoded(Image.new("L", (4, 4)))
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), picture)
        if labels is not ...:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


EDM_NAMES = [f"00000/img{i:08d}.png" for i in range(4)]


@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_dataset_json_are_the_classes(tmp_path, packed):
    """As EDM packs its data: all images in one folder, and the classes in that file."""
    path = zip_of(tmp_path / "data.zip", EDM_NAMES, list(zip(EDM_NAMES, [1, 0, 2, 1])))
    if not packed:
        shutil.unpack_archive(path, tmp_path / "data")
        path = tmp_path / "data"
    found = dataset.ImageFiles(path, 4, 1)
    assert found.names == EDM_NAMES and found.labels.tolist() == [1, 0, 2, 1]
    assert dataset.check_classes(found, 3) == (("0", "1", "2"), (1, 2, 1))
    read = [dataset.open_images(path, labels=labels)[0].labels.tolist() for labels in (True, False)]
    assert read == [[1, 0, 2, 1], [0, 0, 0, 0]]  # to encode them, and to score them


def test_dataset_json_without_labels_is_one_class(tmp_path):
    found = dataset.ImageFiles(zip_of(tmp_path / "data.zip", ["00000/a.png", "00001/b.png"], None), 4, 1)
    assert found.labels.tolist() == [0, 0] and dataset.check_classes(found, 0)[1] == (2,)
    with pytest.raises(UserError, match="--label_dim is 2, but the data has 1 class: found"):
        dataset.check_classes(found, 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[EDM_NAMES[0], 1]], "'00000/img00000001.png' has no label"),
        ([[name, -1] for name in EDM_NAMES], "not class numbers"),
        ([[name, 0.5] for name in EDM_NAMES], "not class numbers"),
        ([[name, [0, 1]] for name in EDM_NAMES], "not class numbers"),
        (3, "dataset.json in .* does not label these images"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_one_line(tmp_path, labels, message):
    with pytest.raises(UserError, match=message) as caught:
        dataset.ImageFiles(zip_of(tmp_path / "data.zip", EDM_NAMES, labels), 4, 1)
    assert "dataset.json in" in str(caught.value) and "\n" not in str(caught.value)


def test_backslashes_in_a_zip_are_folders(tmp_path):
    found = dataset.ImageFiles(zip_of(tmp_path / "data.zip", ["cat\\a.png", "cat\\b.png", "dog\\a.png"]), 4, 1)
    assert found.names == ["cat/a.png", "cat/b.png", "dog/a.png"] and found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("cat", "dog") and found.batch([2])[0].shape == (1, 1, 4, 4)
    with pytest.raises(UserError, match="a path that leads out of it"):
        dataset.ImageFiles(zip_of(tmp_path / "out.zip", ["a.png", "..\\x.png"]), 4, 1)


UNFIT = {
    # what is there: (files, empty folders, what the line says)
    "flat": (["a.png", "b.png"], [], r"has 1 class: found \(no folder\) 2"),
    "only train": (["train/cat/a.png", "train/dog/b.png"], [], "found train 2"),
    "empty class": (["cat/a.png"], ["dog"], "found cat 1, dog 0"),
    "stray picture": (["cat/a.png", "dog/b.png", "c.png"], [], r"pictures beside the class folders: found \(no folder\) 1, ca"),
    "one stray picture": (["cat/a.png", "c.png"], [], r"pictures beside the class folders: found \(no folder\) 1, cat 1"),
    "train and test": (["train/a.png", "test/b.png"], [], "parts of a data set, not classes: found test 1, train 1"),
    "too many": (["a/a.png", "b/b.png", "c/c.png"], [], "has 3 classes: found a 1, b 1, c 1"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", UNFIT)
def test_folders_that_are_not_the_classes_asked_for_are_listed(tmp_path, name, packed):
    files, empty, message = UNFIT[name]
    path = tmp_path / "data"
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path / file)
    for folder in empty:
        (path / folder).mkdir()
    path = shutil.make_archive(tmp_path / "zip", "zip", path) if packed else path
    with pytest.raises(UserError, match="--label_dim is 2, but .*; --data_path names") as caught:
        dataset.check_classes(dataset.ImageFiles(path, 4, 1), 2)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_names_and_counts_of_classes_are_said_and_stored(tmp_path):
    for place in ("cat/1", "cat/2", "dog/1"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / f"{place}.png")
    options = ["--data_name", "folder", "--data_path", tmp_path / "data", "--image_size", "8", "--image_channels", "1"]
    shared = ["train.py", *options, *TINY_NETWORK, *TINY_RUN, "--train_steps", "1", "--label_dim", "2"]
    done = run(*shared, "--workdir", tmp_path / "run")
    assert "classes: cat 2, dog 1" in done.stderr
    plain = json.loads((tmp_path / "run" / "config.json").read_text())
    assert plain["data"]["class_names"] == ["cat", "dog"] and plain["data"]["class_counts"] == [2, 1]
    saved = checkpoint.load_run(tmp_path / "run" / "DDPMpp-000001.pth").config.data
    assert saved.class_names == ("cat", "dog") and saved.class_counts == (2, 1)


# -------------------------------------------------------------------------------------------------- pictures of cameras


def lights(*positions, size=(40, 20)):
    """A dark picture, wider than high, with a bright quarter at its left or right."""
    image = Image.new("RGB", size)
    for left in positions:
        image.paste((255, 255, 255), (left, 0, left + size[0] // 4, size[1]))
    return image


def test_the_first_picture_of_a_phones_file_is_taken(tmp_path):
    data = encoded(lights(0), "MPO", save_all=True, append_images=[lights(30)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    (tmp_path / "a.jpg").write_bytes(data)
    found = dataset.ImageFiles(tmp_path).read(0)
    assert found.shape == (3, 20, 40) and found[:, :, :8].min() > 200 and found[:, :, 30:].max() < 60


def test_pictures_are_turned_upright_for_training_and_left_as_they_are_for_scores(tmp_path):
    tag = Image.Exif()
    tag[274] = 6  # the right side is the top
    (tmp_path / "a.jpg").write_bytes(encoded(lights(0), "JPEG", exif=tag, quality=95))
    as_it_is = dataset.ImageFiles(tmp_path).read(0)
    assert as_it_is.shape == (3, 20, 40) and as_it_is[:, :, :8].min() > 200
    tag[274] = 3  # upside down
    (tmp_path / "a.jpg").write_bytes(encoded(lights(10), "JPEG", exif=tag, quality=95))
    learned = dataset.ImageFiles(tmp_path, 20, 3).read(0)  # the central square, whose left half was bright
    assert learned[:, :, 12:].min() > 200 and learned[:, :, :8].max() < 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_is_none(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(lights(0), "JPEG", exif=b"Exif\0\0II*\0garbage", quality=95))
    assert dataset.ImageFiles(tmp_path, 20, 3).read(0).shape == (3, 20, 20)


def test_jfif_files_are_pictures(tmp_path):
    (tmp_path / "A.JFIF").write_bytes(encoded(lights(0), "JPEG"))
    assert dataset.ImageFiles(tmp_path).names == ["A.JFIF"] and dataset.ImageFiles(tmp_path).read(0).shape == (3, 20, 40)


def test_small_and_grey_pictures_are_spoken_of(tmp_path):
    for name, image in (
        ("small", Image.new("RGB", (6, 9))),
        ("grey", Image.new("L", (8, 8))),
        ("fine", Image.new("RGB", (8, 9))),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png")
    said = {name: list(dataset.ImageFiles(tmp_path / name, 8, 3).conversions()) for name in ("small", "grey", "fine")}
    assert [len(lines) for lines in said.values()] == [1, 1, 0]
    assert "images of 6x9 pixels are enlarged to 8" in said["small"][0] and "--image_channels 1" in said["grey"][0]
    assert list(dataset.ImageFiles(tmp_path / "grey", 8, 1).conversions()) == []


# ------------------------------------------------------------------------------------------- MNIST, and other data sets


def idx(array):
    """A file of MNIST's: two zeros, the type 8 of bytes, the number of dimensions, each of them, and the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


DIGITS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
CLASSES = np.arange(12, dtype=np.uint8) % 10


def mnist(root, images=None, labels=None, ending=""):
    """The two files under root, as bytes; by default those of DIGITS and CLASSES."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / f"train-images-idx3-ubyte{ending}").write_bytes(idx(DIGITS) if images is None else images)
    (folder / f"train-labels-idx1-ubyte{ending}").write_bytes(idx(CLASSES) if labels is None else labels)
    return root


def load_mnist(root, download=False):
    return dataset.load(defaults.resolve({"data_name": "mnist", "data_path": str(root)}).data, download)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_mnist_is_read_whatever_packed_it(tmp_path, pack, ending):
    """Files whose MD5 is not the published one, and names that say other than what is there."""
    found = load_mnist(mnist(tmp_path, pack(idx(DIGITS)), pack(idx(CLASSES)), ending))
    images, labels = found.batch(list(range(12)))
    assert np.array_equal(images[:, 0].numpy(), DIGITS) and labels.tolist() == CLASSES.tolist()
    assert found.class_names == tuple("0123456789")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", idx(DIGITS)[:-1], gzip.compress(idx(DIGITS))[:-20], b"\x1f\x8b", b"\0\0\x08\x03\0"],
    ids=["empty", "html", "cut short", "packed and cut", "packed nothing", "a part of a header"],
)
def test_a_damaged_file_of_mnist_is_named(tmp_path, content, ending):
    with pytest.raises(UserError, match="train-images-idx3-ubyte") as caught:
        load_mnist(mnist(tmp_path, content, ending=ending))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [CLASSES[:5], CLASSES + 9, np.zeros((12, 1), np.uint8)])
def test_files_that_are_not_those_of_mnist_are_told_from_it(tmp_path, labels):
    with pytest.raises(UserError, match="not MNIST's"):
        load_mnist(mnist(tmp_path, labels=idx(labels)))


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("Error downloading train-images-idx3-ubyte.gz")])
@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_data_that_is_missing_without_a_network_is_one_line(tmp_path, monkeypatch, name, error):
    """Which names the folder and what needs no network; what torchvision has made by then is removed."""
    from torchvision import datasets

    class Offline(datasets.MNIST if name == "mnist" else datasets.CIFAR10):
        def download(self):
            os.makedirs(os.path.join(self.root, "MNIST", "raw") if name == "mnist" else self.root, exist_ok=True)
            raise error

    monkeypatch.setattr(datasets, Offline.__base__.__name__, Offline)
    monkeypatch.chdir(tmp_path)
    data = defaults.resolve({"data_name": name, "data_path": "new/data"}).data
    with pytest.raises(UserError, match=f"{name} is not in {re.escape(str(tmp_path / 'new' / 'data'))}.*--data_name digits"):
        dataset.load(data)
    assert list(tmp_path.iterdir()) == []


def fetch_nothing():
    from torchvision import datasets

    datasets.MNIST = lambda *args, **options: os._exit(99)


def test_a_run_that_continues_elsewhere_looks_for_its_data_and_fetches_nothing(tmp_path):
    """`--data_path data` is another folder there: the line names it."""
    small = ["--model_channels", "8", "--channel_mult", "1", "2", "--num_blocks", "1", "--attn_resolutions", "--bsz", "4"]
    command = [
        "train.py",
        "--data_name",
        "mnist",
        *small,
        "--global_bsz",
        "4",
        "--sampling_freq",
        "0",
        "--workdir",
        tmp_path / "run",
    ]
    mnist(tmp_path / "here" / "data")
    (tmp_path / "there").mkdir()
    first = Job(tmp_path / "first", *command, "--train_steps", "1", cwd=tmp_path / "here")
    assert first.wait() == [0], first.err()
    prepare = {"cwd": tmp_path / "there", "prepare": fetch_nothing}
    second = Job(tmp_path / "second", *command, "--train_steps", "2", **prepare)
    assert second.wait() == [2] and list((tmp_path / "there").iterdir()) == [], second.err()
    assert f"error: mnist is not in {tmp_path}/there/data/MNIST/raw" in second.err() and "--data_path" in second.err()


def stripes(data, download):
    """A data set of our own: a bright column, whose place is the class."""
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(16) % 8
    images[torch.arange(16), :, :, labels] = 255
    return dataset.MemoryImages(images, labels, tuple("abcdefgh"))


def add_stripes():
    dataset.DATASETS["stripes"] = stripes
    defaults.DATA_PRESETS["stripes"] = defaults.DATA_PRESETS["digits"]
    for mode in ("denoiser", "characteristic"):
        defaults.TRAIN_PRESETS["stripes", mode] = defaults.TRAIN_PRESETS["digits", mode]


def test_a_data_set_is_added_from_outside(tmp_path):
    """By a function and lines of presets."""
    command = [
        "train.py",
        "--data_name",
        "stripes",
        "--label_dim",
        "8",
        *TINY_NETWORK,
        *TINY_RUN,
        "--workdir",
        tmp_path / "run",
    ]
    job = Job(tmp_path / "log", *command, prepare=add_stripes)
    assert job.wait() == [0] and "classes: a 2, b 2, c 2" in job.err(), job.err()
    saved = torch.load(tmp_path / "run" / "DDPMpp-000003.pth", weights_only=True)
    assert saved["config"]["data"]["data_name"] == "stripes" and saved["mean"].mean() == pytest.approx(-0.75)


# --------------------------------------------------------------------------------------------------------------- pixels


def test_pixels_round_to_the_nearest_level():
    x = torch.tensor([-0.2, 0.0, 0.499 / 255, 0.5 / 255, 1.0, 1.3])
    assert dataset.to_uint8(x, centered=False).tolist() == [0, 0, 0, 1, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    for centered in (False, True):
        assert torch.equal(dataset.to_uint8(dataset.to_model(levels, centered), centered), levels)


# -------------------------------------------------------------------------------------------------------------- batches


def test_rounds_and_ranks_split_the_same_images(monkeypatch):
    """Step 3 uses the same images whatever the number of ranks and rounds."""
    monkeypatch.setattr(dataset.dist_util, "world_size", lambda: 1)
    whole = next(dataset.index_batches(100, seed=5, start=3, global_bsz=24, bsz=24))
    split = []
    for rank in (0, 1):
        monkeypatch.setattr(dataset.dist_util, "world_size", lambda: 2)
        monkeypatch.setattr(dataset.dist_util, "rank", lambda rank=rank: rank)
        batches = dataset.index_batches(100, seed=5, start=3, global_bsz=24, bsz=6)
        split += [next(batches), next(batches)]
    assert sorted(sum(split, [])) == sorted(whole)


def test_an_epoch_shows_every_image_once_and_epochs_differ():
    batches = dataset.index_batches(12, seed=0, start=0, global_bsz=5, bsz=5)
    stream = sum((next(batches) for _ in range(5)), [])[:24]
    assert sorted(stream[:12]) == sorted(stream[12:]) == list(range(12)) and stream[:12] != stream[12:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_files_are_decoded_once_where_memory_holds_them(tmp_path, monkeypatch, num_workers):
    """The second epoch decodes nothing, and has the images that it would have had."""
    files = dataset.ImageFiles(write_folder(tmp_path, images(10), classes=2), 8, 1)
    config = tiny_config(bsz=4, global_bsz=4, num_workers=num_workers)
    read, real = [], dataset.ImageFiles.read
    monkeypatch.setattr(dataset.ImageFiles, "read", lambda self, index: read.append(index) or real(self, index))

    def epochs(data):
        drawn = dataset.batches(data, config.data, config.train, 0)
        return [next(drawn) for _ in range(10)]

    expected = epochs(files)
    assert len(read) >= 40
    read.clear()
    kept = dataset.resident(files, torch.device("cpu"))
    found = epochs(kept)
    assert sorted(set(read)) == list(range(10)) and len(read) <= 10 + 8 * num_workers  # readers ahead may meet the same image
    assert all(torch.equal(a, b) for one, two in zip(expected, found) for a, b in zip(one, two))

    for mistake in ("", "0"):  # of an environment without ranks
        monkeypatch.setenv("LOCAL_WORLD_SIZE", mistake)
        assert isinstance(dataset.resident(files, torch.device("cpu")), dataset.Resident)
    monkeypatch.setattr(misc, "memory", lambda: 10 * 64 * 4 - 1)
    assert dataset.resident(files, torch.device("cpu")) is files


def test_zip_data_is_read_whole_by_several_workers(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            image = io.BytesIO()
            pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(image, format="PNG")
            archive.writestr(f"c{i % 2}/{i:02d}.png", image.getvalue())
    config = tiny_config(data_name="folder", image_size=8, num_workers=2)
    images_of_zip = dataset.ImageFiles(tmp_path / "data.zip", 8, 3)
    expected, labels = images_of_zip.batch(list(range(40)))
    order = dataset.index_batches(40, config.train.seed, 0, 8, 8)
    for (found, classes), indices in zip(
        (next(b) for b in [dataset.batches(images_of_zip, config.data, config.train, 0)] * 20), order
    ):
        assert torch.equal(found, expected[indices]) and torch.equal(classes, labels[indices])


def test_a_broken_image_met_in_training_ends_the_run_with_one_line(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(folder / f"{i}.png")
    options = ["--data_name", "folder", "--data_path", folder, "--image_size", "8", "--image_channels", "1"]
    run("train.py", *options, *TINY_NETWORK, *TINY_RUN, "--num_workers", "0", "--workdir", tmp_path / "teacher")
    (folder / "5.png").write_bytes(b"broken")  # stage 2 takes the mean from its teacher: the first read is a step's
    teacher = ["--mode", "characteristic", "--teacher", tmp_path / "teacher" / "DDPMpp-000003.pth", "--bank_size", "8"]
    shared = ["train.py", *teacher, *TINY_RUN, "--num_steps", "2", "--num_workers", "1", "--workdir", tmp_path / "student"]
    done = run(*shared, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot read image 5.png" in errors[0] and "Traceback" not in done.stderr


def test_folder_data_trains_a_conditional_colour_model(tmp_path):
    for i in range(6):
        (tmp_path / "data" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 18), (40 * i, 10, 200)).save(tmp_path / "data" / f"c{i % 2}" / f"{i}.png")
    options = ["--data_name", "folder", "--data_path", tmp_path / "data", "--image_size", "8", "--label_dim", "2"]
    run("train.py", *options, *TINY_NETWORK, *TINY_RUN, "--num_workers", "1", "--workdir", tmp_path / "run")
    checkpoint = tmp_path / "run" / "DDPMpp-000003.pth"
    run("eval.py", "--checkpoint", checkpoint, "--workdir", tmp_path / "out", "--end_seed", "2", "--num_steps", "2", "--sde")
    assert Image.open(tmp_path / "out" / "000002.png").mode == "RGB"


# -------------------------------------------------------------------------------------------------------- reading ahead

NOT_POSSIBLE = 77


def shrink_shared_memory(size):
    """Give this process a /dev/shm of its own, of so many bytes; the exit status 77 where the system does not allow it."""
    libc, recursive_private, new_mounts = ctypes.CDLL(None, use_errno=True), 1 << 14 | 1 << 18, 1 << 17
    options = f"size={size}".encode()
    if (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, recursive_private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, options)
    ):
        os._exit(NOT_POSSIBLE)


@pytest.mark.parametrize("size", ["64k", "4k"])
@pytest.mark.parametrize("script", ["train.py", "fid.py"])
def test_threads_that_read_need_no_shared_memory(tmp_path, script, size):
    """Containers have little of it."""
    write_folder(tmp_path / "data", images(40, (1, 48, 48)))
    options = ["--data_name", "folder", "--data_path", tmp_path / "data", "--image_size", "48", "--image_channels", "1"]
    train = ["--attn_resolutions", "24", "--sampling_freq", "0", "--train_steps", "2", "--workdir", tmp_path / "run"]
    score = ["--mode", "gen", "--img_folder", tmp_path / "data", "--dest", tmp_path / "x"]
    command = [*options, *TINY_NETWORK, *TINY_RUN, *train] if script == "train.py" else score
    job = Job(tmp_path / "log", script, *command, "--num_workers", "2", prepare=partial(shrink_shared_memory, size))
    statuses = job.wait(30)
    if statuses == [NOT_POSSIBLE]:
        pytest.skip("this system does not let a process mount its own /dev/shm")
    assert statuses == [0], job.err()


# ------------------------------------------------------------------------------------------------- parts, mirrors, moments


def test_a_folder_of_train_and_test_is_two_sets(tmp_path):
    for part, n in (("train", 6), ("test", 3)):
        write_folder(tmp_path / "both" / part, images(n, (1, 8, 8)), classes=3)
    settings = {"data_name": "folder", "data_path": str(tmp_path / "both"), "image_size": 8, "image_channels": 1}
    for part, n in (("train", 6), ("test", 3)):
        found = dataset.load(defaults.resolve({**settings, "split": part}).data)
        assert len(found) == n and found.class_names == ("class0", "class1", "class2")
    for name in ("val", "__MACOSX"):  # may be there
        write_folder(tmp_path / "both" / name, images(2, (1, 8, 8)))
    assert len(dataset.load(defaults.resolve(settings).data)) == 6
    write_folder(tmp_path / "both" / "more", images(2, (1, 8, 8)))
    with pytest.raises(UserError, match="holds train/, test/ and more/"):
        dataset.load(defaults.resolve(settings).data)


def test_mnist_has_its_test_images(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 5), ("t10k", 2)):
        pixels = images(n, (28, 28)).numpy()
        header = struct.pack(">4I", 0x803, n, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + bytes(range(n)))
    for part, n in (("train", 5), ("test", 2)):
        data = defaults.resolve({"data_name": "mnist", "data_path": str(tmp_path), "split": part}).data
        assert len(dataset.load(data)) == n


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_moments_are_those_of_the_pixels(centered, flip):
    batch = images(37, (3, 8, 8))
    data = defaults.resolve({"data_name": "folder", "image_size": 8, "centered": centered, "flip": flip}).data
    mean, sigma = dataset.data_moments(in_memory(batch), data, bsz=10)
    seen = dataset.to_model(torch.cat([batch, batch.flip(-1)]) if flip else batch, centered).double()
    torch.testing.assert_close(mean.double(), seen.mean(0), rtol=1e-6, atol=1e-6)
    assert sigma == pytest.approx(float(seen.std(correction=0)), rel=1e-6)


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    x = torch.rand(400, 1, 2, 3)
    found = dataset.flip(x, torch.Generator().manual_seed(0))
    same, mirrored = ((found == other).flatten(1).all(1) for other in (x, x.flip(-1)))
    assert (same ^ mirrored).all() and 150 < mirrored.sum() < 250


@pytest.mark.parametrize("size", [8, 16, 28, 32, 48, 64, 128])
@pytest.mark.parametrize("mode", defaults.MODES)
def test_folder_has_presets_for_every_size_that_can_be_overridden(size, mode):
    config = defaults.resolve({"data_name": "folder", "image_size": size, "mode": mode, "num_blocks": 3})
    assert config.data.image_size == size and config.network.num_blocks == 3
    smaller = defaults.resolve({"data_name": "folder", "image_size": 8, "mode": mode})
    assert config.train.train_steps >= smaller.train.train_steps
    for train in (config.train, smaller.train):
        assert train.lr_rampup_steps <= train.train_steps / 5 and train.sampling_freq <= train.dump_freq <= train.train_steps
