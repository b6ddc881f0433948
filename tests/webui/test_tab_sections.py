"""The other sections of the tab, and what follows a merge: a real browser, in a WebUI where one is found and without one."""

import json

import pytest
from conftest import TAG, TRIGGER, opened
from pages import Tab
from PIL import Image
from test_tab_zip import tiny

from ziplora_lib.lora.reader import read


@pytest.fixture(scope="module")
def merged(browser, site, loras):
    """A merge to work with, from the page, by its name."""
    page = opened(browser, site.url)
    tab = Tab(page)
    tab.pair("tab-made", **tiny(site, seed=5, preview_prompt="a fox", overwrite=True))
    tab.zip()
    assert "Done" in tab.ended()
    page.context.close()
    return "tab-made"


def gone(folder, *names):
    for name in names:
        for ending in (".safetensors", ".json", ".png"):
            (folder / f"{name}{ending}").unlink(missing_ok=True)


def downloaded(tab, part, ending):
    """The text of a file that is offered there."""
    links = tab.page.locator(f"#ziplora_{part} a")
    address = next(a for a in links.evaluate_all("all => all.map(a => a.href)") if a.endswith(ending))
    return tab.page.request.get(address).text()


def test_compare_at_another_prompt(tab, site, screenshots):
    tab.pair("tab-compared", **tiny(site, overwrite=True))
    tab.zip()
    tab.ended()
    assert tab.text("compare_prompt").input_value() == f"{TRIGGER}, {TAG}"
    tab.write("compare_prompt", "a fox in the snow")
    tab.number("compare_seeds").fill("2")
    tab.start("compare")
    tab.ended()
    sheet = tab.page.locator("#ziplora_compare_sheet img")
    sheet.wait_for(timeout=30_000)
    wide, high = sheet.evaluate("async i => { await i.decode(); return [i.naturalWidth, i.naturalHeight] }")
    # no LoRA, subject, style, plain sum, ZipLoRA; two seeds
    assert high >= 5 * site.side
    assert wide >= 2 * site.side
    tab.page.screenshot(path=screenshots / "compared.png", full_page=True)
    # onward, with this LoRA
    tab("to_strengths").click()
    tab.settle()
    assert tab.text("strengths_lora").input_value() == "tab-compared"


def test_strengths_by_balance_and_grid(tab, site, loras, merged, screenshots):
    gone(loras, "tab-baked", "tab-half-1", "tab-half-2")
    tab.section("Strengths")
    tab.choose("strengths_lora", merged)
    assert tab.text("strengths_prompt").input_value() == "a fox"
    tab.start("strengths_draw_balance")
    tab.ended()
    pictures = tab.page.locator("#ziplora_strengths_gallery .caption-label")
    assert pictures.count() == 5
    assert pictures.all_inner_texts()[2] == "as learned"
    tab.page.locator("#ziplora_strengths_gallery :is(.thumbnail-item, .thumbnail-lg)").first.click()
    tab.settle()
    assert float(tab.number("strengths_balance").input_value()) == -1
    tab.write("strengths_first_list", "0, 1")
    tab.write("strengths_second_list", "0.5, 1, 1.5")
    tab.start("strengths_draw_grid")
    tab.ended()
    captions = tab.page.locator("#ziplora_strengths_gallery .caption-label").all_inner_texts()
    assert captions == [f"subject {x}, style {y}" for y in ("0.5", "1", "1.5") for x in ("0", "1")]
    tab.page.screenshot(path=screenshots / "strengths.png", full_page=True)
    if tab.page.locator("#ziplora_strengths_gallery .preview").count():
        tab.page.keyboard.press("Escape")
    tab.page.locator("#ziplora_strengths_gallery :is(.thumbnail-item, .thumbnail-lg)").nth(5).click()
    tab.settle()
    assert float(tab.number("strengths_first").input_value()) == 1
    assert float(tab.number("strengths_second").input_value()) == 1.5
    tab.write("strengths_name", "tab-baked")
    tab("strengths_save_two").click()
    tab.page.wait_for_selector("#ziplora_strengths_saved >> text=<lora:tab-baked:1>", timeout=30_000)
    assert json.loads(read(loras / "tab-baked.safetensors").metadata["ziplora.strengths"]) == [1, 1.5]
    tab.write("strengths_halves", "tab-half-1, tab-half-2")
    tab("strengths_split").click()
    tab.page.wait_for_selector("#ziplora_strengths_saved >> text=<lora:tab-half-2:1>", timeout=30_000)
    assert read(loras / "tab-half-1.safetensors").ranks == [8]
    # what has that name already is refused, in red
    tab("strengths_split").click()
    assert "already there" in tab.red()


def test_why_shows_what_the_merge_did(tab, merged, screenshots):
    tab.section("Why")
    tab.choose("why_lora", merged)
    tab.start("why_look")
    tab.ended()
    assert tab("why_summary").inner_text().strip()
    cells = tab.page.locator("#ziplora_why_map .ziplora_heat_cell, #ziplora_why_map td")
    assert cells.count() > 20
    rows = tab.page.locator("#ziplora_why_map tbody th").all_inner_texts()
    assert {"in 4", "mid", "out 0"} <= set(rows)
    before = tab("why_map").inner_html()
    tab.page.locator("#ziplora_why_show input[value=Change]").check()
    tab.settle()
    assert tab("why_map").inner_html() != before
    tab.page.screenshot(path=screenshots / "why.png", full_page=True)
    layers = downloaded(tab, "why_files", ".csv").splitlines()
    assert len(layers) - 1 == len(json.loads(downloaded(tab, "why_files", ".json"))["layers"])
    assert any(layer.startswith("lora_unet_") for layer in layers)


def test_many_at_once(tab, site, loras, screenshots):
    gone(loras, "many-tab-subject-tab-style", "many-tab-subject-tab-broken", "many-tab-silent-tab-style")
    tab.set(**tiny(site))
    tab.section("Many")
    for role, names in (("subjects", ["tab-subject", "tab-silent"]), ("styles", ["tab-style", "tab-broken"])):
        for name in names:
            tab.text(f"many_{role}").fill(name)
            tab.page.locator(f"#ziplora_many_{role} ul li[aria-label='{name}']").click()
        tab.text(f"many_{role}").blur()
    tab.write("many_names", "many-{subject}-{style}")
    tab.write("many_prompts", "tab-silent: a silent one")
    tab("many_plan").click()
    tab.page.wait_for_function("!document.querySelector('#ziplora_zip').disabled", timeout=60_000)
    tab.settle()
    planned = tab("many_table").inner_text()
    assert "many-tab-silent-tab-style" in planned
    assert "not a readable safetensors file" in planned
    tab.start("many_zip")
    tab.ended()
    said = tab("many_table").inner_text()
    assert said.count("<lora:many-tab-") == 2
    assert "tab-broken" in said
    assert (loras / "many-tab-subject-tab-style.safetensors").is_file()
    assert (loras / "many-tab-silent-tab-style.safetensors").is_file()
    tab.page.wait_for_selector("#ziplora_many_sheet img", timeout=30_000)
    tab.page.screenshot(path=screenshots / "many.png", full_page=True)
    assert len(downloaded(tab, "many_reports", ".csv").splitlines()) == 5


def test_a_merge_of_the_history_is_used_again(tab, site, merged, screenshots):
    tab.section("History")
    tab.page.wait_for_selector("#ziplora_history_gallery .caption-label", timeout=30_000)
    captions = tab.page.locator("#ziplora_history_gallery .caption-label").all_inner_texts()
    at = next(i for i, caption in enumerate(captions) if caption.startswith(merged))
    assert "tab-subject" in captions[at]
    tab.page.locator("#ziplora_history_gallery :is(.thumbnail-item, .thumbnail-lg)").nth(at).click()
    tab.settle()
    assert "tab-subject" in tab("history_lines").inner_text()
    tab.page.screenshot(path=screenshots / "history.png", full_page=True)
    tab("history_use").click()
    tab("zip").wait_for(state="visible", timeout=30_000)
    tab.settle()
    restored(tab, site)


def restored(tab, site):
    """The Zip section has what `merged` was made by."""
    assert tab.text("lora_1").input_value() == "tab-subject"
    assert tab.text("lora_2").input_value() == "tab-style"
    assert tab.text("prompt_1").input_value() == TRIGGER
    assert tab.number("seed").input_value() == "5"
    tab.advanced()
    assert tab.number("resolution").input_value() == str(site.side)
    assert tab.text("preview_prompt").input_value() == "a fox"


@pytest.mark.parametrize("ending", [".safetensors", ".png"])
def test_a_merged_file_or_its_preview_dropped_in_restores_the_tab(tab, site, loras, merged, ending):
    tab.section("History")
    tab.page.locator("#ziplora_history_drop input[type=file]").set_input_files(str(loras / f"{merged}{ending}"))
    tab("zip").wait_for(state="visible", timeout=30_000)
    tab.settle()
    restored(tab, site)


def test_a_recipe_as_json_and_what_is_none(tab, site, loras, merged, tmp_path):
    tab.section("History")
    drop = tab.page.locator("#ziplora_history_drop input[type=file]")
    bad = tmp_path / "bad.json"
    bad.write_text('{"no": "recipe"}')
    drop.set_input_files(str(bad))
    assert "bad.json" in tab.red()
    recipe = {
        "parents": [
            {"lora": "tab-subject", "role": "subject", "prompt": "x"},
            {"lora": "long gone", "role": "style", "prompt": "y"},
        ],
        "output": "from-json",
        "steps": 33,
    }
    good = tmp_path / "good.json"
    good.write_text(json.dumps(recipe))
    tab.page.reload()
    again = Tab(tab.page)
    again.section("History")
    again.page.locator("#ziplora_history_drop input[type=file]").set_input_files(str(good))
    again("zip").wait_for(state="visible", timeout=30_000)
    again.settle()
    assert again.number("steps").input_value() == "33"
    assert again.text("output").input_value() == "from-json"
    assert again.text("lora_2").input_value() == ""
    again.section("History")
    assert "long gone" in again("history_said").inner_text()


def test_the_preview_says_how_it_was_made(site, loras, merged):
    told = Image.open(loras / f"{merged}.png").text
    assert f"<lora:{merged}:1>" in told["parameters"]
    assert "Seed: 5" in told["parameters"]
    assert json.loads(told["ziplora"])["output"] == merged
