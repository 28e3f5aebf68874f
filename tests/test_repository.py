"""What the repository promises as a whole: its layers, its README, its command lines, its settings."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess

import pytest

import defaults
from conftest import ROOT, run
from dist_util import UserError

SCRIPTS = ("train", "eval", "fid", "teaser", "compare")
MAY_IMPORT = {
    # imports point down
    **dict.fromkeys(SCRIPTS, {"misc", "network", "inception", "lpips", "defaults", "sde", "dist_util"}),
    "misc": {"network", "inception", "lpips", "defaults", "sde", "dist_util"},
    "network": {"sde"},
    "defaults": {"dist_util"},
    **dict.fromkeys(("sde", "dist_util", "inception", "lpips"), set()),
}


def test_imports_point_down():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == set(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported & modules <= allowed, name


def test_the_mathematics_touches_neither_files_nor_generators():
    tree = ast.parse((ROOT / "sde.py").read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    assert not names & {"open", "print", "rand", "randn", "randint", "randn_like", "rand_like", "multinomial", "generator"}


# --------------------------------------------------------------------------------------------------- the README


def readme_commands():
    """Every command in the README's sh blocks, one string each, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def test_readme_names_the_two_commands_first():
    commands = readme_commands()
    assert [c for c in commands if c.startswith("make")][:2] == ["make demo", "make test"]
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:50])
    assert "make demo" in first_screen and "make test" in first_screen and "assets/" in first_screen


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_parsed_by_their_scripts(command):
    words = shlex.split(command)
    if words[0] in ("git", "cd", "make", "head"):
        targets = (ROOT / "Makefile").read_text()
        assert words[0] != "make" or all(re.search(rf"^{word}:", targets, flags=re.M) for word in words[1:])
        return
    assert words[0] in ("python", "torchrun", ".venv/bin/python"), command
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[script].startswith("benchmarks/"):
        assert (ROOT / words[script]).is_file()
        run(words[script], "--help")
        return
    module = importlib.import_module(words[script].removesuffix(".py"))
    _, flags = defaults.parse(module.Run, sections_of(module), words[script + 1 :])
    if "mode" in flags or "data_name" in flags:
        defaults.resolve(flags)


def sections_of(module):
    """The sections in the script's call of defaults.parse."""
    source = (ROOT / f"{module.__name__}.py").read_text()
    return ast.literal_eval(re.search(r"defaults\.parse\(Run, (\[[^]]*\])", source).group(1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    text = run(f"{script}.py", "--help").stdout
    module = importlib.import_module(script)
    sections = [module.Run] + [defaults.SECTIONS[name] for name in sections_of(module)]
    for section in sections:
        for f in dataclasses.fields(section):
            assert f"--{f.name}" in text and f.metadata["help"]
    assert text.count("(default:") >= sum(len(dataclasses.fields(s)) for s in sections) - 3  # names hidden by the script's own


def test_no_python_of_ours_is_ignored_by_git_and_no_data_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {f"{name}.py" for name in MAY_IMPORT} <= set(tracked)
    assert [f for f in tracked if f.startswith(("data/", "logs/"))] == ["data/README.md", "data/digits.npz"]


# ------------------------------------------------------------------------------------------------------- settings


def test_every_preset_makes_a_valid_configuration_that_survives_json():
    for data_name, mode in defaults.TRAIN_PRESETS:
        config = defaults.resolve({"data_name": data_name, "mode": mode})
        assert defaults.from_dict(json.loads(json.dumps(defaults.to_dict(config)))) == config


def test_presets_of_mnist_and_cifar_are_the_reference_recipe():
    mnist, cifar = (defaults.resolve({"data_name": name, "mode": "denoiser"}) for name in ("mnist", "cifar"))
    assert (mnist.network.model_channels, mnist.network.channel_mult, mnist.network.attn_resolutions) == (32, (1, 2, 2), (14,))
    assert (cifar.network.model_channels, cifar.network.channel_mult, cifar.network.attn_resolutions) == (
        128,
        (1, 2, 2, 2),
        (16,),
    )
    assert (mnist.train.lr, mnist.train.ema_decay, mnist.train.train_steps, mnist.data.centered) == (1e-3, 0.999, 10000, False)
    assert (cifar.train.lr, cifar.train.ema_decay, cifar.train.train_steps, cifar.data.centered) == (2e-4, 0.9999, 400000, True)
    for config in (mnist, cifar):
        assert (config.network.num_blocks, config.network.dropout, config.network.sigma_data, config.network.M) == (
            4,
            0.1,
            1,
            999,
        )
        assert (config.train.global_bsz, config.train.lr_rampup_steps, config.train.lr_decay) == (1024, 500, "none")
        assert (config.train.train_eps0, config.train.train_eps1) == (1e-5, 1e-3)
    for name, lr in (("mnist", 1e-3), ("cifar", 1e-4)):
        config = defaults.resolve({"data_name": name, "mode": "characteristic"})
        assert (config.train.lr, config.train.global_bsz, config.train.lr_rampup_steps, config.train.train_steps) == (
            lr,
            256,
            200,
            2000,
        )
        assert (config.sampling.num_steps, config.distil.teacher_steps) == (20, 19)


def parsed(*argv):
    from train import Run

    return defaults.parse(Run, ["task", "data", "network", "train", "distil", "sampling"], list(argv))[1]


def test_flags_win_over_presets_and_presets_over_defaults():
    config = defaults.resolve(parsed("--data_name", "mnist", "--lr", "5e-4"))
    assert config.train.lr == 5e-4 and config.network.model_channels == 32


def test_lists_and_booleans_are_written_in_every_documented_way():
    assert parsed("--channel_mult", "1", "2", "2") == {"channel_mult": (1, 2, 2)}
    assert parsed("--attn_resolutions") == {"attn_resolutions": ()}
    for argv, value in (
        (["--churn"], True),
        (["--churn", "True"], True),
        (["--churn", "False"], False),
        (["--no-churn"], False),
    ):
        assert parsed(*argv) == {"churn": value}
    assert parsed("--gamma", "1e-1") == {"gamma": 0.1}


@pytest.mark.parametrize("flags", [{"bsz": 1}, {"bsz": 2, "dsm_share": 0.8}, {"dsm_share": 1.0}])
def test_each_loss_of_stage_2_needs_images(flags):
    with pytest.raises(UserError, match="--dsm_share"):
        defaults.resolve({"mode": "characteristic", **flags})
    defaults.resolve({"mode": "characteristic", **flags, "dsm_weight": 0.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"model_chanels": 8}}, "unknown setting 'network.model_chanels'"),
        ({"net": {}}, "unknown section 'net'"),
        ({"network": {"model_channels": "8"}}, "is '8'"),
        ({"network": {"channel_mult": [1, 2.5]}}, "channel_mult"),
        ([], "not a dictionary"),
    ],
)
def test_unknown_or_wrong_configurations_are_fatal(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        defaults.from_dict(change)


# ------------------------------------------------------------------------------------------------ users' mistakes

MISTAKES = [
    (["train.py", "--lr", "fast"], "invalid float value: 'fast'"),
    (["train.py", "--lr", "-1"], "--lr is -1.0: it must be positive"),
    (["train.py", "--lr", "nan"], "--lr is nan"),
    (["train.py", "--bogus", "1"], "unrecognized arguments: --bogus"),
    (["train.py", "--data_name", "imagenet"], "invalid choice: 'imagenet'"),
    (["train.py", "--global_bsz", "100", "--bsz", "64"], "--global_bsz is 100"),
    (["train.py", "--channel_mult", "1", "0"], "--channel_mult"),
    (["train.py", "--mode", "characteristic"], "--teacher is missing"),
    (["train.py", "--mode", "characteristic", "--teacher", "nowhere.pth"], "there is no checkpoint nowhere.pth"),
    (["train.py", "--teacher", "x.pth"], "--teacher is for stage 2"),
    (["train.py", "--data_name", "folder", "--data_path", "nowhere"], "nowhere is missing"),
    (["train.py", "--data_name", "afhq", "--data_path", "nowhere"], "--data_name digits"),
    (["train.py", "--workdir", "README.md"], "is a file"),
    (["train.py", "--workdir", "README.md/run"], "cannot write README.md/run"),
    (["train.py", "--model_channels", "36", "--channel_mult", "1", "2", "2"], "--model_channels 36"),
    (["train.py", "--train_eps0", "1"], "--train_eps0 is 1.0"),
    (["eval.py", "--workdir", "x"], "--checkpoint is missing"),
    (["eval.py", "--checkpoint", "README.md", "--workdir", "x", "--end_seed", "1"], "is not a checkpoint"),
    (["eval.py", "--checkpoint", "x", "--workdir", "x", "--start_seed", "5", "--end_seed", "1"], "--start_seed 5"),
    (["eval.py", "--churn", "perhaps"], "neither True nor False"),
    (["fid.py", "--mode", "fid", "--ref_path", "a.npz"], "one of --stat_path, --img_folder, --checkpoint"),
    (["fid.py", "--mode", "gen", "--dest", "a.npz"], "one of --img_folder, --checkpoint"),
    (
        ["fid.py", "--mode", "gen", "--dest", "a.npz", "--img_folder", "x", "--checkpoint", "y"],
        "one of --img_folder, --checkpoint",
    ),
    (
        ["fid.py", "--mode", "gen", "--dest", "a.npz", "--img_folder", "x", "--num_steps", "1"],
        "--num_steps is for images drawn",
    ),
    (
        ["fid.py", "--mode", "gen", "--dest", "a.npz", "--checkpoint", "x", "--start_seed", "9", "--end_seed", "1"],
        "--start_seed 9",
    ),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--num", "1798"], "--num is 1798, but there are only 1797 images"),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--num", "1"], "--num is 1: a covariance needs two"),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--metrics", "fid,kid,is"], "--metrics is fid,kid,is"),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--metrics", ""], "--metrics is :"),
    (["fid.py", "--ref_path", "a.npz", "--stat_path", "b.npz", "--num", "9"], "--num and --features are for images"),
    (
        ["fid.py", "--mode", "ref", "--dest", "a.npz", "--features", "inception", "--inception_weights", "no/w.pth"],
        "need no/w.pth: get it from https://github.com/mseitzer",
    ),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--img_folder", "x"], "--img_folder is not for --mode ref"),
    (["fid.py", "--mode", "gen", "--dest", "a.npz", "--img_folder", "x", "--csv", "y"], "--csv is not for --mode gen"),
    (["fid.py", "--ref_path", "a.npz", "--img_folder", "x", "--dest", "y.npz"], "--dest is not for --mode fid"),
    (["fid.py", "--ref_path", "a.npz", "--img_folder", "x", "--end_seed", "9"], "--end_seed is for images drawn"),
    (["fid.py", "--ref_path", "a.npz", "--img_folder", "x", "--image_size", "9"], "--image_size is for --mode ref"),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--force"], "--force is for --mode fid"),
    (["fid.py", "--ref_path", "a.npz", "--img_folder", "x", "--metrics", "kid,fid,kid"], "each once"),
    (["fid.py", "--mode", "ref", "--dest", "a.npz", "--seed", "1"], "--seed is that of the subset"),
    (["train.py", "--ref_path", "a.npz"], "--ref_path is for --fid_freq"),
    (["train.py", "--fid_freq", "10"], "--ref_path is missing"),
    (["train.py", "--fid_freq", "10", "--ref_path", "nowhere.npz"], "there is no file nowhere.npz"),
    (["train.py", "--fid_num", "1"], "--fid_num is 1"),
    (["fid.py", "--mode", "fid", "--ref_path", "nowhere.npz", "--stat_path", "b.npz"], "there is no file nowhere.npz"),
    (["fid.py", "--mode", "fid", "--ref_path", "README.md", "--stat_path", "b.npz"], "not a statistics file"),
    (["fid.py", "--mode", "ref"], "--dest is missing"),
    (["fid.py", "--mode", "ref", "--dest", "README.md/x.npz"], "cannot write README.md/x.npz"),
    (["teaser.py", "--checkpoint", "nowhere.pth"], "there is no checkpoint"),
    (["compare.py", "--denoiser", "nowhere.pth"], "--characteristic is missing"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[" ".join(command) for command, _ in MISTAKES])
def test_a_mistake_ends_with_one_line(command, message, monkeypatch, capsys, tmp_path):
    """In this process, for speed; test_scores.py has the same through real processes and several ranks."""
    import dist_util

    monkeypatch.setattr("sys.argv", command)
    module = importlib.import_module(command[0].removesuffix(".py"))
    monkeypatch.chdir(ROOT)
    before = set(ROOT.rglob("*.npz")) | set(ROOT.glob("logs/*"))
    with pytest.raises(SystemExit) as stopped:
        dist_util.launch(module.main)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and out == "" and len(lines) == 1 and message in lines[0], err
    assert set(ROOT.rglob("*.npz")) | set(ROOT.glob("logs/*")) == before


def test_mistakes_on_several_ranks_are_reported_once():
    done = run("train.py", "--mode", "characteristic", ranks=2, expect=1)  # torchrun's own status
    assert done.stderr.count("error: --teacher is missing") == 1 and "Error:" not in done.stderr.split("torch.distributed")[0]


def test_wrong_checkpoints_are_refused_by_name(trained, tmp_path):
    def mistake(*command):
        return run(*command, expect=2).stderr.strip().splitlines()[-1]

    flow, ode, out = trained["characteristic"], trained["denoiser"], tmp_path / "out"
    assert "is a flow map" in mistake("train.py", "--mode", "characteristic", "--teacher", flow, "--workdir", out)
    assert "--mode is denoiser" in mistake("eval.py", "--mode", "denoiser", "--checkpoint", flow, "--workdir", out)
    assert "--model_channels is 64" in mistake("eval.py", "--model_channels", "64", "--checkpoint", ode, "--workdir", out)
    assert "--sde is True" in mistake("eval.py", "--sde", "--checkpoint", flow, "--workdir", out)
    assert "--model_channels is 16 and was 8; --lr" in mistake(
        *("train.py", "--workdir", trained["folders"][0], "--model_channels", "16", "--lr", "1")
    )
    assert not out.exists()


def test_checkpoints_never_run_code(tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    done = run("eval.py", "--checkpoint", tmp_path / "hostile.pth", "--workdir", tmp_path / "out", expect=2)
    assert "is not a checkpoint" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "executed").exists()
