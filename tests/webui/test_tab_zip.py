"""The section Zip, as somebody uses it: a real browser and clicks, in a real WebUI where one is found and without one."""

import contextlib
import io
import json
import re

import pytest
import requests
from conftest import MARKUP, TAG, TRIGGER, opened
from pages import Tab
from PIL import Image

from ziplora_lib.lora.reader import read


def small(site, **fields):
    return {"steps": 10, "resolution": site.side, "samples": 8, "sampler_steps": 4, "pictures": 2, **fields}


def tiny(site, **fields):
    return small(site, **{"steps": 2, "samples": 2, "pictures": 1, "balance_points": 1, **fields})


def listing(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def job_of(site, state="running"):
    jobs = requests.get(f"{site.url}/ziplora/v1/jobs", timeout=30).json()
    return next(job["job"] for job in reversed(jobs) if job["state"] == state)


# --- picking ------------------------------------------------------------------------------------------


def test_the_tab_is_there(tab):
    assert tab("zip").is_enabled()
    for hidden in ("stop", "resolution", "tag", "resume", "choose", "restore", "list", "card_3"):
        assert not tab(hidden).is_visible(), hidden


def test_every_control_has_a_hint_and_an_id_of_its_own(tab, site):
    config = requests.get(f"{site.url}/config", timeout=30).json()["components"]
    ours = [(c["type"], c["props"]) for c in config if (c["props"].get("elem_id") or "").startswith("ziplora_")]
    ids = [props["elem_id"] for _, props in ours]
    assert len(ids) == len(set(ids)) > 60
    for kind, props in ours:
        if kind in ("dropdown", "textbox", "slider", "number", "checkbox", "radio") and props["visible"]:
            assert props.get("info") or props["elem_id"] == "ziplora_tag", props["elem_id"]


def test_defaults_are_the_recipes(tab):
    from ziplora_lib.recipe import schema

    tab.advanced()
    defaults = {name: about.get("default") for name, about in schema()["properties"].items()}
    for field in ("steps", "lr", "resolution", "samples", "pictures", "empty_share", "sampler_steps", "guidance"):
        assert float(tab.number(field).input_value()) == defaults[field], field
    for field in ("method", "objective", "dtype"):
        assert tab.page.locator(f"#ziplora_{field} input:checked").input_value() == defaults[field]
    assert tab.text("lam").input_value() == tab.text("start").input_value() == ""


def test_pickers_list_the_folder_after_a_refresh(tab):
    tab("refresh").click()
    tab.settle()
    for card in (1, 2):
        assert {"tab-subject", "tab-style", "tab-silent"} <= set(tab.choices(f"lora_{card}"))


def test_the_list_of_loras_by_keyboard(tab):
    """Browse, type, Enter; arrows and Escape: no mouse."""
    page = tab.page
    tab("refresh").click()
    tab.settle()
    tab("browse_1").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#ziplora_dialog .ziplora_choice")
    cards = page.locator("#ziplora_dialog .ziplora_choice")
    assert cards.count() >= 6
    shown = dict(zip(cards.locator("b").all_inner_texts(), cards.locator("small").all_inner_texts()))
    assert shown["tab-subject"] == "SDXL · LoRA · rank 8"
    assert shown["tab-silent"] == "SDXL · LoRA · rank 2 · in of others"
    assert shown["tab-old"].startswith("SD 1.5")
    assert shown["tab-broken"] == "cannot be read"
    picture = page.locator("#ziplora_dialog .ziplora_choice[data-lora='tab-subject'] img")
    page.wait_for_function("i => i.complete && i.naturalWidth > 0", arg=picture.element_handle())
    page.keyboard.type("tab-s ubj")
    assert page.locator("#ziplora_dialog .ziplora_choice:visible").count() == 1
    assert "1 LoRAs" in page.locator("#ziplora_dialog").inner_text()
    page.keyboard.press("Enter")
    tab.settle()
    assert not page.locator("#ziplora_dialog").is_visible()
    assert tab.text("lora_1").input_value() == "tab-subject"
    assert tab.text("prompt_1").input_value() == TRIGGER
    tab("browse_2").click()
    page.wait_for_function("document.querySelectorAll('#ziplora_dialog .ziplora_choice').length > 5")
    page.wait_for_timeout(300)
    page.locator("#ziplora_dialog select").select_option("SD 1.5")
    assert page.locator("#ziplora_dialog .ziplora_choice:visible b").all_inner_texts() == ["tab-old"]
    page.locator("#ziplora_dialog select").select_option("")
    page.locator("#ziplora_dialog input").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    second = page.locator("#ziplora_dialog .ziplora_choice:visible").nth(1).get_attribute("data-lora")
    assert page.evaluate("document.activeElement.dataset.lora") == second
    page.keyboard.press("Escape")
    assert not page.locator("#ziplora_dialog").is_visible()
    assert tab.text("lora_2").input_value() == ""


def test_prompts_are_filled_in_and_typed_ones_kept(tab):
    tab("refresh").click()
    tab.settle()
    tab.pick(1, "tab-subject")
    assert tab.text("prompt_1").input_value() == TRIGGER
    assert "activation text" in tab("note_1").inner_text()
    assert "SDXL · LoRA · rank 8" in tab("facts_1").inner_text()
    assert tab("checked").inner_text().strip() == ""
    tab.pick(2, "tab-style")
    assert tab.text("prompt_2").input_value() == TAG
    assert "training tag" in tab("note_2").inner_text()
    assert tab.text("output").input_value() == "tab-subject-tab-style"
    ready = tab("checked").inner_text()
    assert "Ready: " in ready
    assert "layers are learned" in ready
    # what was filled in follows the LoRA, what was typed stays
    tab.pick(1, "tab-silent")
    assert tab.text("prompt_1").input_value() == ""
    assert "names no trigger word" in tab("note_1").inner_text()
    assert "the subject has no prompt" in tab.red()
    tab.write("prompt_1", "my own words")
    assert "Ready" in tab("checked").inner_text()
    tab.write("output", "my-own-name")
    tab.pick(1, "tab-subject")
    assert tab.text("prompt_1").input_value() == "my own words"
    assert TRIGGER in tab("note_1").inner_text()
    assert tab.text("output").input_value() == "my-own-name"


def test_the_preflight_puts_the_loras_side_by_side(tab):
    tab.pair("tab-side")
    said = tab("checked").inner_text()
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in said.splitlines()) if len(row) == 3}
    assert rows["Rank"] == ["8", "4"]
    assert rows["Base"] == ["SDXL", "SDXL"]
    subject, style = (float(cell) for cell in rows["Norm"])
    assert subject > 0
    assert style > 0
    assert re.search(r"new file will have [\d.]+ MB", said)
    assert "pictures of 1024 pixels" in said
    # a LoRA of another base, and one that is no LoRA, are red with what to do
    tab.pick(2, "tab-old")
    assert "is a LoRA for SD 1.5" in tab.red()
    assert "Pick a LoRA that was trained on SDXL" in tab.red()
    tab.pick(2, "tab-broken")
    assert "not a readable safetensors file" in tab.red()


def test_swap(tab, tmp_path):
    picture = tmp_path / "fox.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    tab.pair("")
    tab.page.locator("#ziplora_reference_1 input[type=file]").set_input_files(str(picture))
    tab.page.wait_for_selector("#ziplora_reference_1 >> text=fox.png", state="attached")
    tab.settle()
    tab.number("strength_1").fill("0.7")
    tab("swap").click()
    tab.settle()
    assert tab.text("lora_1").input_value() == "tab-style"
    assert tab.text("lora_2").input_value() == "tab-subject"
    assert tab.text("prompt_1").input_value() == TAG
    assert tab.text("prompt_2").input_value() == TRIGGER
    assert tab.number("strength_2").input_value() == "0.7"
    assert "fox.png" in tab("reference_2").text_content()
    assert "fox.png" not in tab("reference_1").text_content()
    assert "Ready" in tab("checked").inner_text()
    # after a swap the prompts still count as filled in
    tab.pick(2, "tab-silent")
    assert tab.text("prompt_2").input_value() == ""


def test_another_lora_and_its_removal(tab, site, loras):
    tab.pair("tab-three", method="direct", overwrite=True, **tiny(site))
    tab("another").click()
    tab.settle()
    tab.pick(3, "tab-silent")
    tab.write("prompt_3", "a third")
    tab.page.locator("#ziplora_role_3 input[value=subject]").check()
    tab.settle()
    assert "Subject tab-silent" in tab("checked").inner_text()
    tab.zip()
    assert "Done" in tab.ended()
    parents = json.loads(read(loras / "tab-three.safetensors").metadata["ziplora.recipe"])["parents"]
    assert [(p["lora"], p["role"]) for p in parents] == [
        ("tab-subject", "subject"), ("tab-silent", "subject"), ("tab-style", "style"),
    ]  # fmt: skip
    tab("remove_3").click()
    tab.settle()
    assert not tab("card_3").is_visible()
    assert "tab-silent" not in tab("checked").inner_text()


def test_what_was_picked_last_is_there_again(tab, loras):
    tab.pair("")
    tab.write("prompt_1", "words of my own")
    tab.page.reload()
    again = Tab(tab.page)
    again.page.wait_for_function(
        "document.querySelector('#ziplora_lora_2 input').value === 'tab-style'", timeout=30_000
    )
    assert again.text("lora_1").input_value() == "tab-subject"
    assert again.text("prompt_1").input_value() == "words of my own"
    again.settle()
    assert "Ready" in again("checked").inner_text()


# --- a merge from the page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipped(browser, site, loras):
    """One merge from the page, and what was seen of it."""
    found = {}
    page = opened(browser, site.url)
    tab = Tab(page)
    # long enough to be watched
    tab.pair("tab-zipped", **{**small(site, overwrite=True), "steps": 60})
    found["progress"] = tab.zip(until="merge: step 4")
    page.wait_for_selector("#ziplora_live .ziplora_curve", timeout=60_000)
    page.wait_for_selector("#ziplora_live_preview .livePreview img", timeout=60_000)
    found["live"] = tab("live").inner_text()
    found["charts"] = page.locator("#ziplora_live svg[role=img]").evaluate_all("all => all.map(e => e.ariaLabel)")
    found["summary"] = tab.ended()
    found["tag"] = tab.text("tag").input_value()
    page.wait_for_function("document.querySelectorAll('#ziplora_gallery img').length >= 5")
    found["captions"] = page.locator("#ziplora_gallery .caption-label").all_inner_texts()
    page.context.close()
    return found


def test_zip_shows_its_steps(zipped):
    assert any("step" in text and "%" in text for text in zipped["progress"])
    assert any(text.startswith("merge: step") for text in zipped["progress"])
    assert "tab-zipped" in zipped["live"]
    assert re.search(r"step \d+ of 60", zipped["live"])
    assert "loss" in zipped["live"]
    assert len(zipped["charts"]) == 2
    assert "on the subject" in zipped["charts"][0]
    assert zipped["charts"][1].startswith("Mean |m|")


def test_zip_ends_with_a_file_and_its_side_files(zipped, loras, site):
    assert zipped["tag"] == "<lora:tab-zipped:1>"
    merged = read(loras / "tab-zipped.safetensors")
    assert json.loads(merged.metadata["ziplora.recipe"])["steps"] == 60
    card = json.loads((loras / "tab-zipped.json").read_text())
    assert card["activation text"] == f"{TRIGGER}, {TAG}"
    assert "tab-subject" in card["notes"]
    assert Image.open(loras / "tab-zipped.png").size == (site.side, site.side)


def test_zip_says_what_was_learned(zipped):
    said = zipped["summary"]
    assert "Done: <lora:tab-zipped:1>" in said
    assert TRIGGER in said
    assert "plain sum" in said
    assert "plainly adding the two" in said
    assert "UNet layers are in" in said
    assert "text encoder layers are summed" in said
    assert re.search(r"read back and compared: largest error \de-0\d", said)
    assert "Time taken" in said
    assert zipped["captions"][2] == "as learned"
    assert "more subject" in zipped["captions"][0]
    assert "more style" in zipped["captions"][4]


def test_the_tag_is_copied(tab, site, zipped):
    page = tab.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.pair("tab-copied", method="direct", overwrite=True, **tiny(site))
    tab.zip()
    assert "nothing was learned" in tab.ended()
    tab("copy").click()
    page.wait_for_selector("#ziplora_copy >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:tab-copied:1>"
    # http from another machine has no navigator.clipboard
    page.evaluate("navigator.clipboard.writeText('')")
    page.wait_for_selector("#ziplora_copy >> text=Copy")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    tab("copy").click()
    page.wait_for_selector("#ziplora_copy >> text=Copied")
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:tab-copied:1>"


def test_a_balance_of_the_strip_is_saved(tab, site, loras):
    tab.pair("tab-strip", **tiny(site, steps=3, balance_points=3, overwrite=True))
    tab.zip()
    tab.ended()
    tab.page.locator("#ziplora_gallery .thumbnail-item, #ziplora_gallery .thumbnail-lg").last.click()
    tab.settle()
    assert float(tab.number("balance").input_value()) == 1
    (loras / "tab-strip-style100.safetensors").unlink(missing_ok=True)
    (loras / "tab-strip-style100.json").unlink(missing_ok=True)
    tab("bake").click()
    tab.page.wait_for_function("document.querySelector('#ziplora_baked').innerText.includes('lora:')", timeout=30_000)
    assert "<lora:tab-strip-style100:1>" in tab("baked").inner_text()
    assert json.loads(read(loras / "tab-strip-style100.safetensors").metadata["ziplora.strengths"]) == [0.7, 1.15]
    # the first one is as it was
    assert "ziplora.strengths" not in read(loras / "tab-strip.safetensors").metadata
    # the same name again is refused
    tab("bake").click()
    assert "already there" in tab.red()


def test_reference_pictures(tab, site, tmp_path, loras):
    pictures = []
    for k in range(2):
        pictures.append(tmp_path / f"{k}.png")
        Image.effect_noise((80, 64), 60).convert("RGB").save(pictures[-1])
    tab.pair("tab-referenced", overwrite=True, **tiny(site))
    for card in (1, 2):
        tab.page.locator(f"#ziplora_reference_{card} input[type=file]").set_input_files([str(p) for p in pictures])
        tab.page.wait_for_selector(f"#ziplora_reference_{card} >> text=1.png", state="attached")
        tab.settle()  # the names are there before the upload has ended
    progress = tab.zip()
    assert "Done" in tab.ended()
    assert not any("making" in text for text in progress)
    recipe = json.loads(read(loras / "tab-referenced.safetensors").metadata["ziplora.recipe"])
    assert [parent["reference"] for parent in recipe["parents"]] == [2, 2]


# --- stopping, leaving, failing ---------------------------------------------------------------------------


def test_stop_keeps_the_best_so_far_and_says_so(tab, site, loras):
    tab.pair("tab-stopped", **small(site, steps=500, overwrite=True))
    tab.zip(until="merge: step 3")
    job = job_of(site)
    tab("stop").click()
    tab.page.wait_for_selector("#ziplora_stopping >> text=Stopping at the next step")
    said = tab.ended()
    assert "Stopped early, and kept: <lora:tab-stopped:1>" in said
    assert re.search(r"stopped at step \d+ of 500", said)
    assert read(loras / "tab-stopped.safetensors").deltas
    assert requests.get(f"{site.url}/ziplora/v1/jobs/{job}", timeout=30).json()["state"] == "stopped"


def test_stop_before_anything_was_learned_writes_nothing(tab, site, loras):
    before = listing(loras)
    tab.pair("tab-too-early", **small(site, pictures=30, sampler_steps=30))
    tab.zip(until="making")
    tab("stop").click()
    assert "nothing was saved" in tab.ended()
    assert not tab("tag").is_visible()
    assert listing(loras) == before


def test_a_page_that_is_loaded_again_takes_the_job_up(tab, site, loras):
    tab.pair("tab-reloaded", **small(site, steps=500, overwrite=True))
    tab.zip(until="merge: step")
    tab.page.reload()
    tab.page.wait_for_selector("#ziplora_zip", state="attached", timeout=60_000)
    again = Tab(tab.page)
    again.page.wait_for_selector("#ziplora_tab .progressDiv >> text=merge: step", timeout=30_000)
    again.page.wait_for_selector("#ziplora_live .ziplora_curve", timeout=30_000)
    assert again("zip").is_disabled()
    again("stop").click()
    assert "Stopped early, and kept: <lora:tab-reloaded:1>" in again.ended()


def test_a_second_page_neither_starts_a_second_job_nor_loses_the_first(tab, site, browser, loras):
    other = opened(browser, site.url)
    second = Tab(other)
    second.pair("tab-second", **tiny(site))
    tab.pair("tab-first", **small(site, steps=500, overwrite=True))
    tab.zip(until="merge: step")
    second("zip").click()
    assert "at work already, on tab-first" in second.red()
    other.context.close()
    tab("stop").click()
    assert "tab-first" in tab.ended()


@pytest.mark.parametrize(
    ("output", "words"),
    [("a/b", "character '/'"), ("..", "dot"), ("nul", "reserved"), ("tab-subject", "already there")],
)
def test_a_bad_name_is_refused_in_red(tab, site, loras, output, words):
    before = listing(loras)
    tab.pair(output)
    assert words in tab.red()
    tab("zip").click()
    tab.settle()
    assert words in tab.red()
    assert tab("zip").is_enabled()
    assert listing(loras) == before


def test_the_same_lora_twice_is_refused_in_red(tab, site, loras):
    before = listing(loras)
    tab.pair("tab-twice")
    tab.pick(2, "tab-subject")
    tab("zip").click()
    tab.settle()
    assert "same LoRA" in tab.red()
    assert listing(loras) == before


def test_settings_out_of_range_are_refused_by_their_label(tab, site, loras):
    before = listing(loras)
    tab.pair("tab-range", **tiny(site))
    tab.write("lam", "1000")
    tab("zip").click()
    tab.settle()
    assert "Overlap penalty: ensure this value is less than" in tab.red()
    tab.write("lam", "0.2")
    tab("check").click()
    tab.settle()
    assert "Ready" in tab("checked").inner_text()
    assert listing(loras) == before


def test_nothing_picked(tab):
    tab.page.evaluate("localStorage.clear()")
    tab.page.reload()
    fresh = Tab(tab.page)
    fresh("zip").click()
    assert "no LoRA is picked" in fresh.red()


def test_words_of_strangers_are_no_markup(tab, site, loras):
    # in a file's metadata, in a prompt, in a name
    tab.pair("tab-marked", method="direct", overwrite=True, **tiny(site))
    tab.write("prompt_2", f"house {MARKUP}")
    tab.pick(2, "tab-evil")
    assert MARKUP in tab("note_2").inner_text()
    tab.zip()
    assert MARKUP in tab.ended()
    tab.write("output", MARKUP)
    tab("check").click()
    tab.settle()
    assert "img src=x" in tab.red()
    assert tab.page.locator("#ziplora_tab :is(img[src='x'], .prose img[onerror])").count() == 0
    assert tab.page.evaluate("window.hacked") is None


@contextlib.contextmanager
def themed(browser, site, theme, width):
    page = opened(browser, f"{site.url}/?__theme={theme}", viewport={"width": width, "height": 1000})
    yield page
    page.context.close()


@pytest.mark.parametrize("width", [1280, 1024])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off(browser, site, loras, screenshots, theme, width):
    with themed(browser, site, theme, width) as page:
        tab = Tab(page)
        page.screenshot(path=screenshots / f"empty-{theme}-{width}.png")
        tab.pair("tab-wide", resolution=site.side)
        page.screenshot(path=screenshots / f"advanced-{theme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        tab("browse_1").click()
        page.wait_for_selector("#ziplora_dialog .ziplora_choice")
        page.wait_for_timeout(700)
        page.screenshot(path=screenshots / f"list-{theme}-{width}.png")
        dark = Image.open(io.BytesIO(page.locator("#ziplora_dialog").screenshot())).convert("L").getpixel((5, 300))
        assert (dark < 100) == (theme == "dark")
