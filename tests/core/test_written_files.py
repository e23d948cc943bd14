"""Where verbs write and read: what they take as a path, and what becomes of the file that was there."""

import io
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.files import write_atomically
from qkernels.errors import InvalidArgument, InvalidType, Unsupported
from qkernels.plan.profile import Profile, StepTime

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    return qkernels.convert(qkernels.calibrate(qkernels.prepare(nn.Sequential(nn.Linear(4, 4)).eval(), X), [X]))


@pytest.fixture(scope="module")
def plan(converted):
    return qkernels.compile(converted, X)


@pytest.fixture(scope="module")
def profile():
    return Profile((StepTime("a", "linear", "scalar", (), "", 1.0, 9, 9),), 1.0, 1.0, "scalar", 1, 0)


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("save", lambda c, plan, profile, path: qkernels.save(c, path)),
        ("load", lambda c, plan, profile, path: qkernels.load(path)),
        ("plan.save", lambda c, plan, profile, path: plan.save(path)),
        ("load_plan", lambda c, plan, profile, path: qkernels.load_plan(path)),
        ("profile.save", lambda c, plan, profile, path: profile.save(path)),
    ],
)
def test_what_is_no_path_is_refused_by_the_verb(verb, call, converted, plan, profile):
    for path in (None, io.BytesIO(), 3):
        got = type(path).__name__
        with pytest.raises(InvalidType, match=rf"^{verb}: path must be a string or os.PathLike, got {got}$"):
            call(converted, plan, profile, path)
    with pytest.raises(InvalidArgument, match=rf"^{verb}: path must name a file, got ''$"):
        call(converted, plan, profile, "")


def test_paths_are_strings_bytes_and_paths(converted, tmp_path):
    for path in (tmp_path / "a", str(tmp_path / "b"), os.fsencode(tmp_path / "c")):
        qkernels.save(converted, path)
        assert torch.equal(qkernels.load(path)(X), converted(X))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_skeleton_that_is_no_module_is_refused(converted, tmp_path):
    qkernels.save(converted, tmp_path / "m")
    with pytest.raises(InvalidType, match=r"^load: skeleton must be a torch.nn.Module, got int$"):
        qkernels.load(tmp_path / "m", skeleton=3)


def test_a_plan_is_made_from_bytes():
    with pytest.raises(InvalidType, match=r"^Plan: data must be the bytes of a plan file, got NoneType$"):
        qkernels.Plan(None)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    (tmp_path / "new").symlink_to("folder/missing")
    for name in ("link", "new"):
        write_atomically(tmp_path / name, b"content")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path / "folder")) == ["file", "missing"]


def test_a_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_longest_name_is_good(tmp_path):
    name = "m" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_atomically(tmp_path / name, b"content")
    assert os.listdir(tmp_path) == [name]


def test_a_picture_of_an_unknown_ending_is_refused_with_the_endings(profile, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidArgument, match=r"^picture: the ending of .*a\.xyz must be one of \[.*'png'"):
        profile.save(tmp_path / "a.xyz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("count", "error"), [("a", InvalidType), (-1, InvalidArgument)])
def test_the_worst_steps_are_counted(count, error, profile):
    assert len(profile.worst(1)) == 1
    with pytest.raises(error, match=r"^worst: count must be"):
        profile.worst(count)


@pytest.mark.parametrize("verb", ["save", "plan.save"])
def test_what_is_no_regular_file_is_not_replaced(verb, converted, plan, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match=r"no regular file: .*pipe"):
        plan.save(pipe) if verb == "plan.save" else qkernels.save(converted, pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_parent_that_is_no_folder_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as caught:
        write_atomically(tmp_path / "file" / "x", b"content")
    assert caught.value.filename == str(tmp_path / "file" / "x")


def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for it."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom qkernels.core.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))\n"
        "try:\n    write_atomically(Path(sys.argv[1]), bytes(4096))\n"
        "except OSError as error:\n    print(error.filename)\n"
    )
    path = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(path), "")
    assert os.listdir(tmp_path) == []


def test_a_link_that_leads_to_itself_stays(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        write_atomically(tmp_path / "loop", b"content")
    assert os.readlink(tmp_path / "loop") == "loop"


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anything
    with pytest.raises(PermissionError, match="model"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_plan_inside_a_model_is_no_model_to_save(plan, tmp_path):
    for model, name in ((plan, "the model"), (nn.Sequential(plan, nn.Softmax(-1)), "0")):
        with pytest.raises(Unsupported, match=rf"save: {name} is a plan, whose file plan.save\(path\) writes"):
            qkernels.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []
