"""What the tab does with the WebUI around it: prompts, cards, settings, languages, start."""

import hashlib
import json

import numpy as np
import pytest
from conftest import MARKUP, TRIGGER, opened
from pages import Tab
from test_tab_zip import small, tiny

from ziplora_lib.lora.reader import read

PICTURE = {"prompt": "a photo of sks fox", "seed": 7}
pytestmark = pytest.mark.parametrize("site", ["webui"], indirect=True)


@pytest.fixture(scope="module")
def zipped(browser, site, loras):
    """One merge from the page, and pictures without LoRAs before and after."""
    found = {"before": site.webui.txt2img(**PICTURE)}
    page = opened(browser, site.url)
    tab = Tab(page)
    tab.pair("tab-in-webui", **small(site, overwrite=True))
    found["progress"] = tab.zip()
    found["summary"] = tab.ended()
    page.context.close()
    found["after"] = site.webui.txt2img(**PICTURE)
    return found


def test_the_webui_lists_it_as_sdxl_with_the_right_hash(site, zipped, webui, loras, browser):
    webui.post("/sdapi/v1/refresh-loras")
    listed = {entry["name"]: entry for entry in webui.get("/sdapi/v1/loras").json()}["tab-in-webui"]
    data = (loras / "tab-in-webui.safetensors").read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert listed["alias"] == "tab-in-webui"
    assert listed["metadata"]["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    seen = webui.run(
        "import sys\nn = sys.modules['networks'].available_networks['tab-in-webui']\n"
        "result = [n.sd_version.name, n.hash, n.shorthash]"
    )
    assert seen == ["SDXL", hashlib.sha256(body).hexdigest(), hashlib.sha256(body).hexdigest()[:12]]
    page = opened(browser, webui.url)
    page.click("#txt2img_extra_tabs > .tab-nav >> text=Lora")
    page.click("#txt2img_lora_extra_refresh")
    card = "#txt2img_lora_cards .card[data-name='tab-in-webui']"
    page.wait_for_selector(card, state="visible", timeout=30_000)
    page.wait_for_selector(f"{card} img.preview", timeout=30_000)
    page.context.close()


def test_the_tag_changes_the_picture_and_nothing_else_does(site, zipped, webui):
    assert np.array_equal(zipped["before"], zipped["after"])
    prompt = f"{PICTURE['prompt']} <lora:tab-in-webui:1>"
    with_lora = webui.txt2img(prompt, seed=PICTURE["seed"])
    assert np.abs(with_lora.astype(float) - zipped["before"]).mean() > 1
    assert np.array_equal(zipped["before"], webui.txt2img(**PICTURE))


def test_the_clicked_balance_makes_the_clicked_picture(tab, site, webui, loras):
    """Click the picture, save: the new LoRA makes the picture that was clicked."""
    for ending in (".safetensors", ".json"):
        (loras / f"tab-clicked-style100{ending}").unlink(missing_ok=True)
    tab.pair("tab-clicked", **tiny(site, steps=3, balance_points=3, overwrite=True))
    tab.zip()
    tab.ended()
    tab.page.locator("#ziplora_gallery .thumbnail-item, #ziplora_gallery .thumbnail-lg").last.click()
    tab.settle()
    tab("bake").click()
    tab.page.wait_for_function("document.querySelector('#ziplora_baked').innerText.includes('lora:')", timeout=30_000)
    fields = {"steps": 4, "cfg_scale": 5, "sampler_name": "DPM++ 2M", "scheduler": "Automatic"}
    clicked = webui.run(LAST_PICTURE, name="tab-clicked")
    ours = webui.txt2img(f"{TRIGGER}, an engraving<lora:tab-clicked-style100:1>", seed=0, **fields).astype(int)
    assert np.abs(ours - np.asarray(clicked)).max() <= 2


LAST_PICTURE = """
import gc
import numpy
from ziplora_lib.jobs import Job
made = [o for o in gc.get_objects() if isinstance(o, Job) and o.title == data["name"]]
result = numpy.asarray(made[-1].result.pictures[-1][1]).tolist()
"""


def test_into_the_prompt_and_generate_now(tab, site, zipped):
    page = tab.page
    tab.pair("tab-sent", method="direct", overwrite=True, **tiny(site))
    tab.zip()
    tab.ended()
    prompt = page.locator("#txt2img_prompt textarea")
    for _ in range(2):
        page.click("#tabs > .tab-nav >> text=ZipLoRA")
        tab("send").click()
        page.wait_for_selector("#txt2img_generate", state="visible")
        assert prompt.input_value() == f"{TRIGGER}, an engraving <lora:tab-sent:1>"
    prompt.fill("a fox")
    page.click("#tabs > .tab-nav >> text=ZipLoRA")
    tab("send").click()
    assert prompt.input_value() == "a fox <lora:tab-sent:1>"
    # not the size: there the WebUI's own script throws an error
    page.locator("#txt2img_steps input[type=number]").fill("2")
    page.locator("#txt2img_steps input[type=number]").blur()
    page.click("#tabs > .tab-nav >> text=ZipLoRA")
    tab("generate").click()
    page.wait_for_selector("#txt2img_gallery img", timeout=120_000)
    page.wait_for_selector("#html_info_txt2img >> text=tab-sent", timeout=120_000)


def test_from_prompt_takes_the_tags_with_their_strengths(site, tab):
    page = tab.page
    page.click("#tabs > .tab-nav >> text=txt2img")
    page.locator("#txt2img_prompt textarea").fill("a fox <lora:tab-subject:0.7>, <lora:tab-style:te=0.5:unet=0.4>")
    page.click("#tabs > .tab-nav >> text=ZipLoRA")
    tab("refresh").click()
    tab.settle()
    tab("from_prompt").click()
    tab.settle()
    assert tab.text("lora_1").input_value() == "tab-subject"
    assert tab.text("lora_2").input_value() == "tab-style"
    assert tab.number("strength_1").input_value() == "0.7"
    assert tab.number("strength_2").input_value() == "0.4"
    assert tab.text("prompt_1").input_value() == TRIGGER
    page.click("#tabs > .tab-nav >> text=txt2img")
    page.locator("#txt2img_prompt textarea").fill("a fox <lora:nobody-has-this:1>")
    page.click("#tabs > .tab-nav >> text=ZipLoRA")
    tab("from_prompt").click()
    assert "nobody-has-this is not among the LoRAs" in tab.red()
    page.locator("#txt2img_prompt textarea").evaluate("e => e.value = ''")


def test_png_info_reads_the_preview(site, browser, webui, loras, zipped):
    page = opened(browser, webui.url)
    page.click("#tabs > .tab-nav >> text=PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(str(loras / "tab-in-webui.png"))
    page.wait_for_selector("#tab_pnginfo >> text=lora:tab-in-webui:1", timeout=30_000)
    said = page.locator("#tab_pnginfo").inner_text()
    assert "Seed: 0" in said
    assert "Size: 256x256" in said
    page.context.close()


FAIL = """
import ziplora_lib.job as m
def run(*_):
    raise RuntimeError(data["words"])
m.kept, m.run = m.run, run
"""


def test_after_an_exception_all_is_usable_again(tab, site, webui):
    tab.pair("tab-after", method="direct", overwrite=True, **tiny(site))
    webui.run(FAIL, words=MARKUP)
    try:
        tab("zip").click()
        assert MARKUP in tab.red()
    finally:
        webui.run("import ziplora_lib.job as m\nm.run = m.kept")
    assert tab.page.evaluate("window.hacked") is None
    tab.ended()
    tab.zip()
    assert "Done" in tab.ended()
    assert tab.page.locator("#ziplora_tab .error:visible").count() == 0


def test_settings_are_in_the_webuis_settings_page(browser, webui, loras, site):
    """Changed there, they are the tab's: default steps, folder and name."""
    page = opened(browser, webui.url)
    page.click("#tabs > .tab-nav >> text=Settings")
    page.click("#settings > .tab-nav >> text=ZipLoRA")
    assert page.locator("#setting_ziplora_folder textarea, #setting_ziplora_folder input").is_visible()
    webui.post("/sdapi/v1/options", json={"ziplora_folder": "zipped", "ziplora_name": "{style} of {subject}"})
    try:
        tab = Tab(page)
        tab.pair("", method="direct", **tiny(site))
        tab.pick(2, "tab-silent")
        tab.pick(2, "tab-style")
        assert tab.text("output").input_value() == "tab-style of tab-subject"
        tab.set(overwrite=True)
        tab.zip()
        tab.ended()
        assert read(loras / "zipped/tab-style of tab-subject.safetensors").deltas
        assert tab.text("tag").input_value() == "<lora:tab-style of tab-subject:1>"
        assert webui.txt2img(f"a fox {tab.text('tag').input_value()}").shape == (256, 256, 3)
        webui.post("/sdapi/v1/options", json={"ziplora_folder": "../elsewhere"})
        tab("zip").click()
        assert "not below the Lora folder" in tab.red()
    finally:
        webui.post("/sdapi/v1/options", json={"ziplora_folder": "", "ziplora_name": "{subject}-{style}"})
        page.context.close()


def test_nothing_of_the_tab_goes_into_the_webuis_own_defaults(site, webui):
    kept = json.loads((webui.data_dir / "ui-config.json").read_text())
    assert [key for key in kept if key.startswith("ziplora/")] == []


def test_labels_and_hints_can_be_translated(site, start_webui, browser):
    """As the WebUI's other texts: a file in localizations/, by the English text."""
    words = {"Browse": "Durchsuchen", "Output name": "Name der neuen LoRA", "Gradient steps": "Gradientenschritte"}

    def translate(data_dir):
        folder = data_dir / "extensions/ziplora-words/localizations"
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps(words), encoding="utf-8")

    with start_webui(options={"localization": "test"}, before=translate) as webui:
        page = opened(browser, webui.url)
        page.click("#tabs > .tab-nav >> text=ZipLoRA")
        page.wait_for_selector("#ziplora_zip", state="visible")
        seen = page.locator("#ziplora_tab").inner_text()
        page.context.close()
    for english, other in words.items():
        assert other in seen
        assert english not in seen
