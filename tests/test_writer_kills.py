"""A process killed at any moment of writing leaves the whole old file or the whole new one, and nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziplora_lib.lora import writer

KILLS = 20

# Forks children that write two contents in turn over one name, on a disk that takes its time; kills each at a random
# moment.
SCRIPT = """
import builtins, io, os, random, signal, sys, time
sys.path[:0] = [ROOT, ROOT + '/tests']
from pathlib import Path
import torch
from kills import with_a_slow_disk
from ziplora_lib.lora import writer
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack

torch.set_num_threads(1)

fast_open = builtins.open
path, chance = Path(FOLDER) / "merged.safetensors", random.Random(0)
contents = [
    {
        f"lora_unet_out_{i}": Stack.of([LowRankDelta(torch.full((256, 16), float(n)), torch.ones(16, 256))])
        for i in range(40)
    }
    for n in (1, 2)
]
# how long one write takes on this machine: the kills fall into the first three
with_a_slow_disk()
began = time.monotonic()
writer.write(path, contents[0], "fp32", {"n": "1"}, True)
once = time.monotonic() - began
builtins.open = io.open = fast_open
kept = set()
for kill in range(KILLS):
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        with_a_slow_disk()
        os.write(begun, b"x")
        while True:
            for n in (1, 0):
                writer.write(path, contents[n], "fp32", {"n": str(n + 1)}, True)
    os.read(ready, 1)
    time.sleep(chance.uniform(0.0, 3 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    listed = sorted(f.name for f in Path(FOLDER).iterdir() if f.suffix == ".safetensors")
    assert listed == ["merged.safetensors"], listed
    lora = read(path)
    value = {float(d.dense().mean()) / 16 for d in lora.deltas.values()}
    assert len(lora.deltas) == 40 and value == {float(lora.metadata["n"])}, (value, lora.metadata)
    assert lora.metadata["sshs_model_hash"] == lora.hash
    kept.add(lora.metadata["n"])
    for part in Path(FOLDER).iterdir():
        if part != path:
            print("part")
            part.unlink()
print("kept", sorted(kept))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_twenty_kills(tmp_path):
    names = f"ROOT, FOLDER, KILLS = {str(Path(writer.__file__).parents[2])!r}, {str(tmp_path)!r}, {KILLS}\n"
    done = subprocess.run([sys.executable, "-c", names + SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # the kills came while writing: something was left under a name that nobody lists, and both contents were seen
    assert done.stdout.count("part") >= 3, done.stdout
    assert "kept ['1', '2']" in done.stdout
