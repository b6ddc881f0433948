"""A long merge that was killed goes on where it was, to the byte; and what was left of it is offered, or forgotten."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from ziplora_lib import job, many, snapshot
from ziplora_lib.errors import BadInput, MergeFailed, NotSaved
from ziplora_lib.jobs import Job
from ziplora_lib.lora import writer
from ziplora_lib.merge.method import State


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(snapshot, "EVERY", 0.0)


class Killed(BaseException):
    """As a kill: nothing of ours may catch it and tidy up."""


def killed_at(step, phase="merge"):
    def callback(info):
        if info["phase"] == phase and info["step"] == step:
            raise Killed

    return callback


def broken_off(recipe, host, step=3, phase="merge"):
    with pytest.raises(Killed):
        job.run(recipe, host, killed_at(step, phase))


def left(host):
    return sorted(path.name for path in host.scratch().iterdir()) if host.scratch().is_dir() else []


@pytest.mark.parametrize("objective", ["guided", "paper"])
def test_it_goes_on_where_it_was_and_gives_the_same_bytes(host, recipe_of, every_step, objective):
    recipe = recipe_of(steps=6, objective=objective)
    whole = job.run(recipe, host)
    wanted = host.destination("merged").read_bytes()
    assert left(host) == []
    assert not host.scratch().exists()
    host.destination("merged").unlink()
    for beside in host.folder.glob("merged.*"):
        beside.unlink()
    broken_off(recipe, host)
    assert [one.suffix for one in host.scratch().iterdir()] == [".steps"]
    seen = []
    result = job.run(recipe, host, lambda info: seen.append(info["step"]) if info["phase"] == "merge" else None)
    assert seen == [4, 5, 6]
    assert any("went on from step 3" in said for said in result.warnings)
    assert host.destination("merged").read_bytes() == wanted
    assert [entry["loss"] for entry in result.history] == [entry["loss"] for entry in whole.history]
    assert left(host) == []


def test_after_the_last_step_only_the_saving_is_left(host, recipe_of, every_step):
    """A full disk after an hour of steps."""
    broken_off(recipe_of(), host, 0, "save")
    seen = []
    result = job.run(recipe_of(), host, lambda info: seen.append(info["phase"]))
    assert "merge" not in seen
    assert result.losses["step"] == 4


def full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_learned_outlives_a_disk_that_is_full(host, recipe_of, monkeypatch):
    """Also of a run that is too short for snapshots."""
    with monkeypatch.context() as patched:
        patched.setattr(writer.atomic, "sync_folder", full_disk)
        with pytest.raises(NotSaved, match=r"could not be saved in .* \(No space left on device\).*zip again"):
            job.run(recipe_of(), host)
    for file in host.folder.glob("merged.*"):  # the rename was before the failure
        file.unlink()
    phases = []
    result = job.run(recipe_of(), host, lambda info: phases.append(info["phase"]))
    assert "merge" not in phases
    assert any("went on from step 4" in said for said in result.warnings)
    assert left(host) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no list"), MergeFailed("another checkpoint")])
def test_after_the_file_is_saved_nothing_begins_again(host, recipe_of, monkeypatch, error):
    """Nor does it fail: the LoRA is there."""

    def publish(path):
        raise error

    monkeypatch.setattr(host, "publish", publish)
    run = Job.merge(recipe_of(method="direct"))
    run.run(host)
    assert run.state == "done", run.error
    assert any("could not be put into the list" in said for said in run.result.warnings)
    assert run.result.tag == "<lora:merged:1>"


def test_a_thread_that_is_ended_leaves_no_job_at_work(host, recipe_of):
    run = Job.merge(recipe_of())
    with pytest.raises(SystemExit):
        run.run(host, lambda _: sys.exit())
    assert (run.state, run.error) == ("failed", "it was ended from outside")


def test_a_host_that_cannot_be_had_leaves_no_job_in_the_queue(host, recipe_of, monkeypatch):
    def exclusive(name):
        raise RuntimeError("no queue")

    monkeypatch.setattr(host, "exclusive", exclusive)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    run = Job.merge(recipe_of())
    run.start(host)
    while not run.ended:
        time.sleep(0.01)
    assert "no queue" in run.error


def test_a_folder_that_is_gone_when_it_saves(host, recipe_of):
    def callback(info):
        if info["phase"] == "save":
            shutil.rmtree(host.folder)

    run = Job.merge(recipe_of())
    run.run(host, callback)
    assert run.state == "failed"
    assert run.error.startswith(f"the folder {host.folder} does not exist")


def test_a_lora_folder_behind_a_link(host, recipe_of, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setattr(host, "folder", tmp_path / "link")
    result = job.run(recipe_of(method="direct"), host)
    assert Path(result.file) == tmp_path / "link/merged.safetensors"
    assert sorted(file.name for file in (tmp_path / "elsewhere").iterdir()) == [
        "merged.json", "merged.png", "merged.safetensors",
    ]  # fmt: skip


def test_two_jobs_for_one_name(host, recipe_of):
    """Both were let in while the name was free; the second finds it taken and touches nothing."""
    one, other = (Job.merge(recipe_of(method="direct", seed=seed)) for seed in (0, 1))
    one.start(host)
    other.start(host)
    while not (one.ended and other.ended):
        time.sleep(0.01)
    assert sorted([one.state, other.state]) == ["done", "failed"]
    failed = one if one.state == "failed" else other
    assert "already there" in failed.error
    assert failed.bad_input


@pytest.mark.parametrize("changed", [{"steps": 5}, {"lr": 0.01}, {"seed": 1}, {"resolution": 128}])
def test_another_recipe_begins_at_its_start(host, recipe_of, every_step, changed):
    broken_off(recipe_of(), host)
    result = job.run(recipe_of(**changed), host)
    assert not any("went on" in said for said in result.warnings)
    assert len(left(host)) == 1


def test_what_does_not_decide_the_steps_may_change(host, recipe_of, every_step):
    broken_off(recipe_of(), host)
    result = job.run(recipe_of(output="other", dtype="bf16", overwrite=True, memory="checkpointing"), host)
    assert Path(result.file).stem == "other"
    assert any("went on" in said for said in result.warnings)


def test_a_lora_that_was_edited_begins_at_its_start(host, recipe_of, every_step, pair_files, third_file, tmp_path):
    copy = tmp_path / "subject.safetensors"
    copy.write_bytes(Path(pair_files[0]).read_bytes())
    broken_off(recipe_of(subject=copy), host)
    copy.write_bytes(Path(third_file).read_bytes())
    result = job.run(recipe_of(subject=copy), host)
    assert not any("went on" in said for said in result.warnings)


def test_short_runs_leave_nothing(host, recipe_of):
    broken_off(recipe_of(), host)
    assert left(host) == []


def test_what_would_fail_again_is_forgotten(host, recipe_of, every_step):
    def callback(info):
        if info["phase"] == "merge" and info["step"] == 3:
            raise MergeFailed("nonsense")

    with pytest.raises(MergeFailed):
        job.run(recipe_of(), host, callback)
    assert left(host) == []


def test_what_was_learned_outlives_a_name_that_was_taken_meanwhile(host, recipe_of):
    def callback(info):
        if info["phase"] == "save":
            host.destination("merged").write_bytes(b"somebody else's")

    with pytest.raises(BadInput, match="already there"):
        job.run(recipe_of(), host, callback)
    assert host.destination("merged").read_bytes() == b"somebody else's"
    phases = []
    job.run(recipe_of(output="another"), host, lambda info: phases.append(info["phase"]))
    assert "merge" not in phases


def test_a_stop_keeps_the_best_and_leaves_no_snapshot(host, recipe_of, every_step):
    result = job.run(recipe_of(), host, lambda info: info["phase"] == "merge" and info["step"] == 2)
    assert result.stopped
    assert left(host) == []


def damage(file, how):
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    if how == "cut":
        return data[: len(data) // 2]
    if how == "other numbers":
        return data[:begin] + b"\xff" * (len(data) - begin)
    if how == "another length":
        return data.replace(b'\\"step\\": 3', b'\\"step\\": 2')
    return {"empty": b"", "pickle": b"\x80\x04K\x01.", "text": b"{}" * 100}[how]


@pytest.mark.parametrize("how", ["cut", "other numbers", "another length", "empty", "pickle", "text"])
def test_a_damaged_snapshot_is_passed_by(host, recipe_of, every_step, how):
    broken_off(recipe_of(), host)
    (file,) = host.scratch().iterdir()
    damaged = damage(file, how)
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    result = job.run(recipe_of(), host)
    assert not any("went on" in said for said in result.warnings)
    assert len(result.history) == 4


def test_a_folder_that_cannot_be_written_costs_no_merge(host, recipe_of, every_step, capsys):
    host.scratch().write_bytes(b"in the way")
    result = job.run(recipe_of(), host)
    assert not result.warnings or not any("snapshot" in said for said in result.warnings)
    assert "no snapshot could be kept" in capsys.readouterr().out


def test_what_is_there_is_listed_and_forgotten(host, recipe_of, every_step):
    broken_off(recipe_of(output="first"), host)
    broken_off(recipe_of(output="second", seed=1), host, step=2)
    (host.scratch() / "stranger.txt").write_text("kept")
    (host.scratch() / "0000.steps").write_bytes(b"nonsense")
    old = host.scratch() / "1111.pairs"
    old.write_text(json.dumps({"recipes": [json.loads(recipe_of().json())]}))
    long_ago = time.time() - snapshot.KEPT - 60
    os.utime(old, (long_ago, long_ago))
    found = snapshot.unfinished(host.scratch())
    assert [str(one).partition(" (")[0] for one in found] == ["second: step 2 of 4", "first: step 3 of 4"]
    assert found[0].recipes == (recipe_of(output="second", seed=1),)
    for one in found:
        one.forget()
    assert left(host) == ["stranger.txt"]
    assert snapshot.unfinished(host.scratch()) == []
    assert snapshot.unfinished(None) == []


def test_keeping_nothing(host, recipe_of, every_step, monkeypatch):
    monkeypatch.setattr(host, "scratch", lambda: None)
    broken_off(recipe_of(), host)
    assert [path.name for path in host.folder.iterdir()] == []


def test_a_job_that_failed_is_gone_on_with_when_it_is_asked_for_again(host, recipe_of, every_step):
    def callback(info):
        if info["phase"] == "merge" and info["step"] == 3:
            raise RuntimeError("the driver is gone")

    first = Job.merge(recipe_of())
    first.run(host, callback)
    assert first.state == "failed"
    again = Job.merge(snapshot.unfinished(host.scratch())[0].recipes[0])
    again.run(host)
    assert again.state == "done", again.error
    assert [entry["step"] for entry in again.history] == [4]


# --- lists of pairs ------------------------------------------------------------------------------------------


def planned(host, recipes):
    return many.left(recipes, host)


def test_a_list_that_was_broken_off_is_gone_on_with(host, recipe_of):
    recipes = [recipe_of(output=name) for name in ("one", "two", "three")]

    def callback(info):
        if "2 of 3" in info["what"] and "merge" in info["what"]:
            raise Killed

    with pytest.raises(Killed):
        many.run_many(planned(host, recipes), host, callback)
    first = host.destination("one").read_bytes()
    (found,) = snapshot.unfinished(host.scratch())
    assert str(found).startswith("a list of 3 LoRAs, from one on")
    batch = many.run_many(planned(host, found.recipes), host)
    assert [one.state for one in batch.outcomes] == ["skipped", "done", "done"]
    assert host.destination("one").read_bytes() == first
    assert left(host) == []


def test_what_it_had_overwritten_is_not_done_twice(host, recipe_of):
    recipes = [recipe_of(output=name, overwrite=True) for name in ("one", "two")]
    for name in ("one", "two"):
        host.destination(name).write_bytes(b"older")
    job.run(recipes[0], host)
    plan = planned(host, recipes)
    assert [one.taken for one in plan] == [True, False]
    assert [one.state for one in many.run_many(plan, host).outcomes] == ["skipped", "done"]


def test_a_list_that_ends_leaves_nothing(host, recipe_of):
    many.run_many(planned(host, [recipe_of(method="direct")]), host)
    assert left(host) == []


# --- a real kill ---------------------------------------------------------------------------------------------

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from ziplora_lib import job, snapshot
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.recipe import Recipe
snapshot.EVERY = 0.0
host = DiffusersHost("miniature", Path(sys.argv[2]), "cpu")
job.run(Recipe.parse_raw(sys.argv[3]), host, lambda info: print(info["phase"], info["step"], flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_in_its_steps_goes_on(host, recipe_of):
    recipe = recipe_of(steps=6)
    root = str(Path(job.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, root, str(host.folder), recipe.json()], stdout=subprocess.PIPE, text=True
    )
    with process.stdout as lines:
        for line in lines:
            if line == "merge 4\n":
                process.kill()
                break
    assert process.wait() == -signal.SIGKILL
    assert sorted(path.name for path in host.folder.iterdir()) == [".ziplora"]
    seen = []
    job.run(recipe, host, lambda info: seen.append(info["step"]) if info["phase"] == "merge" else None)
    assert 4 < seen[0] <= 6
    assert seen[-1] == 6
    assert left(host) == []


def test_a_state_is_what_the_file_gives_back(tmp_path, recipe_of, every_step):
    import torch

    keeper = snapshot.Keeper(tmp_path / "scratch", recipe_of(), ["x"])
    wanted = State(3, {"m": torch.randn(2, 5)}, {"history": [{"loss": 0.1 + 0.2}]})
    keeper.keep(lambda: wanted)
    found = snapshot.Keeper(tmp_path / "scratch", recipe_of(), ["x"]).found()
    assert (found.step, found.facts) == (wanted.step, wanted.facts)
    assert torch.equal(found.tensors["m"], wanted.tensors["m"])
    assert snapshot.Keeper(tmp_path / "scratch", recipe_of(), ["y"]).found() is None
