"""Files, pictures, and weights that others publish."""

from dist_util import Stopped, UserError

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import misc
from conftest import run

# ---------------------------------------------------------------------------------------------------------------- files


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    misc.check_writable(tmp_path / "new" / "deeper" / "x.npz")
    long = tmp_path / ("x" * 300) / "x.npz"
    places = [(tmp_path, "it is a folder"), (tmp_path / "file" / "x.npz", "file is not writable"), (long, "too long")]
    if Path("/proc/self").exists():
        places.append((Path("/proc/new/x.npz"), "/proc is not writable"))
    for path, message in places:
        with pytest.raises(UserError, match=message):
            misc.check_writable(path)
    done = run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "file" / "x.npz", expect=2)
    assert done.stderr.count("error: cannot write") == 1 and "statistics" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    files = [tmp_path / f".x.npz.{number}.tmp" for number in (gone.pid, os.getpid(), os.getppid(), 10**30)]
    for path in [*files, tmp_path / ".mine.tmp"]:
        path.write_text("half")
    misc.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {files[2].name, ".mine.tmp"}


def test_a_file_is_written_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    """The file itself still waits for the disk, and what the disk says of it counts."""
    real, synced, refuses = os.fsync, [], [errno.EINVAL, None]

    def sync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        if number := refuses[not folder]:
            raise OSError(number, os.strerror(number))
        synced.append(folder)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    misc.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and synced == [False]
    refuses[:] = [None, errno.EIO]
    with pytest.raises(UserError, match="cannot write .*b.json: Input/output error; choose another place"):
        misc.write_json(tmp_path / "b.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_environment_keeps_its_backend_when_something_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "bogus")
    figure, (ax,) = misc.new_figure(1, 2, 2)
    ax.plot([1, 2], [3, 4])
    misc.write_figure(tmp_path / "a.png", figure)
    Image.open(tmp_path / "a.png").verify()
    assert os.environ["MPLBACKEND"] == "bogus"


@pytest.mark.parametrize(
    "error", [ValueError("two\n  lines"), UserError("no place"), MemoryError(), RuntimeError("RuntimeError")]
)
def test_what_may_fail_is_a_warning_of_one_line(capsys, error):
    with misc.not_fatal("loss.png"):
        raise error
    text = " ".join(str(error).split()) or "MemoryError"
    assert capsys.readouterr().err == f"warning: cannot make loss.png: {text}\n"
    with pytest.raises(Stopped), misc.not_fatal("loss.png"):
        raise Stopped(signal.SIGTERM)


# -------------------------------------------------------------------------------------------------------- weights files


def published(monkeypatch, tmp_path, content=b"weights", promise=None):
    """A stand-in for the place where weights are published, on this disk."""
    name = f"w-{promise or hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / name).write_bytes(content)
    monkeypatch.setitem(misc.WEIGHTS, "inception_weights", (f"file://{tmp_path}/site/{name}", "scores need"))
    monkeypatch.chdir(tmp_path)
    return name


def test_weights_are_downloaded_once_and_checked(monkeypatch, tmp_path):
    name = published(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=f"scores need weights/{name}: get it from file://.*--inception_weights.*--download"):
        misc.weights_file("inception_weights", None, False)
    path, digest = misc.weights_file("inception_weights", None, True)
    assert path.read_bytes() == b"weights" and digest == hashlib.sha256(b"weights").hexdigest()
    assert [p.name for p in (tmp_path / "weights").iterdir()] == [name]
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged or another file"):
        misc.weights_file("inception_weights", None, True)


def test_a_download_with_another_hash_leaves_nothing(monkeypatch, tmp_path):
    published(monkeypatch, tmp_path, promise="00000000")
    with pytest.raises(UserError, match="cannot download.*its SHA-256 is .*, not 00000000"):
        misc.weights_file("inception_weights", None, True)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(monkeypatch, tmp_path):
    """Also where no hash is known: the place says 100 bytes are coming and sends 7."""
    name = published(monkeypatch, tmp_path)
    unhashed = (f"file://{tmp_path}/site/w.pt", "scores need")
    monkeypatch.setitem(misc.WEIGHTS, "inception_weights", unhashed)
    (tmp_path / "site" / name).rename(tmp_path / "site" / "w.pt")
    real = misc.urllib.request.urlopen

    def short(url, timeout):
        reply = real(url, timeout=timeout)
        reply.headers.replace_header("Content-Length", "100")
        return reply

    monkeypatch.setattr(misc.urllib.request, "urlopen", short)
    with pytest.raises(UserError, match="broke off after 7 of 100 bytes"):
        misc.weights_file("inception_weights", None, True)
    assert list((tmp_path / "weights").iterdir()) == []
    monkeypatch.undo()


def test_a_file_of_the_users_own_name_promises_no_hash(monkeypatch, tmp_path):
    published(monkeypatch, tmp_path)
    (tmp_path / "mine-20240101.pth").write_bytes(b"x")
    assert misc.weights_file("inception_weights", "mine-20240101.pth", False)[1] == hashlib.sha256(b"x").hexdigest()


def test_a_bar_that_a_signal_interrupted_while_it_was_made_goes_in_silence():
    misc.Bar.__new__(misc.Bar).__del__()
