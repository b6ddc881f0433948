"""`strip`: pictures of a merged LoRA along the balance, side by side in one PNG."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ziplora_lib.commands.watching import watched
from ziplora_lib.drawing import along_balance, draw, recipe_of
from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.lora import writer
from ziplora_lib.lora.reader import read
from ziplora_lib.pictures import png


def strip(
    file: Path,
    out: Path,
    model: str,
    device: str,
    points: int,
    seeds: Sequence[int] | None,
    prompt: str,
    settings: Mapping[str, float | None],
) -> int:
    """The command; its exit status. Raises BadInput, before the model is loaded, for what can be refused then."""
    if out.suffix != ".png" or out.is_dir():
        raise BadInput(f"--out {out} is not a .png file", remedy="For instance strip.png")
    if not out.parent.is_dir():
        raise BadInput(f"the folder {out.parent} of --out does not exist", remedy="Create it, or choose another")
    if out.resolve() == file.with_suffix(".png").resolve():
        raise BadInput(f"--out {out} is the name of the LoRA's own preview", remedy="Give the pictures another name")
    merged = read(file)
    recipe = recipe_of(merged, prompt, **settings)
    plan = along_balance(merged, recipe, seeds or [recipe.seed], points)
    from ziplora_lib.hosts.diffusers import DiffusersHost

    host = DiffusersHost(model, file.parent, device)
    try:
        with watched() as show:
            sheet = draw(host, str(file), plan, show)
    except Stopped:
        print("ziplora: stopped before the first picture; nothing was saved", file=sys.stderr)
        return 130
    writer.write_beside(out, ".png", png(sheet.whole))
    print("\n".join([f"saved {out}", *(at for _, at in sheet.pictures)]))
    return 130 if sheet.stopped else 0
