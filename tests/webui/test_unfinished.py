"""A run that was killed is offered by the next page, and goes on where it was."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import opened
from pages import Tab
from test_tab_zip import tiny

from ziplora_lib import snapshot
from ziplora_lib.lora.reader import read
from ziplora_lib.recipe import parse


def scratch(site) -> Path:
    return site.webui.data_dir / "cache/ziplora" if site.webui else site.folder / ".ziplora"


def recipe(site, output, **fields):
    parents = [
        {"lora": "tab-subject", "role": "subject", "prompt": "a fox"},
        {"lora": "tab-style", "role": "style", "prompt": "an engraving"},
    ]
    return {"parents": parents, "output": output, **tiny(site, overwrite=True), **fields}


@pytest.fixture
def left(site, loras):
    """left(name): as if a merge had been killed at step 1 of 2, or a list of two at its first."""

    def leave(output, pairs=False):
        folder = scratch(site)
        folder.mkdir(parents=True, exist_ok=True)
        if pairs:
            recipes = [recipe(site, f"{output}-{k}", method="direct") for k in (1, 2)]
            (folder / "0.pairs").write_text(json.dumps({"recipes": recipes}))
            return
        from safetensors.torch import save

        facts = {"recipe": recipe(site, output), "step": 1, "steps": 2, "state": {}}
        (folder / "0.steps").write_bytes(save({}, {"ziplora": json.dumps(facts)}))

    yield leave
    shutil.rmtree(scratch(site), ignore_errors=True)


@pytest.fixture
def fresh(browser, site):
    """fresh(): the tab in a page that was just opened."""
    pages = []

    def open_it():
        pages.append(opened(browser, site.url))
        return Tab(pages[-1])

    yield open_it
    for page in pages:
        page.context.close()


def test_nothing_is_offered_where_there_is_nothing(tab):
    assert not tab("unfinished_merge").is_visible()


def test_a_merge_that_was_killed_is_gone_on_with(site, left, fresh, loras, screenshots):
    left("tab-killed")
    tab = fresh()
    tab("unfinished_merge").wait_for(state="visible", timeout=30_000)
    assert tab.text("unfinished_merge_which").input_value().startswith("tab-killed: step 1 of 2 (")
    tab("tab").screenshot(path=screenshots / "unfinished.png")
    tab.start("unfinished_merge_go_on")
    assert "<lora:tab-killed:1>" in tab.ended()
    assert read(loras / "tab-killed.safetensors").deltas


def test_it_can_be_forgotten(site, left, fresh):
    left("tab-forgotten")
    tab = fresh()
    tab("unfinished_merge").wait_for(state="visible", timeout=30_000)
    tab("unfinished_merge_forget").click()
    tab("unfinished_merge").wait_for(state="hidden", timeout=30_000)
    assert not scratch(site).exists()


def test_a_list_that_was_killed_is_gone_on_with(site, left, fresh, loras):
    left("tab-list", pairs=True)
    tab = fresh()
    tab.section("Many")
    tab("unfinished_many").wait_for(state="visible", timeout=30_000)
    tab("unfinished_many_go_on").click()
    tab.page.wait_for_selector("#ziplora_many_table >> text=2 done", timeout=120_000)
    assert all((loras / f"tab-list-{k}.safetensors").is_file() for k in (1, 2))
    tab("unfinished_many").wait_for(state="hidden", timeout=30_000)


def test_a_webui_that_is_killed_goes_on_after_its_restart(start_webui, sgm_checkpoint):
    """To the byte what an unbroken run gives, and nothing half-written is left."""
    from kohya_files import write_lora

    from ziplora_lib.hosts.miniature import build_miniature

    pipe = build_miniature()

    def with_loras(data_dir):
        for name, seed in (("tab-subject", 11), ("tab-style", 12)):
            write_lora(data_dir / f"models/Lora/{name}.safetensors", pipe, seed=seed, rank=4, alpha=4.0, only="attn")

    class OfWebui:
        side = 128

    body = recipe(OfWebui, "killed", steps=40)
    with start_webui(before=with_loras) as webui:
        webui.run("from ziplora_lib import snapshot\nsnapshot.EVERY = 0.0\nresult = None")
        job = webui.post("/ziplora/v1/merge", json=body).json()["job"]
        while webui.get(f"/ziplora/v1/jobs/{job}").json().get("step", 0) < 12 or (
            webui.get(f"/ziplora/v1/jobs/{job}").json()["phase"] != "merge"
        ):
            time.sleep(0.05)
        os.killpg(webui.process.pid, signal.SIGKILL)
        webui.process.wait(30)
        listed = sorted(path.name for path in webui.lora_dir.iterdir())
        assert listed == ["tab-style.safetensors", "tab-subject.safetensors"]
        (kept,) = (webui.data_dir / "cache/ziplora").glob("*.steps")

        def with_both(data_dir):
            with_loras(data_dir)
            shutil.copytree(kept.parent, data_dir / "cache/ziplora")

        with start_webui(before=with_both) as again:
            results = []
            for output in ("killed", "unbroken"):
                job = again.post("/ziplora/v1/merge", json={**body, "output": output}).json()["job"]
                while (told := again.get(f"/ziplora/v1/jobs/{job}").json())["state"] in ("queued", "running"):
                    time.sleep(0.2)
                assert told["state"] == "done", told
                results.append((told["result"], read(again.lora_dir / f"{output}.safetensors")))
            assert not (again.data_dir / "cache/ziplora").exists()
    (first, killed), (second, unbroken) = results
    assert any(said.startswith("went on from step ") for said in first["warnings"])
    assert not any(said.startswith("went on from step ") for said in second["warnings"])
    assert killed.hash == unbroken.hash


def test_what_is_offered_is_read_as_any_recipe(left, site, loras):
    left("tab-read")
    (found,) = snapshot.unfinished(scratch(site))
    assert found.recipes == (parse(recipe(site, "tab-read")),)
