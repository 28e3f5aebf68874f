"""Bad input of every kind: one line that says what is wrong, exit status 2, nothing written; on one rank and on two."""

import json
import os
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SHORT_STAGE_1, SHORT_STAGE_2, TINY_NETWORK, launch
from processes import Job, impatient
from test_edm import small as edm

TINY = " ".join(TINY_NETWORK)
RUN, FLOW = (" ".join(command) for command in (SHORT_STAGE_1, SHORT_STAGE_2))


# ------------------------------------------------------------------------------------------- what a case begins with


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        return torch.nested.nested_tensor([torch.zeros(2)])


def copy(*names):
    """Copies of the models' workdirs."""
    return lambda p, models: [shutil.copytree(models / name, p / name, symlinks=True) for name in names]


def checkpoint(change):
    """x.pth: the denoiser's checkpoint, changed."""

    def make(p, models):
        content = torch.load(models / "ode" / "DDPMpp-000004.pth", weights_only=True)
        change(content)
        torch.save(content, p / "x.pth")

    return make


def workdir(change, name="ode"):
    """A workdir whose last checkpoint is changed."""

    def make(p, models):
        copy(name)(p, models)
        content = torch.load(models / name / "DDPMpp-000004.pth", weights_only=True)
        change(content)
        torch.save(content, p / name / "DDPMpp-000004.pth")

    return make


def dangling(p, models):
    (p / "ode").mkdir()
    (p / "ode" / "latest.pth").symlink_to("DDPMpp-000009.pth")


def put(name, content):
    def make(p, models):
        (p / name).parent.mkdir(parents=True, exist_ok=True)
        (p / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def both(*setups):
    return lambda p, models: [setup(p, models) for setup in setups]


def half(p, models):
    data = (models / "ode" / "DDPMpp-000004.pth").read_bytes()
    (p / "x.pth").write_bytes(data[: len(data) // 2])


def png(width=8, height=8):
    """A grey PNG file; beyond a million pixels with hardly any of them."""
    if width * height < 10**6:
        with tempfile.TemporaryFile() as file:
            Image.new("L", (width, height)).save(file, format="PNG")
            file.seek(0)
            return file.read()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def zipped(**members):
    """x.zip with these members, the name's dots and slashes written as they are in the keys of a dict."""

    def make(p, models):
        with zipfile.ZipFile(p / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return make


def bomb(p, models):
    """A zip of a few kilobytes whose picture is 300 MB of zeros."""
    zipped(**{"a.png": png(), "b.png": bytes(300 * 2**20)})(p, models)


def cut_zip(p, models):
    zipped(**{"a.png": png(), "b.png": png()})(p, models)
    (p / "x.zip").write_bytes((p / "x.zip").read_bytes()[:-30])


def array_bomb(name):
    def make(p, models):
        header = {"shape": (2**12, 2**10, 2**9, 1), "fortran_order": False, "descr": "|u1"}
        with (
            zipfile.ZipFile(p / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(17):  # beyond a gigabyte is enough
                file.write(bytes(2**26))

    return make


def statistics(**arrays):
    def make(p, models):
        np.savez(p / "x.npz", **arrays)
        np.savez(p / "ref.npz", mu=np.zeros(2), sigma=np.eye(2))

    return make


def latents(**arrays):
    """Copies of the models' workdirs, a folder of two images, and x.npz: their latents, with arrays changed or left out."""

    def make(p, models):
        copy("ode", "flow")(p, models)
        for i in range(2):
            put(f"in/{i}.png", png())(p, models)
        metadata = json.dumps({"config": {"sampling": {"eval_eps1": 1e-3}}})
        shape = (2, 1, 8, 8)
        held = {"latents": np.zeros(shape, np.float32), "images": np.zeros(shape, np.uint8), "metadata": metadata, **arrays}
        np.savez(p / "x.npz", **{name: array for name, array in held.items() if array is not None})

    return make


def nothing(p, models):
    pass


def set_key(*path):
    """Change of one value: the keys that lead to it, then the value."""
    *keys, last, value = path

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def drop(*path):
    *keys, last = path

    def change(content):
        for key in keys:
            content = content[key]
        del content[last]

    return change


def pickled(half=False, **options):
    """x.pkl: a network as EDM publishes them."""

    def make(p, models):
        path = edm(p, **options).rename(p / "x.pkl")
        if half:
            path.write_bytes(path.read_bytes()[:2000])

    return make


def hostile_storage(p, models):
    """x.pkl: the numbers of a tensor are a pickle of their own, as in torch's first format."""

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Hostile()),)

    (p / "x.pkl").write_bytes(pickle.dumps({"ema": Storage()}))


def short_tensor(p, models):
    """x.pkl: a tensor that claims more numbers than there are."""

    class Tensor:
        def __reduce__(self):
            storage = torch.zeros(4).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (
                torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                0,
                (10**6,),
                (1,),
                False,
                {},
            )

    (p / "x.pkl").write_bytes(pickle.dumps({"ema": Tensor()}))


def strideless_tensor(p, models):
    """x.pkl: a tensor of a million numbers, of which four are there, without strides."""

    class Tensor:
        def __reduce__(self):
            untyped = torch.zeros(4).untyped_storage()
            storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (storage, 0, (10**6,), (), False, {})

    (p / "x.pkl").write_bytes(pickle.dumps({"ema": Tensor()}))


def flipped(p, models):
    """x.pth: the denoiser's checkpoint with one bit of its largest tensor changed, which torch would not see."""
    data = bytearray((models / "ode" / "DDPMpp-000004.pth").read_bytes())
    state = torch.load(models / "ode" / "DDPMpp-000004.pth", weights_only=True)["ema"]
    data[data.index(max(state.values(), key=torch.numel).numpy().tobytes()) + 5] ^= 1
    (p / "x.pth").write_bytes(data)


def loop(p, models):
    (p / "loop").symlink_to("loop")


BIAS = "dec.8x8_aux_conv.bias"
PICKLE = "eval.py --checkpoint x.pkl --workdir out --end_seed 1"
EVAL, OUT = "eval.py --checkpoint x.pth --workdir out --end_seed 1", "--workdir out"
RESUME = f"{RUN} --resume x.pth {OUT} --train_steps 9"
ODE = "eval.py --checkpoint ode/latest.pth --workdir out"
ROW = "teaser.py --checkpoint flow/latest.pth --dest row"
FLOW_MAP = "eval.py --checkpoint flow/latest.pth --workdir out"
NPZ = "fid.py --ref_path ref.npz --stat_path x.npz"
DATA = f"train.py --data_name folder --data_path x.zip --image_size 8 --image_channels 1 {TINY} --bsz 64 --workdir out"
GEN = "fid.py --mode gen --dest s.npz --img_folder"

CASES = [
    # (what is there, command, what the line says)

    # flags: of the wrong kind, unknown, negative, zero, reversed, enormous
    (nothing, "train.py --lr fast", "invalid float value: 'fast'"),
    (nothing, "train.py --lr -1", "--lr is -1.0: it must be between 0 and 10"),
    (nothing, "train.py --lr 1e300", "--lr is 1e+300"),
    (nothing, "train.py --M 1e300", "--M is 1e+300"),
    (nothing, "train.py --sigma_data 1e300", "--sigma_data is 1e+300"),
    (nothing, "train.py --train_eps0 1e-300", "--train_eps0 is 1e-300"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth {OUT} --bank_size 16777216 --num_steps 4095", "the bank of stage 2 holds"),
    (nothing, "train.py --num_steps 65536", "--num_steps is 65536: it must be from 1 to 4096"),
    (copy("ode"), "teaser.py --checkpoint ode/latest.pth --start_seed 9223372036854775807", "each below 2^32"),
    (copy("ode"), "teaser.py --checkpoint ode/latest.pth --nsampling 99999999", "--nsampling is 99999999"),
    (nothing, "train.py --lr nan", "--lr is nan"),
    (nothing, "train.py --lr inf", "--lr is inf"),
    (nothing, "train.py --bogus 1", "unrecognized arguments: --bogus"),
    (nothing, "train.py --data_name imagenet", "invalid choice: 'imagenet'"),
    (nothing, "train.py --bsz 0", "--bsz is 0: it must be from 1"),
    (nothing, "train.py --bsz -8", "--bsz is -8"),
    (nothing, "train.py --train_steps 0", "--train_steps is 0"),
    (nothing, "train.py --train_steps 99999999999999999999", "--train_steps is 99999999999999999999: it must be from 1"),
    (nothing, "train.py --global_bsz 2147483648 --bsz 1073741824", "--global_bsz is 2147483648"),
    (nothing, "train.py --model_channels 2147483644", "--model_channels is 2147483644"),
    (nothing, "train.py --bsz 64 --model_channels 65536 --channel_mult 1024 1024", "a network of"),
    (nothing, "train.py --num_blocks 2000000", "--num_blocks is 2000000"),
    (nothing, "train.py --image_size -4", "--image_size is -4"),
    (nothing, "train.py --image_size 1000000000 --data_name folder", "--image_size is 1000000000"),
    (nothing, "train.py --image_size 16", "--image_size is 16: it must be 8 for digits"),
    (nothing, "train.py --channel_mult 1 0", "--channel_mult"),
    (nothing, "train.py --channel_mult", "--channel_mult is ()"),
    (nothing, "train.py --bsz 64 --model_channels 36 --channel_mult 1 2 2", "--model_channels 36"),
    (nothing, "train.py --dropout 1.5", "--dropout is 1.5: it must be from 0 to 1"),
    (nothing, "train.py --train_eps0 1", "--train_eps0 is 1.0"),
    (nothing, "train.py --train_eps0 0.6 --train_eps1 0.5", "--train_eps0 is 0.6: it must be below"),
    (nothing, "train.py --seed -1", "--seed is -1"),
    (nothing, "train.py --keep -1", "--keep is -1"),
    (nothing, "train.py --global_bsz 100 --bsz 64", "--global_bsz is 100"),
    (nothing, "train.py --global_bsz 7 --bsz 4", "--global_bsz is 7: it must be a multiple of --bsz"),
    (nothing, "train.py --fid_num 1", "--fid_num is 1"),
    (nothing, "train.py --bsz 64 --fid_freq 10", "--ref_path is missing"),
    (nothing, "train.py --bsz 64 --fid_freq 10 --ref_path nowhere.npz", "there is no file nowhere.npz"),
    (nothing, "train.py --bsz 64 --ref_path a.npz", "--ref_path is for --fid_freq"),
    (nothing, "train.py --force", "--force is for --fresh"),
    (nothing, "train.py --fresh --resume x.pth", "leave one out"),
    (nothing, "eval.py --workdir x", "--checkpoint is missing"),
    (nothing, "eval.py --checkpoint x --workdir x --start_seed 5 --end_seed 1", "--start_seed 5 --end_seed 1"),
    (nothing, "eval.py --checkpoint x --workdir x --start_seed -5", "seeds run from 0"),
    (nothing, "eval.py --checkpoint x --workdir x --end_seed 9223372036854775808", "each below 2^32"),
    (nothing, "eval.py --checkpoint x --workdir x --end_seed 10000000", "at most 10000000 seeds"),
    (nothing, "eval.py --churn perhaps", "neither True nor False"),
    (nothing, "eval.py --num_steps 1.5", "invalid int value: '1.5'"),
    (copy("ode"), f"{ODE} --num_steps 0", "--num_steps is 0"),
    (copy("ode"), f"{ODE} --s_min 0.9 --s_max 0.1", "--s_min is 0.9"),
    (copy("ode"), f"{ODE} --class_idx 3", "the model has no classes"),
    (copy("ode"), f"{ODE} --sde --churn", "--churn is True"),
    (nothing, "fid.py --mode fid --ref_path a.npz", "one of --stat_path, --img_folder, --checkpoint"),
    (nothing, "fid.py --mode gen --dest a.npz", "one of --img_folder, --checkpoint"),
    (nothing, "fid.py --mode gen --dest a.npz --img_folder x --checkpoint y", "one of --img_folder, --checkpoint"),
    (nothing, "fid.py --mode gen --dest a.npz --img_folder x --num_steps 1", "--num_steps is for images drawn"),
    (nothing, "fid.py --mode gen --dest a.npz --checkpoint x --start_seed 9 --end_seed 1", "--start_seed 9"),
    (nothing, "fid.py --mode ref --dest a.npz --num 1798", "--num is 1798, but there are only 1797 images"),
    (nothing, "fid.py --mode ref --dest a.npz --num 1", "--num is 1: a covariance needs two"),
    (nothing, "fid.py --mode ref --dest a.npz --metrics fid,kid,is", "--metrics is fid,kid,is"),
    (nothing, "fid.py --mode ref --dest a.npz --metrics ''", "--metrics is :"),
    (nothing, "fid.py --ref_path a.npz --img_folder x --metrics kid,fid,kid", "each once"),
    (nothing, "fid.py --ref_path a.npz --stat_path b.npz --num 9", "--num is for images: --stat_path is what"),
    (nothing, "fid.py --mode ref --dest a.npz --img_folder x", "--img_folder is not for --mode ref"),
    (nothing, "fid.py --mode gen --dest a.npz --img_folder x --csv y", "--csv is not for --mode gen"),
    (nothing, "fid.py --ref_path a.npz --img_folder x --dest y.npz", "--dest is not for --mode fid"),
    (nothing, "fid.py --ref_path a.npz --img_folder x --end_seed 9", "--end_seed is for images drawn"),
    (nothing, "fid.py --ref_path a.npz --img_folder x --image_size 9", "--image_size is for --mode ref"),
    (nothing, "fid.py --mode ref --dest a.npz --flip", "--flip is for training"),
    (nothing, "fid.py --mode gen --img_folder x --dest x/images.npz", "--dest x/images.npz is the file of the images"),
    (nothing, "fid.py --mode ref --dest a.npz --force", "--force is not for --mode ref"),
    (nothing, "fid.py --mode ref --dest a.npz --seed 1", "--seed is that of the subset"),
    (nothing, "fid.py --mode ref", "--dest is missing"),
    (nothing, "fid.py --mode ref --dest a.npz --features inception --inception_weights no/w.pth", "need no/w.pth: get it from"),

    # places: missing, files for folders, not to be written
    (nothing, "train.py --data_name folder --data_path nowhere", "nowhere is missing"),
    (nothing, "train.py --data_name afhq --data_path nowhere", "--data_name digits"),
    (put("file", "text"), "train.py --workdir file", "--workdir file is a file: choose a folder"),
    (put("file", "text"), "train.py --workdir file/run", "cannot write file/run"),
    (nothing, "train.py --workdir /proc/nowhere", "cannot write /proc/nowhere"),
    (nothing, f"train.py --workdir {'x' * 300}", "File name too long"),
    (both(copy("ode"), put("file", "text")), "eval.py --checkpoint ode/latest.pth --workdir file", "is a file: choose"),
    (both(copy("ode"), put("full/a.txt", "text")), "eval.py --checkpoint ode/latest.pth --workdir full", "full is not empty"),
    (put("file", "text"), "fid.py --mode ref --dest file/x.npz", "cannot write file/x.npz"),
    (nothing, "teaser.py --data_name bogus", "invalid choice: 'bogus'"),
    (nothing, "compare.py --denoiser nowhere.pth", "--characteristic is missing"),
    (nothing, "compare.py --denoiser a.pth --characteristic b.pth --dest ./", "cannot write .: it is a folder"),
    (nothing, "compare.py --denoiser a.pth --characteristic b.pth --dest new/", "cannot write new: it is a folder"),
    (nothing, "compare.py --denoiser a.pth --characteristic b.pth --images here", "--images is for the curves"),
    (nothing, "fid.py --mode ref --dest " + "a" * 250, "File name too long"),
    (copy("ode", "flow"), "compare.py --denoiser ode/latest.pth --characteristic flow/latest.pth --dest out --ref_path no.npz "
     "--end_seed 4294967296", "each below 2^32"),

    # checkpoints: hostile, truncated, empty, foreign, of another network
    (nothing, "eval.py --checkpoint nowhere.pth --workdir out", "there is no checkpoint nowhere.pth"),
    (put("x.pth", pickle.dumps(Hostile())), EVAL, "x.pth is a pickle that is not loaded: it asks for io.open"),
    (half, EVAL, "x.pth is not a checkpoint of tensors and plain values, or it is damaged"),
    (flipped, EVAL, "x.pth is not a checkpoint of tensors and plain values, or it is damaged"),
    (flipped, "checkpoint.py x.pth y.pth", "x.pth is not a checkpoint of tensors and plain values, or it is damaged"),
    (checkpoint(set_key("mean", torch.full((1, 8, 8), float("nan")))), "checkpoint.py x.pth y.pth", "its mean is not a finite"),
    (put("x.pth", ""), EVAL, "x.pth is not a checkpoint"),
    (put("x.pth", "hello"), EVAL, "x.pth is not a checkpoint"),
    (lambda p, models: (p / "x.pth").mkdir(), EVAL, "cannot read checkpoint x.pth: Is a directory"),
    (lambda p, models: zipfile.ZipFile(p / "x.pth", "w").close(), EVAL, "x.pth is not a checkpoint"),
    (lambda p, models: torch.save([1, 2], p / "x.pth"), EVAL, "it has no 'model' and 'ema' state dicts"),
    (checkpoint(drop("ema", BIAS)), EVAL, f"x.pth does not fit this network: {BIAS} is missing"),
    (checkpoint(set_key("ema", "surplus", torch.zeros(1))), EVAL, "x.pth does not fit this network: surplus is unknown"),
    (checkpoint(set_key("ema", BIAS, torch.zeros(3))), EVAL, f"{BIAS} is (3,), not (1,)"),
    (checkpoint(set_key("ema", BIAS, torch.full((1,), float("nan")))), EVAL, f"{BIAS} is not finite"),
    (checkpoint(set_key("ema", BIAS, torch.zeros(1, dtype=torch.long))), EVAL, f"{BIAS} is not finite, or not of floating"),
    (checkpoint(set_key("ema", BIAS, "text")), EVAL, f"{BIAS} is (), not (1,)"),
    (checkpoint(set_key("ema", BIAS, torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))), EVAL, "is not finite"),
    (checkpoint(set_key("ema", BIAS, nested())), EVAL, f"{BIAS} is (), not (1,)"),
    (checkpoint(set_key("config", "network", "model_channels", 16)), EVAL, "does not fit this network"),
    (checkpoint(set_key("config", "network", "model_channels", "8")), EVAL, "is '8' in the configuration"),
    (checkpoint(set_key("config", "network", "surplus", 1)), EVAL, "unknown setting 'network.surplus'"),
    (checkpoint(set_key("config", 3)), EVAL, "the configuration is not a dictionary"),
    (checkpoint(set_key("format", 99)), EVAL, "x.pth has format 99"),
    (checkpoint(set_key("step", "three")), EVAL, "its step is 'three'"),
    (checkpoint(set_key("mean", torch.zeros(3, 8, 8))), EVAL, "its mean is not a finite image of (1, 8, 8)"),
    (checkpoint(set_key("mean", "grey")), EVAL, "its mean is not a finite image"),
    (checkpoint(drop("config")), EVAL, "x.pth has no configuration: say --data_name"),
    (checkpoint(drop("config")), f"{EVAL} --data_name mnist", "x.pth does not fit this network"),
    (copy("flow"), "eval.py --mode denoiser --checkpoint flow/latest.pth --workdir out", "--mode is denoiser and was char"),
    (copy("ode"), "eval.py --model_channels 64 --checkpoint ode/latest.pth --workdir out", "--model_channels is 64 and was 8"),
    (copy("flow"), "eval.py --sde --checkpoint flow/latest.pth --workdir out", "the flow map has no SDE"),

    # pickles of EDM's form: hostile, damaged, of other networks
    (put("x.pkl", b"\x80\x02cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R."), PICKLE, "it asks for posix.system"),
    (put("x.pkl", pickle.dumps({"ema": Hostile()})), PICKLE, "x.pkl is a pickle that is not loaded: it asks for io.open"),
    (hostile_storage, PICKLE, "x.pkl is a pickle, but damaged"),
    (pickled(half=True), PICKLE, "x.pkl is a pickle, but damaged or without one of EDM's networks"),
    (put("x.pkl", pickle.dumps({"ema": {"w": 1}})), PICKLE, "or without one of EDM's networks as 'ema'"),
    (put("x.pkl", pickle.dumps([1, 2])), PICKLE, "or without one of EDM's networks as 'ema'"),
    (pickled(class_name="VPPrecond"), PICKLE, "x.pkl holds a VPPrecond of a SongUNet: of EDM's networks, EDMPrecond"),
    (pickled(class_name="iDDPMPrecond"), PICKLE, "x.pkl holds a iDDPMPrecond"),
    (pickled(model_type="DhariwalUNet"), PICKLE, "x.pkl holds a EDMPrecond of a DhariwalUNet"),
    (pickled(class_name="Precond", model_type=None), PICKLE, "x.pkl holds a Precond"),
    (pickled(encoder_type="skip"), PICKLE, "x.pkl holds a network that does not fit: it is neither DDPM++ nor NCSN++"),
    (pickled(encoder_type=10**5000), PICKLE, "x.pkl holds a network that does not fit"),
    (pickled(model_type=10**5000), PICKLE, "x.pkl is a pickle, but damaged"),
    (pickled(label_dim="ten"), PICKLE, "x.pkl holds a network that does not fit"),
    (pickled(model_channels=16), PICKLE, "x.pkl does not fit this network"),
    (pickled(), f"{PICKLE} --data_name cifar", "image_size"),
    (pickled(), f"{PICKLE} --guidance 2", "x.pkl must be conditional"),

    (pickled(sigma_max=None), PICKLE, "x.pkl holds a network that does not fit"),
    (pickled(sigma_min=90.0), PICKLE, "x.pkl holds a network that does not fit"),
    (pickled(class_name="a\nb"), PICKLE, "x.pkl holds a a\\nb of a SongUNet"),
    (short_tensor, PICKLE, "x.pkl is a pickle, but damaged"),
    (strideless_tensor, PICKLE, "x.pkl is a pickle, but damaged"),
    (pickled(sigma_min=torch.ones(2)), PICKLE, "x.pkl holds a network that does not fit"),
    (put("x.pkl", b"\x80\x02c_codecs\nencode\n}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xsb."), PICKLE, "x.pkl is a pickle"),

    # starting weights, classes, guidance, held-out images, published weights
    (nothing, "train.py --bsz 64 --init nowhere.pth", "there is no checkpoint nowhere.pth"),
    (checkpoint(lambda content: None), "train.py --init x.pth --resume x.pth", "leave one out"),
    (lambda p, models: torch.save({"ema": {"a": torch.zeros(1)}}, p / "x.pth"), "train.py --bsz 64 --init x.pth --workdir out",
     "x.pth: none of its 1 tensors fits this network"),
    (nothing, "train.py --bsz 64 --sigma_data automatic", "sigma_data is 'automatic'"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth {OUT} --sigma_data auto", "--sigma_data auto is for stage 1"),
    (nothing, "train.py --bsz 64 --label_dropout 0.1", "--label_dropout is for a model with classes: add --conditional"),
    (nothing, "train.py --bsz 64 --conditional --label_dim 3", "--label_dim is 3, and the data has 10 classes"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth {OUT} --conditional", "has 10 classes, and ode/latest.pth has 0"),
    (copy("ode"), f"{RUN} --workdir ode --conditional --train_steps 9", "has 10 classes, and ode/DDPMpp-000004.pth has 0"),
    (put("x/a.png", png()), f"{DATA.replace('x.zip', 'x')} --conditional", "--conditional: the data has no classes"),
    (put("x/a.png", png()), f"{DATA.replace('x.zip', 'x')} --split test", "must hold the folders train/ and test/"),
    (nothing, "train.py --bsz 64 --split test", "--split test: the digits are all for training"),
    (nothing, "train.py --bsz 64 --val_freq 2", "--split test: the digits are all for training"),
    (nothing, "train.py --val_freq -1", "--val_freq is -1"),
    (nothing, "train.py --data_name folder --image_size 50", "divisible by 8, for 4 resolutions, as 48 or 56"),
    (nothing, "train.py --bsz 64 --guidance 2", "--guidance is for sampling, and for stage 2"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth {OUT} --guidance 2", "--guidance: ode/latest.pth must be conditional"),
    (copy("ode"), f"{ODE} --guidance 2", "--guidance: ode/latest.pth must be conditional; eval.py"),
    (copy("ode"), f"{ODE} --guidance -1", "--guidance is -1.0"),
    (copy("flow"), "eval.py --checkpoint flow/latest.pth --workdir out --guidance 2", "a flow map has that of its training"),
    (copy("ode"), f"{ODE} --guide ode/latest.pth", "--guide is for the ODE of a denoiser with a --guidance that"),
    (copy("ode"), f"{ODE} --guidance 2 --guide nowhere.pth", "there is no checkpoint nowhere.pth"),
    (copy("ode", "flow"), f"{ODE} --guidance 2 --guide flow/latest.pth", "--guide flow/latest.pth must be a denoiser"),
    (copy("ode"), f"{ODE} --class_idx cat", "--class_idx is cat, and ode/latest.pth has no such class"),
    (copy("ode"), f"{ODE} --time_input log_snr", "--time_input is log_snr and was t"),
    (copy("ode"), f"{ODE} --time_grid even", "invalid choice: 'even'"),
    (checkpoint(drop("model")), f"{EVAL} --raw", "x.pth holds no weights of its last step"),
    (nothing, "checkpoint.py nowhere.pth y.pth", "there is no checkpoint nowhere.pth"),
    (copy("ode"), "checkpoint.py ode/DDPMpp-000002.pth ode/DDPMpp-000004.pth", "is a checkpoint that a run goes on from"),
    (copy("ode"), "checkpoint.py ode/DDPMpp-000004.pth ode/latest.pth", "ode/latest.pth is a folder, a link, or the source"),
    (checkpoint(drop("optim")), "checkpoint.py x.pth x.pth --half", "x.pth is a folder, a link, or the source itself"),
    (copy("ode"), f"{RUN} --workdir ode --train_steps 9 --init gone.pth", "ode/DDPMpp-000004.pth did not begin with --init"),
    (both(put("x/train/a.png", png()), put("x/test/a.png", png()), put("x/more/a.png", png())),
     DATA.replace("x.zip", "x"), "holds train/, test/ and more/"),
    (both(put("x/train/a.png", png()), put("x/test/a.png", png()), put("x/a.png", png())),
     DATA.replace("x.zip", "x"), "holds train/, test/ and a.png: --data_path names one of them"),
    (both(put("x/images.npz", ""), put("x/a.PNG", png())), f"{GEN} x", "x holds images.npz and a.PNG: give x/images.npz"),
    (both(put("x/train/a.png", png()), put("x/test/a.png", png())), DATA.replace("x.zip", "x").replace(" out", " x/test/out"),
     "--workdir x/test/out lies in --data_path"),
    (zipped(**{"train/a.png": png(), "test/a.png": png()}), DATA, "holds test and train, parts of a data set"),
    (both(put("x/Train/a.png", png()), put("x/val/a.png", png())), DATA.replace("x.zip", "x"), "x holds Train and val, parts"),
    (both(copy("ode"), put("x/a.png", png())), "eval.py --checkpoint ode/latest.pth --from x --t 0.5 --workdir x/out",
     "--workdir x/out lies in the folder of --from"),
    (nothing, "checkpoint.py nowhere.pth", "the following arguments are required: dest"),
    (checkpoint(drop("config")), "checkpoint.py x.pth y.pth", "x.pth holds no configuration"),
    (checkpoint(drop("model")), "checkpoint.py x.pth y.pth --raw", "x.pth holds no weights of its last step"),
    (checkpoint(set_key("ema", BIAS, torch.full((1,), 1e6))), "checkpoint.py x.pth y.pth --half", "x.pth in float16 does"),

    # teachers and runs to continue
    (nothing, "train.py --mode characteristic", "--teacher is missing"),
    (nothing, "train.py --mode characteristic --teacher nowhere.pth", "there is no checkpoint nowhere.pth"),
    (nothing, "train.py --teacher x.pth", "--teacher is for stage 2"),
    (copy("flow"), f"{FLOW} --teacher flow/latest.pth {OUT}", "flow/latest.pth is a flow map: --teacher takes a denoiser"),
    (copy("ode", "flow"), f"{FLOW} --teacher ode/DDPMpp-000002.pth --workdir flow", "is not the teacher that flow/DDPMpp"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth --workdir ode", "--mode is characteristic and was denoiser"),
    (copy("ode"), f"{RUN} --workdir ode --model_channels 16 --lr 1 --data_name mnist",
     "ode/DDPMpp-000004.pth was made with other settings: --data_name is mnist and was digits; "
     "--model_channels is 16 and was 8; --lr is 1.0 and was"),
    (copy("ode"), f"{RUN} --workdir ode --train_steps 3", "is at step 4 already"),
    (copy("ode"), f"{RUN} --resume ode/latest.pth {OUT}", "is at step 4 already"),
    (copy("ode"), f"{RUN} --workdir ode --fresh", "--workdir ode holds a run, which --fresh would overwrite"),
    (copy("ode"), f"{RUN} --workdir ode --resume ode/DDPMpp-000002.pth", "out to go on from its last checkpoint"),
    (both(copy("ode"), checkpoint(lambda content: None)), f"{RUN} --workdir ode --resume x.pth", "did not begin from x.pth"),
    (copy("flow"), f"{RUN} --resume flow/latest.pth {OUT}", "is at step 4 already"),
    (workdir(set_key("run", "teacher", {"path": "/gone.pth", "sha256": "0" * 64}), "flow"), "train.py --workdir flow",
     "the teacher of flow/DDPMpp-000004.pth is no longer at /gone.pth: say where it is with --teacher"),
    (copy("ode"), f"{FLOW} --teacher ode/latest.pth --resume ode/latest.pth", "--resume ode/latest.pth is a denoiser; stage 2"),
    (both(copy("ode"), put("ode/DDPMpp-000004.pth", "")), f"{RUN} --workdir ode --train_steps 9",
     "or it is damaged: put a good one there, or remove it and ode/latest.pth to continue from the checkpoint before it"),
    (checkpoint(drop("run")), RESUME, "x.pth holds no run to continue"),
    (checkpoint(set_key("run", {})), RESUME, "what x.pth holds of its run cannot be continued: it is damaged"),
    (checkpoint(set_key("run", "window", "sums", [{"loss": float("nan")}])), RESUME, "cannot be continued"),
    (put("out", ""), RESUME, "--workdir out is a file"),
    (copy("ode"), f"{RUN} --workdir ode --resume gone.pth", "did not begin from gone.pth"),
    (checkpoint(lambda content: content["run"].update(images=1000, data="0" * 64)), RESUME,
     "the data has 1797 images, and had 1000"),
    (checkpoint(set_key("run", "data", "0" * 64)), RESUME, "the data has other images than the 1797 it had in x.pth"),
    (checkpoint(set_key("run", "origin", "x.pth")), RESUME, "cannot be continued"),
    (checkpoint(set_key("optim", {})), RESUME, "does not hold the optimizer of this run"),
    (checkpoint(set_key("optim", "state", {})), RESUME, "does not hold the optimizer of this run"),
    (checkpoint(drop("optim", "state", 0, "exp_avg")), RESUME, "the optimizer of this run, or it is damaged"),
    (checkpoint(set_key("optim", "state", [])), RESUME, "the optimizer of this run, or it is damaged"),
    (checkpoint(set_key("optim", "state", 0, "step", torch.tensor(-1.0))), RESUME, "of this run, or it is damaged"),
    (checkpoint(set_key("optim", "state", 0, "exp_avg", torch.zeros(8, device="meta"))), RESUME, "run, or it is damaged"),
    (checkpoint(set_key("mean", torch.zeros(1, 8, 8).to_sparse())), EVAL, "its mean is not a finite image"),
    (checkpoint(set_key("format", torch.ones(2))), EVAL, "x.pth has format tensor"),
    (checkpoint(set_key("run", "window", "sums", [{"loss": 1.0, 2: 1.0}])), RESUME, "cannot be continued"),
    (checkpoint(lambda content: content["run"].update(ranks=0, window={"steps": 0, "skipped": 0, "sums": []})), RESUME,
     "cannot be continued"),
    (checkpoint(lambda content: content["run"].update(ranks=2, window={"steps": 1, "skipped": 0, "sums": [{"a": 1.0}, {}]})),
     RESUME, "cannot be continued"),
    (checkpoint(set_key("run", "window", "steps", 10**400)), RESUME, "cannot be continued"),
    (checkpoint(set_key("optim", "state", 0, "step", torch.tensor(float("nan")))), RESUME, "of this run, or it is damaged"),
    (checkpoint(set_key("optim", "state", 0, "exp_avg", torch.zeros(3))), RESUME, "optimizer of this run, or it"),
    (checkpoint(set_key("model", BIAS, torch.full((1,), float("inf")))), RESUME, f"{BIAS} is not finite"),
    (workdir(set_key("step", -1)), f"{RUN} --workdir ode", "its step is -1"),
    (both(copy("ode"), put("ode/metrics.jsonl", "no json\n")), f"{RUN} --workdir ode", "ode/metrics.jsonl is damaged"),
    (both(copy("ode"), put("ode/metrics.jsonl", '{"step": "1"}\n')), f"{RUN} --workdir ode", "ode/metrics.jsonl is damaged"),
    (both(copy("ode"), put("ode/metrics.jsonl", '{"step": 2, "seconds": null}\n')), f"{RUN} --workdir ode --train_steps 9",
     "ode/metrics.jsonl is damaged"),
    (both(copy("ode"), put("ode/metrics.jsonl", "[" * 10**5 + "\n")), f"{RUN} --workdir ode", "ode/metrics.jsonl is damaged"),
    (dangling, f"{RUN} --workdir ode", "no checkpoint ode/DDPMpp-000009.pth: put a good one there, or"),

    # zips, pictures, arrays
    (zipped(**{"../x.png": png(), "a.png": png()}), DATA, "holds ../x.png, a path that leads out of it"),
    (zipped(**{"/etc/x.png": png(), "a.png": png()}), DATA, "holds /etc/x.png, a path that leads out of it"),
    (zipped(**{"../x.png": png(), "a.png": png()}), f"{GEN} x.zip", "a path that leads out of it"),
    (bomb, DATA, "holds b.png of 314572800 bytes: too large for an image"),
    (cut_zip, DATA, "x.zip is neither a folder nor a zip"),
    (zipped(**{"a.txt": "text"}), DATA, "no images in x.zip (among 1 files, such as a.txt)"),
    (zipped(**{"a.png": b"", "b.png": png()}), DATA, "cannot read image a.png, one of 2 in x.zip: it is damaged or no image"),
    (zipped(**{"a.png": png(30000, 30000), "b.png": png()}), DATA, "Image size (900000000 pixels) exceeds limit"),
    (zipped(**{"a.png": png(10000, 10000), "b.png": png()}), f"{GEN} x.zip", "exceeds limit"),
    (zipped(**{"a.png": png(), "b.png": png(9, 8)}), f"{GEN} x.zip", "images of different sizes or colours"),
    (array_bomb("arr_0"), f"{GEN} x.npz", "or it is damaged"),
    (both(statistics(), array_bomb("mu")), NPZ, "not a statistics file"),
    (statistics(mu=np.array([0, np.nan]), sigma=np.eye(2)), NPZ, "does not hold finite statistics"),
    (statistics(mu=np.zeros(2), sigma=np.full((2, 2), np.inf)), NPZ, "does not hold finite statistics"),
    (statistics(mu=np.full(2, 1e200), sigma=np.eye(2)), NPZ, "does not hold finite statistics"),
    (statistics(mu=np.zeros(2), sigma=-np.eye(2)), NPZ, "sigma has negative eigenvalues"),
    (statistics(mu=np.array([Hostile()], dtype=object), sigma=np.eye(1)), NPZ, "not a statistics file"),
    (statistics(mu=np.zeros(3), sigma=np.eye(3)), NPZ, "the reference has 2 features and the images 3"),
    (both(statistics(), put("x.npz", "hello")), NPZ, "not a statistics file"),
    (nothing, "fid.py --ref_path nowhere.npz --stat_path b.npz", "there is no file nowhere.npz"),
    (nothing, f"fid.py --ref_path {'a' * 300} --stat_path b.npz", "File name too long: aaa"),
    (both(statistics(), lambda p, models: os.mkfifo(p / "pipe")), f"{NPZ} --csv pipe", "pipe: it is a device or a pipe"),
    (both(copy("ode"), put("out/eval.json", "{}"), put("out/000000.png", png())), f"{ODE} --end_seed 1",
     "eval.json is damaged"),

    # from images to noise and back, from images on, between two: flags, folders, files of latents
    (latents(), f"{ODE} --encode in --latents x", "--encode and --latents begin from different things: choose one"),
    (latents(), f"{ODE} --encode in --from in --t 0.5", "--encode and --from begin from different things"),
    (latents(), f"{ODE} --latents x --from in --t 0.5", "--latents and --from begin from different things"),
    (latents(), f"{ODE} --encode in --format npz", "--format is npz, which is that of images"),
    (latents(), f"{ODE} --encode in --t 0.5", "--t is 0.5, which is the time for the images of --from"),
    (latents(), f"{ODE} --encode in --end_seed 1", "--end_seed is 1, but --encode says how many images there are"),
    (latents(), f"{ODE} --latents x --start_seed 1", "--start_seed is 1, but --latents draws no noise"),
    (latents(), f"{ODE} --encode in --num_steps 1", "--num_steps is 1: encoding takes 2 or more"),
    (latents(), f"{ODE} --encode in --churn", "--sde and --churn add noise"),
    (latents(), f"{ODE} --latents x --sde", "--sde and --churn add noise"),
    (latents(), f"{ODE} --encode in --class_idx 1", "the model has no classes"),
    (latents(), f"{FLOW_MAP} --encode in", "flow/latest.pth is a flow map, which runs to data alone: encode with the denoiser"),
    (both(latents(), loop), f"{ODE} --encode loop", "loop"),
    (latents(metadata='{"config": {"sampling": {"eval_eps1": 1e-3}, "data": {"class_names": null}}}'), f"{ODE} --latents x",
     "x.npz is not a file of latents"),
    (latents(), f"{ODE} --encode nowhere", "there is no folder or zip of images nowhere"),
    (both(copy("ode"), put("in/a.txt", "text")), f"{ODE} --encode in", "no images in in (among 1 files, such as a.txt)"),
    (both(latents(), put("in/0.png", png(9, 8))), f"{ODE} --encode in", "images of different sizes or colours among the 2"),
    (both(copy("ode"), put("in/0.png", png(9, 8))), f"{ODE} --encode in", "in are 1 of uint8 (1, 8, 9): the model takes uint8"),
    (both(copy("ode"), put("in/0.png", png(9, 8))), f"{ODE} --from in --t 0.5", "in are 1 of uint8 (1, 8, 9): the model takes"),
    (both(latents(), put("in/1.png", "text")), f"{ODE} --encode in", "cannot read image 1.png, one of 2 in in"),
    (both(latents(), put("in/1.png", "text")), f"{ODE} --from in --t 0.5", "cannot read image 1.png, one of 2 in in"),
    (both(latents(), put("out", "")), f"{ODE} --encode in", "--workdir out is a file: choose a folder"),
    (both(latents(), put("out/latents.npz", "")), f"{ODE} --encode in", "out/latents.npz is not a file of latents"),
    (latents(), f"{FLOW_MAP} --from in", "--from needs --t"),
    (latents(), f"{FLOW_MAP} --t 0.5", "--t is 0.5, which is the time for the images of --from"),
    (latents(), f"{FLOW_MAP} --from in --t 0", "--t is 0.0: it must be above eval_eps0, which is 0.01"),
    (latents(), f"{FLOW_MAP} --from in --t 1", "--t is 1.0: it must be above eval_eps0, which is 0.01, and at most 1 - eval"),
    (latents(), f"{FLOW_MAP} --from in --t nan", "--t is nan: it must be above"),
    (latents(), f"{FLOW_MAP} --from in --t 0.5 --start_seed -1", "seeds run from 0"),
    (latents(), f"{FLOW_MAP} --from in --t 0.5 --start_seed 4294967295", "each below 2^32"),
    (latents(), f"{FLOW_MAP} --from nowhere --t 0.5", "there is no folder or zip of images nowhere"),
    (latents(), f"{ODE} --latents nowhere", "cannot read nowhere.npz: No such file or directory"),
    (both(latents(), put("x.npz", "hello")), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(latents=np.array([Hostile()], dtype=object)), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(images=None), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(images=np.zeros((3, 1, 8, 8), np.uint8)), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(labels=np.zeros(3, np.int64)), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(metadata="{}"), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(metadata="[" * 10**5), f"{ODE} --latents x", "x.npz is not a file of latents"),
    (latents(latents=np.full((2, 1, 8, 8), np.nan, np.float32)), f"{ODE} --latents x", "the latents in x.npz are not finite"),
    (latents(latents=np.zeros((2, 1, 8, 8))), f"{FLOW_MAP} --latents x", "the latents in x.npz are 2 of float64"),
    (latents(latents=np.zeros((2, 3, 8, 8), np.float32), images=np.zeros((2, 3, 8, 8), np.uint8)), f"{FLOW_MAP} --latents x",
     "the latents in x.npz are 2 of float32 (3, 8, 8): the model takes float32 (1, 8, 8)"),
    (latents(latents=np.zeros((0, 1, 8, 8), np.float32), images=np.zeros((0, 1, 8, 8), np.uint8)), f"{FLOW_MAP} --latents x",
     "the latents in x.npz are 0 of"),
    (latents(), f"{FLOW_MAP} --latents x --eval_eps1 0.01", "sampling starts at 1 - 0.01: add --eval_eps1 0.001"),
    (latents(), f"{ROW} --interpolate 3", "--interpolate 3: it takes two numbers"),
    (latents(), f"{ROW} --interpolate", "it takes two numbers, such as --interpolate 3 8"),
    (latents(), f"{ROW} --interpolate 3 -8", "--interpolate 3 -8: seeds run from 0"),
    (latents(), f"{ROW} --interpolate 3 4294967296", "seeds run from 0, each below 2^32"),
    (latents(), f"{ROW} --interpolate 3 eight", "invalid int value: 'eight'"),
    (latents(), f"{ROW} --interpolate 3 8 --trajectory", "--trajectory is not for --interpolate"),
    (latents(), f"{ROW} --interpolate 3 8 --nsampling 9", "--nsampling is not for --interpolate"),
    (latents(), f"{ROW} --interpolate 3 8 --columns 1", "--columns is 1: --interpolate draws 2 images or more"),
    (latents(), f"{ROW} --trajectory --columns 3", "--columns is not for --trajectory"),
    (latents(), f"{ROW} --latents x", "--latents is for --interpolate"),
]  # fmt: skip


def listing(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refused(job, message, ranks):
    assert job.wait() == [2] * ranks, job.err()
    errors = [line for line in job.err().splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], job.err()
    assert "Traceback" not in job.err() and job.out() == ""


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{i}: {CASES[i][1][:60]} ({CASES[i][2][:30]})")
def test_bad_input_ends_with_one_line_and_writes_nothing(number, tmp_path, tmp_path_factory, models, record_property):
    import shlex

    make, command, message = CASES[number]
    make(tmp_path, models)
    before, logs = listing(tmp_path), tmp_path_factory.mktemp("logs")
    jobs = [Job(logs / f"{n}", *shlex.split(command), ranks=n, cwd=tmp_path, prepare=impatient) for n in (1, 2)]
    for ranks, job in enumerate(jobs, 1):
        refused(job, message, ranks)
    assert listing(tmp_path) == before
    record_property("bad inputs tried, on 1 and on 2 ranks", 1)


def become_nobody():
    impatient()
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("command", [RUN, "fid.py --mode ref"])
def test_permission_denied_is_one_line(command, ranks, tmp_path, record_property):
    """As root, by being somebody else for the test; else by a folder that one may not enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder) / "closed"
        closed.mkdir(mode=0o000)
        where = ["--workdir", closed / "run"] if command == RUN else ["--dest", closed / "x.npz"]
        refused(Job(tmp_path / "log", *command.split(), *where, ranks=ranks, prepare=become_nobody), "Permission denied", ranks)
        closed.chmod(0o755)
        assert list(closed.iterdir()) == []
    record_property("bad inputs tried, on 1 and on 2 ranks", ranks == 2)


def test_compiling_without_a_compiler_is_one_line(tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = launch(*RUN.split(), "--compile", "--workdir", tmp_path / "run", expect=2)  # a process that reads the environment
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: --compile failed: it needs a C++ compiler"), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    record_property("bad inputs tried, on 1 and on 2 ranks", 1)


def test_the_table_is_long_enough():
    assert len(CASES) >= 60
