"""Files that appear whole or not at all, and what killed runs have left."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ziplora_lib import atomic
from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer

# writes one half of a file, says its name, and waits to be killed
HALF = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ziplora_lib import atomic
part = atomic.part_of(Path(sys.argv[2]), ".json")
part.write_bytes(b"half")
print(part.name, flush=True)
time.sleep(600)
"""


@pytest.fixture
def half(tmp_path):
    """A process that is writing merged.json: (process, its part)."""
    root = Path(atomic.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, str(root), str(tmp_path / "merged.json")], stdout=subprocess.PIPE, text=True
    )
    yield process, tmp_path / process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_running_process_writes_stays_and_goes_when_it_was_killed(half, tmp_path):
    process, part = half
    (tmp_path / "other.safetensors").write_bytes(b"somebody's")
    assert part.exists()
    assert atomic.remove_leftovers(tmp_path) == []
    process.kill()
    process.wait()
    assert atomic.remove_leftovers(tmp_path) == [part]
    assert os.listdir(tmp_path) == ["other.safetensors"]


def test_the_next_run_removes_them_before_its_work(half, tmp_path):
    process, _ = half
    process.kill()
    process.wait()
    writer.check_free(tmp_path / "another.safetensors", overwrite=False)
    assert os.listdir(tmp_path) == []


def test_all_below_a_folder_goes_at_the_start(half, tmp_path, capsys):
    process, part = half
    process.kill()
    process.wait()
    (tmp_path / "deep/er").mkdir(parents=True)
    part.rename(tmp_path / "deep/er" / part.name)
    atomic.remove_leftovers_below(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "er"]
    assert "removed what 1 runs had left" in capsys.readouterr().out
    atomic.remove_leftovers_below(tmp_path / "nowhere")
    assert capsys.readouterr().out == ""


def test_a_number_that_was_given_again_does_not_keep_it(tmp_path):
    """In a container every run can have the same number."""
    mine = atomic.part_of(tmp_path / "mine.safetensors")
    machine_process, since = atomic._owner().rsplit("-", 1)
    older = tmp_path / f".older.{machine_process}-{int(since) - 1000}{atomic.MARK}"
    for part in (mine, older):
        part.touch()
    assert atomic.remove_leftovers(tmp_path) == [older]
    assert mine.exists()


def test_what_another_machine_writes_is_left_alone_for_a_day(tmp_path):
    machine = "0000" if atomic._machine() != "0000" else "1111"
    part = tmp_path / f".merged.{machine}-1-1{atomic.MARK}"
    part.touch()
    assert atomic.remove_leftovers(tmp_path) == []
    long_ago = time.time() - atomic.A_DAY - 60
    os.utime(part, (long_ago, long_ago))
    assert atomic.remove_leftovers(tmp_path) == [part]


def test_by_name_only_that_file_is_meant(tmp_path):
    """Another worker may be writing dog-ink while this one begins dog again."""
    names = ("dog", "dog-ink", "dog.2", "big dog")
    parts = {name: atomic.part_of(tmp_path / f"{name}.safetensors") for name in names}
    cards = {name: atomic.part_of(tmp_path / f"{name}.safetensors", ".balance.png") for name in names}
    for part in (*parts.values(), *cards.values()):
        part.touch()
    assert set(atomic.remove_leftovers(tmp_path, "dog")) == {parts["dog"], cards["dog"]}


def test_names_that_only_look_like_it_stay(tmp_path):
    for name in (
        ".dog.ziplora-part",
        "dog.ziplora-part",
        ".dog.zzzz-1-1.ziplora-part",
        ".dog.0000-1-1.ziplora-part.bak",
    ):
        (tmp_path / name).touch()
    assert atomic.remove_leftovers(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 4


def test_a_path_that_is_too_long_is_refused_before_any_work(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3800:
        folder = folder / ("x" * 200)
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this system's paths are shorter")
    # the LoRA itself would fit, what is written before it gets its name would not
    path = folder / ("y" * (4095 - len(f"{folder}/.safetensors")) + ".safetensors")
    with pytest.raises(BadInput, match="too long") as caught:
        writer.check_free(path, overwrite=False)
    assert "shorter name" in caught.value.remedy
    assert os.listdir(folder) == []


def test_a_name_of_two_hundred_bytes_leaves_room_for_its_parts(tmp_path):
    path = tmp_path / f"{writer.check_name('é' * 100)}.safetensors"
    writer.check_free(path, overwrite=False)
    writer.write_beside(path, ".balance.png", b"picture")
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("there", ["MERGED.safetensors", "Merged.Json", "mErged.balance.PNG"])
def test_capitals_are_no_difference(tmp_path, there):
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(BadInput, match="already there"):
        writer.check_free(tmp_path / "merged.safetensors", overwrite=False)


def test_the_two_ways_to_type_an_accent_are_no_difference(tmp_path):
    (tmp_path / "cafe\u0301.safetensors").write_bytes(b"precious")
    with pytest.raises(BadInput, match="already there"):
        writer.check_free(tmp_path / "caf\u00e9.safetensors", overwrite=False)


def test_a_folder_in_the_files_place_is_refused_before_any_work(tmp_path):
    (tmp_path / "merged.safetensors").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        writer.check_free(tmp_path / "merged.safetensors", overwrite=True)


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=5 * 10**6))
    with pytest.raises(BadInput, match=r"takes 372 MB, and on the disk of .* only 5 MB are free"):
        writer.check_room(tmp_path, 372 * 10**6)
    writer.check_room(tmp_path, 10**6)


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    atomic.replace(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["facts.json"]
