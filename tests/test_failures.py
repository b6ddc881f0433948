"""State: a failure at lines all over a job leaves the model as it was and the files whole. All lines: tests/failures.py."""

import pytest

pytest.importorskip("diffusers")

import failures
import torch
from failures import Bench, Ended, Injected, lines_of, restoring, small_recipes

from ziplora_lib import memory

# every so many of a job's lines
EVERY = 36


@pytest.fixture(scope="module")
def bench(tmp_path_factory, pair_files):
    from ziplora_lib.hosts.diffusers import DiffusersHost

    host = DiffusersHost("miniature", tmp_path_factory.mktemp("out"), "cpu")
    return Bench(host, small_recipes(*pair_files))


def test_a_failure_at_lines_all_over_the_job_is_survived(bench):
    files = {file for file, _ in bench.lines}
    for name in ("job", "calibration", "memory", "merge/learning", "merge/attach", "hosts/diffusers", "lora/writer"):
        assert any(file.endswith(f"{name}.py") for file in files)
    assert len(bench.lines) > 1000
    chosen = list(bench.lines)[::EVERY]
    findings = [
        finding for k, line in enumerate(chosen) for finding in bench.inject(line, Ended if k % 5 == 4 else Injected)
    ]
    assert findings == []
    print(f"{len(chosen)} failures injected, all recovered")


def test_what_is_left_behind_is_noticed(bench, monkeypatch):
    """A context manager that forgets to put back."""
    line = next(line for line in bench.lines if line[0].endswith("merge/learning.py"))
    monkeypatch.setattr(failures, "OLDER", b"other bytes than before")
    weight = bench.host.pipe.unet.conv_in.weight
    original = memory.give_back

    def forgetful():
        original()
        weight.requires_grad_(not weight.requires_grad)
        with torch.no_grad():
            weight[0, 0, 0, 0] += 1e-3
        (bench.host.folder / "left.tmp").touch()

    before = weight.detach().clone()
    with monkeypatch.context() as patched:
        patched.setattr(memory, "give_back", forgetful)
        said = " ".join(finding.said for finding in bench.inject(line, Injected))
    weight.requires_grad_(True)
    with torch.no_grad():
        weight.copy_(before)
    assert "changed: ('unet', 'conv_in.weight', 'value')" in said
    assert "left: left.tmp" in said


def test_a_line_that_is_not_reached_is_told(bench):
    file = next(iter(bench.lines))[0]
    assert "not reached" in bench.inject((file, 1), Injected)[0].said


def test_lines_that_restore_are_left_out(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("try:\n    a = 1\nexcept ValueError:\n    b = 2\nfinally:\n    c = 3\nd = 4\n")
    assert restoring(str(file)) == {1, 3, 4, 6}


def test_lines_are_those_of_the_package_alone():
    from ziplora_lib.naming import named

    found = lines_of(lambda: named("{subject}", [{"role": "subject", "lora": "a"}], "direct"))
    assert found
    assert all(file.startswith(failures.PACKAGE) for file, _ in found)
