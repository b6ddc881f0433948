"""The tab, as somebody uses it: a real WebUI, a real browser, and clicks."""

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from kohya_files import write_lora
from PIL import Image

from ziplora_lib.hosts.miniature import build_miniature
from ziplora_lib.lora.reader import read

SCREENSHOTS = Path(__file__).resolve().parents[1] / "screenshots"
MARKUP = "<img src=x onerror='window.hacked = 1'>"
TRIGGER, TAG = "a photo of sks fox", "an engraving"
SMALL = {"steps": 10, "resolution": 256, "samples": 8, "sampler_steps": 4, "pictures": 2}
TINY = {**SMALL, "steps": 2, "samples": 2, "pictures": 1, "balance_points": 1}
PICTURE = {"prompt": "a photo of sks fox", "seed": 7}
PATIENCE = 240_000


class Tab:
    """The tab in a page, by what a person sees."""

    def __init__(self, page):
        self.page = page
        page.click("#tabs > .tab-nav >> text=ZipLoRA")
        page.wait_for_selector("#ziplora_zip", state="visible")

    def __call__(self, part: str):
        # gr.HTML carries its id twice, outside and inside
        return self.page.locator(f"#ziplora_{part}").last

    def text(self, field: str):
        return self.page.locator(f"#ziplora_{field} :is(textarea, input)").first

    def choices(self, role: str) -> list[str]:
        self.text(f"{role}_lora").click()
        names = self.page.locator(f"#ziplora_{role}_lora ul li").all_inner_texts()
        self.text(f"{role}_lora").blur()
        return [name.strip().lstrip("✓").strip() for name in names]

    def pick(self, role: str, name: str) -> None:
        self.text(f"{role}_lora").fill(name)
        option = f"#ziplora_{role}_lora ul li[aria-label='{name}']"
        self.page.locator(option).click()
        self.settle()

    def settle(self) -> None:
        """Waits for the events that are on their way."""
        self.page.wait_for_timeout(300)
        self.page.wait_for_function("!document.querySelector('#ziplora_tab .generating, #ziplora_tab .pending')")
        self.page.wait_for_timeout(700)

    def write(self, field: str, value: str) -> None:
        self.text(field).fill(value)
        self.text(field).blur()
        self.settle()

    def advanced(self) -> None:
        if not self("resolution").is_visible():
            self.page.click("#ziplora_advanced > .label-wrap")
            self("resolution").wait_for(state="visible")

    def set(self, **fields) -> None:
        """Settings, by field of the recipe."""
        self.advanced()
        for field, value in fields.items():
            if isinstance(value, bool):
                self.page.locator(f"#ziplora_{field} input").set_checked(value)
            elif isinstance(value, int | float):
                box = self.page.locator(f"#ziplora_{field} input[type=number]")
                box.fill(str(value))
                box.blur()
            else:
                self.page.locator(f"#ziplora_{field} input[value='{value}']").check()

    def pair(self, output: str, **fields) -> None:
        """Both LoRAs picked, with these settings; ready for Zip."""
        self("subject_refresh").click()
        self.settle()
        self.pick("subject", "tab-subject")
        self.pick("style", "tab-style")
        self.write("output", output)
        self.set(**fields)
        self.settle()

    def zip(self, until: str = "ended") -> list[str]:
        """Presses Zip; returns the texts on the progress bar until it ended, or one of them contains `until`."""
        self("zip").click()
        seen: list[str] = []
        end = time.monotonic() + PATIENCE / 1000
        self.page.wait_for_function("document.querySelector('#ziplora_zip').disabled", timeout=PATIENCE)
        while time.monotonic() < end:
            for text in self.page.locator("#ziplora_tab .progressDiv").all_inner_texts():
                if text not in seen:
                    seen.append(text)
                if until in text:
                    return seen
            if self("zip").is_enabled():
                return seen
            time.sleep(0.1)
        raise AssertionError(f"neither ended nor at {until!r}: {seen}")

    def ended(self) -> str:
        """Waits until the job ended; the result as text."""
        self.page.wait_for_function("!document.querySelector('#ziplora_zip').disabled", timeout=PATIENCE)
        assert self("stop").is_disabled()
        self.settle()
        return self("summary").inner_text()

    def red(self) -> str:
        """The red text."""
        self.page.wait_for_selector("#ziplora_tab .error", timeout=30_000)
        return " ".join(self.page.locator("#ziplora_tab .error").all_inner_texts())


@pytest.fixture(scope="module")
def loras(webui):
    """A subject whose card names its trigger, a style whose training tags do, and one that says nothing."""
    pipe = build_miniature()
    folder = webui.lora_dir
    tags = json.dumps({"1_engraving": {TAG: 9, "ink": 2}})
    write_lora(folder / "tab-subject.safetensors", pipe, seed=11, rank=8, alpha=8.0, only="attn")
    write_lora(folder / "tab-style.safetensors", pipe, seed=12, rank=4, alpha=8.0, only="unet", ss_tag_frequency=tags)
    write_lora(folder / "tab-silent.safetensors", pipe, seed=13, rank=2, alpha=2.0, only="attn")
    (folder / "tab-subject.json").write_text(json.dumps({"activation text": TRIGGER}), encoding="utf-8")
    return folder


@pytest.fixture
def tab(page, webui, loras):
    yield Tab(page)
    webui.post("/sdapi/v1/interrupt")  # of a test that failed
    assert page.problems == []


@contextlib.contextmanager
def opened(browser, webui):
    """A page of its own for what several tests look at."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith(webui.url) else route.abort())
    page = context.new_page()
    page.goto(webui.url)
    page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
    yield page
    context.close()


def listing(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


# --- picking ------------------------------------------------------------------------------------------


def test_the_tab_is_there(tab):
    assert tab("zip").is_enabled()
    assert tab("stop").is_disabled()
    assert not tab("resolution").is_visible()
    assert not tab("tag").is_visible()
    assert not tab("resume").is_visible()


def test_every_control_has_a_hint_and_an_id_of_its_own(tab, webui):
    config = webui.get("/config").json()["components"]
    ours = [(c["type"], c["props"]) for c in config if (c["props"].get("elem_id") or "").startswith("ziplora_")]
    ids = [props["elem_id"] for _, props in ours]
    assert len(ids) == len(set(ids)) > 30
    for kind, props in ours:
        if kind in ("dropdown", "textbox", "slider", "number", "checkbox", "radio") and props["visible"]:
            assert props.get("info") or props["elem_id"] == "ziplora_tag", props["elem_id"]


def test_defaults_are_the_recipes(tab):
    from ziplora_lib.recipe import schema

    tab.advanced()
    defaults = {name: about.get("default") for name, about in schema()["properties"].items()}
    for field in ("steps", "lr", "resolution", "samples", "pictures", "empty_share", "sampler_steps", "guidance"):
        value = tab.page.locator(f"#ziplora_{field} input[type=number]").input_value()
        assert float(value) == defaults[field], field
    for field in ("method", "objective", "dtype"):
        assert tab.page.locator(f"#ziplora_{field} input:checked").input_value() == defaults[field]
    assert tab.text("lam").input_value() == tab.text("start").input_value() == ""


def test_pickers_list_the_folder_after_a_refresh(tab):
    tab("subject_refresh").click()
    tab.settle()
    for role in ("subject", "style"):
        assert {"tab-subject", "tab-style", "tab-silent"} <= set(tab.choices(role))


def test_prompts_are_filled_in_and_typed_ones_kept(tab):
    tab("subject_refresh").click()
    tab.settle()
    tab.pick("subject", "tab-subject")
    assert tab.text("subject_prompt").input_value() == TRIGGER
    assert "activation text" in tab("subject_note").inner_text()
    assert tab("checked").inner_text().strip() == ""
    tab.pick("style", "tab-style")
    assert tab.text("style_prompt").input_value() == TAG
    assert "training tag" in tab("style_note").inner_text()
    assert tab.text("output").input_value() == "tab-subject-tab-style"
    ready = tab("checked").inner_text()
    assert "Ready: both SDXL" in ready
    assert "layers learned" in ready
    # what was filled in follows the LoRA, what was typed stays
    tab.pick("subject", "tab-silent")
    assert tab.text("subject_prompt").input_value() == ""
    assert "names no trigger word" in tab("subject_note").inner_text()
    assert "the subject has no prompt" in tab.red()
    tab.write("subject_prompt", "my own words")
    assert "Ready" in tab("checked").inner_text()
    tab.write("output", "my-own-name")
    tab.pick("subject", "tab-subject")
    assert tab.text("subject_prompt").input_value() == "my own words"
    assert TRIGGER in tab("subject_note").inner_text()
    assert tab.text("output").input_value() == "my-own-name"


def test_swap(tab, tmp_path):
    picture = tmp_path / "fox.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    tab.pair("")
    tab.page.locator("#ziplora_subject_reference input[type=file]").set_input_files(str(picture))
    tab.page.wait_for_selector("#ziplora_subject_reference >> text=fox.png")
    tab.page.locator("#ziplora_subject_strength input[type=number]").fill("0.7")
    tab("swap").click()
    tab.settle()
    assert tab.text("subject_lora").input_value() == "tab-style"
    assert tab.text("style_lora").input_value() == "tab-subject"
    assert tab.text("subject_prompt").input_value() == TAG
    assert tab.text("style_prompt").input_value() == TRIGGER
    assert tab.page.locator("#ziplora_style_strength input[type=number]").input_value() == "0.7"
    assert "fox.png" in tab("style_reference").inner_text()
    assert "fox.png" not in tab("subject_reference").inner_text()
    assert "Ready" in tab("checked").inner_text()
    # after a swap the prompts still count as filled in
    tab.pick("style", "tab-silent")
    assert tab.text("style_prompt").input_value() == ""


# --- a merge from the page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipped(browser, webui, loras):
    """One merge from the page: what was seen, and pictures without LoRAs before and after."""
    found = {"before": webui.txt2img(**PICTURE)}
    with opened(browser, webui) as page:
        tab = Tab(page)
        tab.pair("tab-zipped", **SMALL)
        found["progress"] = tab.zip()
        found["summary"] = tab.ended()
        found["tag"] = tab.text("tag").input_value()
        page.wait_for_function("document.querySelectorAll('#ziplora_gallery img').length >= 5")
        found["captions"] = page.locator("#ziplora_gallery .caption-label").all_inner_texts()
        SCREENSHOTS.mkdir(exist_ok=True)
        for theme in ("light", "dark"):
            page.evaluate(f"document.body.classList.toggle('dark', {str(theme == 'dark').lower()})")
            for width in (1280, 1024):
                page.set_viewport_size({"width": width, "height": 1000})
                page.wait_for_timeout(300)
                page.screenshot(path=SCREENSHOTS / f"result-{theme}-{width}.png", full_page=True)
    found["after"] = webui.txt2img(**PICTURE)
    return found


def test_zip_shows_its_steps(zipped):
    assert any("step" in text and "%" in text for text in zipped["progress"])
    assert any(text.startswith("merge: step") for text in zipped["progress"])


def test_zip_ends_with_a_file_and_its_side_files(zipped, loras):
    assert zipped["tag"] == "<lora:tab-zipped:1>"
    merged = read(loras / "tab-zipped.safetensors")
    assert json.loads(merged.metadata["ziplora.recipe"])["steps"] == SMALL["steps"]
    assert json.loads((loras / "tab-zipped.json").read_text())["activation text"] == f"{TRIGGER}, {TAG}"
    assert Image.open(loras / "tab-zipped.png").size == (256, 256)


def test_zip_says_what_was_learned(zipped):
    said = zipped["summary"]
    assert "Done: <lora:tab-zipped:1>" in said
    assert TRIGGER in said
    assert "plain sum" in said
    assert "plainly adding the two" in said
    assert "UNet layers are in" in said
    assert "text encoder layers are summed" in said
    assert "Time taken" in said
    assert zipped["captions"][2] == "as learned"
    assert "more subject" in zipped["captions"][0]
    assert "more style" in zipped["captions"][4]


def test_the_webui_lists_it_as_sdxl_with_the_right_hash(zipped, webui, loras, page):
    webui.post("/sdapi/v1/refresh-loras")
    listed = {entry["name"]: entry for entry in webui.get("/sdapi/v1/loras").json()}["tab-zipped"]
    data = (loras / "tab-zipped.safetensors").read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert listed["alias"] == "tab-zipped"
    assert listed["metadata"]["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    seen = webui.run(
        "import sys\nn = sys.modules['networks'].available_networks['tab-zipped']\n"
        "result = [n.sd_version.name, n.hash, n.shorthash]"
    )
    assert seen == ["SDXL", hashlib.sha256(body).hexdigest(), hashlib.sha256(body).hexdigest()[:12]]
    page.click("#txt2img_extra_tabs > .tab-nav >> text=Lora")
    page.click("#txt2img_lora_extra_refresh")
    page.wait_for_selector("#txt2img_lora_cards .card[data-name='tab-zipped']", state="visible", timeout=30_000)


def test_the_tag_changes_the_picture_and_nothing_else_does(zipped, webui):
    assert np.array_equal(zipped["before"], zipped["after"])
    prompt = f"{PICTURE['prompt']} {zipped['tag']}"
    with_lora = webui.txt2img(prompt, seed=PICTURE["seed"])
    assert np.abs(with_lora.astype(float) - zipped["before"]).mean() > 1
    assert np.array_equal(zipped["before"], webui.txt2img(**PICTURE))


def test_copy_and_send(tab, page, loras):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.pair("tab-sent", method="direct", overwrite=True, **TINY)
    tab.zip()
    assert "nothing was learned" in tab.ended()
    tab("copy").click()
    page.wait_for_selector("#ziplora_copy >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:tab-sent:1>"
    # http from another machine has no navigator.clipboard
    page.evaluate("navigator.clipboard.writeText('')")
    page.wait_for_selector("#ziplora_copy >> text=Copy")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    tab("copy").click()
    page.wait_for_selector("#ziplora_copy >> text=Copied")
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:tab-sent:1>"
    for _ in range(2):
        page.click("#tabs > .tab-nav >> text=txt2img")
        prompt = page.locator("#txt2img_prompt textarea")
        if not prompt.input_value():
            prompt.fill("a fox")
        page.click("#tabs > .tab-nav >> text=ZipLoRA")
        tab("send").click()
        page.wait_for_selector("#txt2img_generate", state="visible")
        assert prompt.input_value() == "a fox <lora:tab-sent:1>"


def test_a_balance_of_the_strip_is_saved(tab, webui, loras):
    """Click the picture, save: the new LoRA makes the picture that was clicked."""
    tab.pair("tab-strip", **{**TINY, "steps": 3, "balance_points": 3})
    tab.zip()
    tab.ended()
    tab.page.locator("#ziplora_gallery .thumbnail-item, #ziplora_gallery .thumbnail-lg").last.click()
    tab.settle()
    assert float(tab.page.locator("#ziplora_balance input[type=number]").input_value()) == 1
    tab("bake").click()
    tab.page.wait_for_function("document.querySelector('#ziplora_baked').innerText.includes('lora:')", timeout=30_000)
    assert "<lora:tab-strip-style100:1>" in tab("baked").inner_text()
    path = loras / "tab-strip-style100.safetensors"
    assert json.loads(read(path).metadata["ziplora.strengths"]) == [0.7, 1.15]
    prompt = json.loads(read(loras / "tab-strip.safetensors").metadata["ziplora.recipe"])["preview_prompt"] or (
        f"{TRIGGER}, {TAG}"
    )
    fields = {"steps": SMALL["sampler_steps"], "cfg_scale": 5, "sampler_name": "DPM++ 2M", "scheduler": "Automatic"}
    clicked = webui.run(LAST_PICTURE, name="tab-strip")
    ours = webui.txt2img(f"{prompt}<lora:tab-strip-style100:1>", seed=0, **fields).astype(int)
    assert np.abs(ours - np.asarray(clicked)).max() <= 2
    # the first one is as it was
    assert "ziplora.strengths" not in read(loras / "tab-strip.safetensors").metadata
    # the same name again is refused
    tab("bake").click()
    assert "already there" in tab.red()


LAST_PICTURE = """
import gc
import numpy
from ziplora_lib.job import Job
job = next(o for o in gc.get_objects() if isinstance(o, Job) and o.recipe.output == data["name"])
result = numpy.asarray(job.result.pictures[-1][1]).tolist()
"""


def test_reference_pictures(tab, tmp_path, loras):
    pictures = []
    for k in range(2):
        pictures.append(tmp_path / f"{k}.png")
        Image.effect_noise((80, 64), 60).convert("RGB").save(pictures[-1])
    tab.pair("tab-referenced", overwrite=True, **TINY)
    for role in ("subject", "style"):
        tab.page.locator(f"#ziplora_{role}_reference input[type=file]").set_input_files([str(p) for p in pictures])
        tab.page.wait_for_selector(f"#ziplora_{role}_reference >> text=1.png")
    progress = tab.zip()
    assert "Done" in tab.ended()
    assert not any("making" in text for text in progress)
    recipe = json.loads(read(loras / "tab-referenced.safetensors").metadata["ziplora.recipe"])
    assert [parent["reference"] for parent in recipe["parents"]] == [2, 2]


# --- stopping, leaving, failing ---------------------------------------------------------------------------


def test_stop_keeps_the_best_so_far_and_says_so(tab, webui, loras):
    tab.pair("tab-stopped", **{**SMALL, "steps": 500})
    tab.zip(until="merge: step 3")
    task, job = tab.page.evaluate("JSON.parse(localStorage.getItem('ziplora_running'))")
    assert task.startswith("task(")
    assert webui.get(f"/ziplora/v1/jobs/{job}").json()["state"] == "running"
    tab("stop").click()
    tab.page.wait_for_selector("#ziplora_stopping >> text=Stopping at the next step")
    said = tab.ended()
    assert "Stopped early, and kept: <lora:tab-stopped:1>" in said
    assert re.search(r"stopped at step \d+ of 500", said)
    assert tab("stopping").inner_text().strip() == ""
    assert read(loras / "tab-stopped.safetensors").deltas
    assert webui.get(f"/ziplora/v1/jobs/{job}").json()["state"] == "stopped"


def test_stop_before_anything_was_learned_writes_nothing(tab, loras):
    before = listing(loras)
    tab.pair("tab-too-early", **{**SMALL, "pictures": 30, "sampler_steps": 30})
    tab.zip(until="making")
    tab("stop").click()
    assert "nothing was saved" in tab.ended()
    assert not tab("tag").is_visible()
    assert listing(loras) == before


def test_a_page_that_is_loaded_again_takes_the_job_up(tab, page, loras):
    tab.pair("tab-reloaded", **{**SMALL, "steps": 500})
    tab.zip(until="merge: step")
    page.reload()
    page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
    again = Tab(page)
    page.wait_for_selector("#ziplora_tab .progressDiv >> text=merge: step", timeout=30_000)
    page.wait_for_function("document.querySelector('#ziplora_zip').disabled")
    again("stop").click()
    assert "Stopped early, and kept: <lora:tab-reloaded:1>" in again.ended()
    assert page.evaluate("localStorage.getItem('ziplora_running')") is None


@pytest.mark.parametrize(
    ("output", "words"),
    [("a/b", "character '/'"), ("..", "dot"), ("nul", "reserved"), ("tab-subject", "already there")],
)
def test_a_bad_name_is_refused_in_red(tab, loras, output, words):
    before = listing(loras)
    tab.pair(output, **TINY)
    assert words in tab.red()
    tab("zip").click()
    tab.settle()
    assert words in tab.red()
    assert tab.page.locator("#ziplora_tab .error").count() == 1
    assert tab("zip").is_enabled()
    assert listing(loras) == before


def test_the_same_lora_twice_is_refused_in_red(tab, loras):
    before = listing(loras)
    tab.pair("tab-twice", **TINY)
    tab.pick("style", "tab-subject")
    tab("zip").click()
    tab.settle()
    assert "same LoRA" in tab.red()
    assert listing(loras) == before


def test_settings_out_of_range_are_refused_by_their_label(tab, loras):
    before = listing(loras)
    tab.pair("tab-range", **TINY)
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
    tab("zip").click()
    assert "no subject is picked" in tab.red()


FAILURES = {
    "in the merge": "import ziplora_lib.job as m\ndef run(*_):\n    raise RuntimeError(data['words'])\n",
    "outside it": "from ziplora_lib.job import Job as m\ndef run(*_):\n    raise RuntimeError(data['words'])\n",
}


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES.keys())
def test_after_an_exception_all_is_usable_again(tab, webui, code):
    tab.pair("tab-after", method="direct", overwrite=True, **TINY)
    webui.run(code + "m.kept = m.run\nm.run = run", words=MARKUP)
    try:
        tab.zip()
        tab.ended()
        assert MARKUP in tab.red()
    finally:
        webui.run(code + "m.run = m.kept")
    assert tab.page.evaluate("window.hacked") is None
    tab.zip()
    assert "Done" in tab.ended()
    assert tab.page.locator("#ziplora_tab .error").count() == 0


def test_words_of_strangers_are_no_markup(tab, webui, loras):
    # in a file's metadata, in a prompt, in a name
    pipe = build_miniature()
    tags = json.dumps({"1": {MARKUP: 1}})
    write_lora(loras / "tab-evil.safetensors", pipe, seed=14, rank=2, alpha=2.0, only="attn", ss_tag_frequency=tags)
    tab.pair("tab-marked", method="direct", overwrite=True, **TINY)
    tab.write("style_prompt", f"house {MARKUP}")
    tab.pick("style", "tab-evil")
    assert MARKUP in tab("style_note").inner_text()
    tab.zip()
    assert MARKUP in tab.ended()
    tab.write("output", MARKUP)
    tab("check").click()
    tab.settle()
    assert "img src=x" in tab.red()
    assert tab.page.locator("#ziplora_tab :is(img[src='x'], .prose img)").count() == 0
    assert tab.page.evaluate("window.hacked") is None


def test_the_webui_keeps_only_defaults_of_the_machine(webui):
    kept = json.loads((webui.data_dir / "ui-config.json").read_text())
    ours = {key.split("/")[1] for key in kept if key.startswith("ziplora/")}
    assert ours == {"Steps", "Samples at once", "Save memory", "Resolution", "Precision"}


@pytest.mark.parametrize("width", [1280, 1024])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off(browser, webui, loras, theme, width):
    SCREENSHOTS.mkdir(exist_ok=True)
    with opened(browser, webui) as page:
        page.set_viewport_size({"width": width, "height": 1000})
        page.goto(f"{webui.url}/?__theme={theme}")
        page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
        tab = Tab(page)
        page.screenshot(path=SCREENSHOTS / f"empty-{theme}-{width}.png")
        tab.pair("tab-wide")
        page.screenshot(path=SCREENSHOTS / f"advanced-{theme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
