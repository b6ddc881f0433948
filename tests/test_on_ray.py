"""A list of pairs over Ray: the same files as one after another; a worker that is killed loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loras import kohya_name, write_lora
from safetensors.torch import load_file, save_file

from ziplora_lib.lora.reader import read

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--steps", "2", "--resolution", "64", "--pictures", "1", "--samples", "4", "--sampler-steps", "2",
         "--at-once", "8", "--device", "cpu", "--method", "ziplora"]  # fmt: skip
SUBJECTS, STYLES = ("cat", "dog", "owl", "fox", "cow"), ("ink", "oil")


@pytest.fixture(scope="module")
def listed(layers, tmp_path_factory):
    """A list of ten pairs."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("pairs")
    shapes = {
        kohya_name(part, name): shape for (part, name), shape in layers.items() if part == "unet" and "attn" in name
    }
    for seed, name in enumerate(SUBJECTS + STYLES):
        phrase = {"modelspec.trigger_phrase": f"a picture of {name}"}
        write_lora(folder / f"{name}.safetensors", shapes, phrase, rank=2, seed=seed)
    rows = [f"{subject}.safetensors,{style}.safetensors" for subject in SUBJECTS for style in STYLES]
    (folder / "pairs.csv").write_text("\n".join(["subject,style", *rows]) + "\n")
    return folder / "pairs.csv"


def started(pairs, out, *more):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "ziplora_lib", "zip-many", str(pairs), "--out-folder", str(out), *FLAGS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture(scope="module")
def serial(listed, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    assert "10 pairs: 10 done" in done(started(listed, out))
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def workers():
    """The processes of Ray's workers that have a model."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::Worker"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_two_workers_write_the_same_bytes(serial, listed, tmp_path):
    assert "10 pairs: 10 done" in done(started(listed, tmp_path / "out", "--ray"))
    assert files(tmp_path / "out") == files(serial)
    assert (tmp_path / "out/contact-sheet.png").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the worker in /proc")
def test_a_worker_that_is_killed_loses_nothing(serial, listed, tmp_path):
    process, out = started(listed, tmp_path / "out", "--ray"), tmp_path / "out"
    end = time.monotonic() + 200
    while len(list(out.glob("*.safetensors"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    killed = workers()
    assert killed
    os.kill(killed[0], signal.SIGKILL)
    assert "10 pairs: 10 done" in done(process)
    assert files(out) == files(serial)
    assert not list(out.glob(".*"))


def test_a_list_goes_on_where_it_was_left(serial, listed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(serial, out)
    for name in ("cat-ink", "owl-oil"):
        for path in out.glob(f"{name}.*"):
            path.unlink()
    said = done(started(listed, out, "--skip-existing"))
    assert "10 pairs: 2 done, 8 skipped" in said or "10 pairs: 8 skipped, 2 done" in said
    assert "skipped: dog-ink  finished before by this recipe, and whole" in said
    assert files(out) == files(serial)
    # what was damaged since is told, and left alone
    path = out / "fox-ink.safetensors"
    tensors, metadata = load_file(path), read(path).metadata
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata)
    process = started(listed, out, "--skip-existing", "--report", str(tmp_path / "report.json"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "refused: fox-ink  fox-ink.safetensors: is there already, but is not what its own hash says" in said
    states = {one["name"]: one["state"] for one in json.loads((tmp_path / "report.json").read_text())["outcomes"]}
    assert states.pop("fox-ink") == "refused"
    assert set(states.values()) == {"skipped"}


def test_a_cluster_that_is_not_there_is_told(listed, tmp_path):
    process = started(listed, tmp_path / "out", "--ray", "127.0.0.1:1")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "there is no Ray cluster at 127.0.0.1:1" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_told_once(listed, tmp_path):
    process = started(listed, tmp_path / "out", "--ray", "--model", str(tmp_path / "no-model"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert "no worker could be started (" in err
    assert "no-model" in err
    assert "Traceback" not in err
