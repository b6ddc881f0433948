"""How long the tab takes with a thousand LoRAs in the folder: page, list, filter, and what is said of a pair at once.

The files have the header of an SDXL LoRA of rank 32 (every attention and feed-forward matrix) and no contents but holes; two
are whole. The page is Chromium's, on the tab without a WebUI; the same work with ten files stands beside each figure.

python -m benchmarks.tab        writes benchmarks/results/tab.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from safetensors.torch import save_file

from benchmarks.machine import machine
from benchmarks.scale import FULL, unet
from ziplora_lib.catalogue import Catalogue
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.host import Model
from ziplora_lib.job import preflight
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.merge.attach import Slot
from ziplora_lib.recipe import parse

RESULT = Path(__file__).parent / "results" / "tab.json"
RANK, MANY, FEW = 32, 1000, 10
ROOT = Path(__file__).parents[1]


class Outline(DiffusersHost):
    """SDXL's own UNet by its shapes alone, enough for a preflight."""

    def __init__(self, model: UNet2DConditionModel, folder: Path):
        self.folder = folder
        self.known = {
            layer_key(f"unet.{name}", "sdxl"): Slot(module)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ("attn" in name or ".ff." in name)
        }

    def model(self) -> Model:
        return Model("SDXL by its shapes", "sdxl", "meta", "float16", "epsilon")

    def slots(self, keys) -> dict[str, Slot]:
        return {key: self.known[key] for key in keys if key in self.known}

    def unapplied(self, lora) -> list[str]:
        return []


def shapes(host: Outline) -> dict[str, tuple[int, ...]]:
    """The tensors of a LoRA of rank 32 on all that it knows."""
    found: dict[str, tuple[int, ...]] = {}
    for key, slot in host.known.items():
        out, columns = slot.shape
        found |= {f"{key}.lora_up.weight": (out, RANK), f"{key}.lora_down.weight": (RANK, columns), f"{key}.alpha": ()}
    return found


def write_hollow(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file with this header, and a hole in place of the values."""
    header, at = {"__metadata__": {"ss_base_model_version": "sdxl_base_v1-0"}}, 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + at)


def write_folder(folder: Path, n: int, tensors: dict[str, tuple[int, ...]]) -> None:
    """n LoRAs in folders of fifty, every second one with a preview; two of them whole."""
    for k in range(n):
        path = folder / f"set {k // 50}" / f"lora {k:04}.safetensors"
        path.parent.mkdir(exist_ok=True, parents=True)
        write_hollow(path, tensors)
        if k % 2:
            Image.new("RGB", (256, 256), (k % 256, 80, 120)).save(path.with_suffix(".png"))
    for name in ("whole 1", "whole 2"):
        values = {key: torch.randn(shape).half() * 0.01 for key, shape in tensors.items()}
        save_file(values, folder / f"{name}.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 4)


def in_python(host: Outline) -> dict[str, float]:
    """What the server does, in seconds."""
    parents = [
        {"lora": name, "role": role, "prompt": "x"} for name, role in (("whole 1", "subject"), ("whole 2", "style"))
    ]
    recipe = parse({"parents": parents, "output": "never"})
    catalogue = Catalogue(host)
    return {
        "names of all LoRAs": timed(host.loras),
        "all headers, the first time": timed(catalogue.look),
        "all headers, again": timed(catalogue.look),
        "preflight of a pair, headers": timed(lambda: preflight(recipe, host, values=False)),
        "preflight of a pair, with norms": timed(lambda: preflight(recipe, host)),
    }


def in_the_page(folder: Path) -> dict[str, float]:
    """What somebody waits for in the page, in seconds."""
    command = [sys.executable, "-m", "ziplora_lib", "tab", "--folder", str(folder), "--port", "7997"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stdout if "the ZipLoRA tab is at" in line)
            with sync_playwright() as playwright:
                options = {"executable_path": "/usr/bin/chromium", "args": ["--no-sandbox", "--disable-gpu"]}
                browser = playwright.chromium.launch(**options)
                page = browser.new_page()
                page.route("**/*", lambda r: r.continue_() if r.request.url.startswith(url) else r.abort())
                return _seen(page, url)
        finally:
            process.terminate()


def _seen(page: Page, url: str) -> dict[str, float]:
    def opened() -> None:
        page.goto(url)
        page.wait_for_function("typeof ziplora_ready !== 'undefined' && ziplora_ready", timeout=120_000)

    def listed() -> None:
        page.click("#ziplora_browse_1")
        page.wait_for_selector("#ziplora_dialog .ziplora_choice", timeout=120_000)

    def chosen() -> None:
        page.keyboard.press("Enter")
        page.wait_for_selector("#ziplora_facts_1 >> text=whole 1", timeout=60_000)

    def filtered() -> None:
        page.keyboard.type("whole 1")
        page.wait_for_function(
            "document.querySelectorAll('#ziplora_dialog .ziplora_choice:not([hidden])').length === 1"
        )

    told = {"the first page": timed(opened), "the page": timed(opened), "the list, the first time": timed(listed)}
    page.keyboard.press("Escape")
    page.evaluate("document.querySelector('.ziplora_choices').replaceChildren()")
    told["the list"] = timed(listed)
    page.wait_for_timeout(500)
    told["seven letters in the search"] = timed(filtered)
    told["a LoRA chosen, its card filled"] = timed(chosen)
    return told


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with torch.device("meta"):
        model = unet(FULL[0])
    rows: dict[str, dict[str, float]] = {}
    for n in (FEW, MANY):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            host = Outline(model, folder)
            tensors = shapes(host)
            write_folder(folder, n, tensors)
            for what, seconds in {**in_python(host), **in_the_page(folder)}.items():
                rows.setdefault(what, {})[f"{n} files"] = seconds
                print(n, what, seconds, flush=True)
    told = {"machine": machine(), "tensors in a file": len(tensors), "rank": RANK, "seconds": rows}
    RESULT.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
