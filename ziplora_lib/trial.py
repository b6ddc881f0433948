"""`make try`: the two sample LoRAs, merged on the embedded miniature, with a picture strip to look at."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from ziplora_lib.__main__ import summary
from ziplora_lib.comparison import comparison
from ziplora_lib.hosts import world
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import JOINT_PROMPT, STYLE_PROMPT, SUBJECT_PROMPT, write_samples
from ziplora_lib.job import run
from ziplora_lib.pictures import strip
from ziplora_lib.recipe import parse

SEEDS = (1, 2, 3, 4)


def main(folder: Path) -> None:
    started = time.monotonic()
    # the miniature's layers are too small for more, and on a busy machine a second thread mostly waits
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        "training two sample LoRAs on the miniature, with peft: a subject and a style that it does not know …",
        flush=True,
    )
    subject, style = write_samples(folder)
    host = DiffusersHost("miniature", folder, "cpu")
    recipe = parse(
        {
            "parents": [
                {"lora": str(subject), "role": "subject", "prompt": SUBJECT_PROMPT},
                {"lora": str(style), "role": "style", "prompt": STYLE_PROMPT},
            ],
            "output": "merged",
            "preview_prompt": JOINT_PROMPT,
            "resolution": world.SIDE,
            "sampler_steps": 12,
            "guidance": 3.0,
            "balance_points": 1,
            "overwrite": True,
        }
    )
    print(f"zipping them: {recipe.steps} steps …", flush=True)
    result = run(recipe, host)
    print("drawing the strip …", flush=True)
    sheet = comparison(recipe, Path(result.file), host, SEEDS)
    # the miniature's pictures are small, of dots that stay sharp
    side = 2 * world.SIDE
    rows = [[picture.resize((side, side), Image.Resampling.NEAREST) for picture in row] for row in sheet.rows]
    strip(rows, sheet.row_labels, sheet.column_labels).save(folder / "strip.png")
    report = {**result.public(), "history": result.history}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(summary(result))
    print(f"look at {folder / 'strip.png'} and {folder / 'report.json'}  ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "try"))
