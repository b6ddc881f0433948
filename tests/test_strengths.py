"""The tab's section Strengths, on the headless host: what its buttons do, down to the files and the pictures."""

import json
import threading
from types import SimpleNamespace

import pytest
from loras import dense_deltas
from PIL import Image

from ziplora_lib import job
from ziplora_lib.drawing import along_balance, draw, over_strengths, recipe_of
from ziplora_lib.lora.bake import split
from ziplora_lib.lora.reader import read
from ziplora_lib.naming import at_balance, at_strengths, of_halves

PROMPT = "sks cat in szn style"


class Page:
    """The section in a page of its own, with events as a browser sends them."""

    def __init__(self, host):
        gr = pytest.importorskip("gradio")
        from ziplora_lib.tab import strengths
        from ziplora_lib.tab.place import Place
        from ziplora_lib.tab.running import Runner

        self.jobs = {}
        place = Place(host, self.jobs, Runner(host, self.jobs))
        with gr.Blocks() as self.blocks, gr.Tab("Strengths"):
            place.runner.area()
            self.section = strengths.build(place)
            place.runner.connect()

    def find(self, what):
        return next(b for b in self.blocks.blocks.values() if getattr(b, "elem_id", "") == f"ziplora_strengths_{what}")

    def event(self, what, trigger, /, **given):
        """Runs an event; given: what is in its inputs. -> {elem_id's end or "chosen": update}"""
        target = self.find(what)
        [(fn, wired)] = [
            (self.blocks.fns[i], d)
            for i, d in enumerate(self.blocks.dependencies)
            if d["targets"] == [target._id] and d["trigger"] == trigger
        ]
        names = [self.name(block) for block in wired["inputs"]]
        assert set(names) >= given.keys()
        answers = fn.fn(
            *(
                given[one] if one in given else self.blocks.blocks[block].value
                for one, block in zip(names, wired["inputs"])
            )
        )
        answers = answers if isinstance(answers, list | tuple) else [answers]
        assert len(answers) == len(wired["outputs"])
        return dict(zip(map(self.name, wired["outputs"]), answers))

    def name(self, block):
        component = self.blocks.blocks[block]
        if component is self.section.chosen:
            return "chosen"
        return (component.elem_id or "").removeprefix("ziplora_strengths_")

    def drawn(self, button, **given):
        """Presses a button that draws and waits; -> (the job, what is shown at its end)."""
        started = self.event(button, "click", **given)
        assert started["said"] == "", started["said"]
        [made] = [one for one in self.jobs.values() if one.id == started["ziplora_job"]]
        for thread in threading.enumerate():
            if thread.name == made.task:
                thread.join()
        return made, dict(zip(("gallery", "summary", "sheet", "chosen"), self.section.show(made)))


@pytest.fixture
def page(host):
    return Page(host)


@pytest.fixture
def merged(host, recipe_of):
    job.run(recipe_of(method="direct", preview_prompt=PROMPT, seed=7, dtype="fp32"), host)
    return "merged"


def value(update):
    return update["value"] if isinstance(update, dict) else update


def test_it_lists_merges_and_not_their_halves(page, host, merged):
    split(host.destination(merged), [host.folder / "a.safetensors", host.folder / "b.safetensors"])
    [update] = page.section.updates(merged)
    assert (update["choices"], update["value"]) == (["merged"], "merged")
    [update] = page.section.updates("gone")
    assert update["choices"] == ["merged"]
    assert "value" not in update, "what is picked stays"
    job.bake_balance(host, merged, "later", [0.5, 1.0])
    assert page.event("refresh", "click")["lora"]["choices"] == ["later", "merged"]


def test_picking_fills_in_what_the_file_says(page, merged):
    shown = page.event("lora", "change", lora=merged)
    assert "subject subject and style style" in shown["note"]
    assert (shown["prompt"], shown["seed"], shown["size"]) == (PROMPT, 7, 64)
    assert shown["halves"] == "merged-subject, merged-style"
    assert [value(shown[slider]) for slider in ("balance", "first", "second")] == [0, 1, 1]
    assert [shown[slider]["label"] for slider in ("first", "second")] == ["Subject strength", "Style strength"]
    assert value(shown["gallery"]) == []
    assert page.event("lora", "change", lora=None)["note"] == ""


def test_of_one_role_the_sides_have_the_loras_names(page, host, pair_files, third_file, recipe_of):
    cast = [(third_file, "style"), (pair_files[0], "style"), (pair_files[1], "style")]
    parents = [{"lora": str(file), "role": role, "prompt": "x"} for file, role in cast]
    job.run(recipe_of(parents=parents, method="direct"), host)
    shown = page.event("lora", "change", lora="merged")
    assert [shown[slider]["label"] for slider in ("first", "second")] == [
        "Strength of third",
        "Strength of subject and style",
    ]
    assert shown["first_list"]["label"] == "Strengths of third"
    assert shown["balance"]["info"] == "-1: more third, 0: as learned, 1: more subject and style"
    assert shown["halves"] == "merged-third, merged-subject, merged-style"
    saved = page.event("save_two", "click", lora="merged", first=0.5, second=1.5)
    assert "Saved: &lt;lora:merged-s50-t150:1&gt;" in saved["saved"]
    baked = read(host.destination("merged-s50-t150"))
    assert json.loads(baked.metadata["ziplora.strengths"]) == [0.5, 1.5, 1.5]


def test_the_balance_is_drawn_and_a_click_takes_it(page, host, merged):
    made, shown = page.drawn("draw_balance", lora=merged, prompt=PROMPT, seed=3, size=64)
    assert (made.kind, made.state) == ("strip", "done"), made.error
    lora = host.peek(merged)
    wanted = draw(host, merged, along_balance(lora, recipe_of(lora, seed=3), [3], 5))
    gallery = shown["gallery"]
    assert (gallery["columns"], gallery["visible"]) == (5, True)
    assert [(p.tobytes(), text) for p, text in gallery["value"]] == [(p.tobytes(), text) for p, text in wanted.pictures]
    with Image.open(shown["sheet"]["value"]) as sheet:
        assert sheet.tobytes() == wanted.whole.tobytes()
    assert "seed 3" in shown["summary"]
    for index, point in enumerate((-1, -0.5, 0, 0.5, 1)):
        sliders = choose(page, shown["chosen"], index)
        assert value(sliders["balance"]) == point
        assert is_unchanged(sliders["first"])
        assert is_unchanged(sliders["second"])


def choose(page, chosen, index):
    """Clicks a picture."""
    target = page.find("gallery")
    [i] = [
        i for i, d in enumerate(page.blocks.dependencies) if d["targets"] == [target._id] and d["trigger"] == "select"
    ]
    answers = page.blocks.fns[i].fn(chosen, SimpleNamespace(index=index))
    return dict(zip(map(page.name, page.blocks.dependencies[i]["outputs"]), answers))


def is_unchanged(update):
    return isinstance(update, dict) and update.keys() == {"__type__"}


def test_the_grid_is_drawn_and_a_click_takes_its_strengths(page, host, merged):
    made, shown = page.drawn(
        "draw_grid", lora=merged, prompt="", seed=None, size=64, first_list="0.6; 1 1.2,1", second_list=" 1, 0.5,"
    )
    assert (made.kind, made.state) == ("grid", "done"), made.error
    lora = host.peek(merged)
    wanted = draw(host, merged, over_strengths(lora, recipe_of(lora), [7], [0.6, 1.0, 1.2], [1.0, 0.5]))
    gallery = shown["gallery"]
    assert gallery["columns"] == 3
    assert [(p.tobytes(), text) for p, text in gallery["value"]] == [(p.tobytes(), text) for p, text in wanted.pictures]
    assert gallery["value"][3][1] == "subject 0.6, style 0.5"
    sliders = choose(page, shown["chosen"], 3)
    assert (value(sliders["first"]), value(sliders["second"])) == (0.6, 0.5)
    assert is_unchanged(sliders["balance"])
    assert json.loads(json.dumps(made.public()))["result"]["weights"][1][0] == [0.6, 0.5]


def test_a_stopped_grid_shows_what_there_is(page, host, merged):
    wanted = page.section._grid_job(merged, PROMPT, 7, 64, "0.5, 1", "0.5, 1")
    wanted.run(host, lambda info: info["phase"] == "draw" and info["step"] == 3)
    assert wanted.state == "stopped"
    gallery, summary, sheet, chosen = page.section.show(wanted)
    assert len(gallery["value"]) == 3
    assert "3 of 4 pictures, then stopped" in summary
    assert sheet["visible"]
    assert chosen[2] == (0.5, 1.0)
    nothing = page.section._strip_job(merged, PROMPT, 7, 64)
    nothing.run(host, lambda info: True)
    gallery, summary, sheet, chosen = page.section.show(nothing)
    assert (gallery["visible"], sheet["visible"], chosen) == (False, False, [])
    assert "Stopped before the first picture" in summary


def test_what_cannot_be_drawn_is_said_in_red_and_starts_nothing(page, merged):
    for button, given, word in (
        ("draw_balance", {"lora": None}, "no LoRA is picked"),
        ("draw_balance", {"lora": "gone"}, "gone"),
        ("draw_balance", {"seed": -1}, "seed"),
        ("draw_balance", {"size": 65}, "resolution"),
        ("draw_grid", {"first_list": "0.6, strong"}, "Subject strengths: &#x27;strong&#x27; is not a number"),
        ("draw_grid", {"second_list": ""}, "Style strengths"),
        ("draw_grid", {"second_list": "nan"}, "between -4 and 4"),
        ("draw_grid", {"first_list": " ".join(str(k / 10) for k in range(20))}, "1 to 16"),
    ):
        about = {"lora": merged, "prompt": PROMPT, "seed": 7, "size": 64, **given}
        said = page.event(button, "click", **about)["said"]
        assert "class='error'" in said
        assert word in said
    assert page.jobs == {}


def test_what_fails_while_drawing_is_said_in_red(page, host, merged):
    made = page.section._strip_job(merged, PROMPT, 7, 64)
    host.destination(merged).unlink()
    made.run(host)
    _, summary, _, _ = page.section.show(made)
    assert "class='error'" in summary
    assert "merged" in summary


def test_a_balance_and_strengths_are_saved_as_loras(page, host, merged):
    for button, given, name, wanted in (
        ("save_balance", {"balance": -0.5}, "merged-subject50", [1.1, 0.875]),
        ("save_balance", {"balance": 1, "name": " mine "}, "mine", [0.7, 1.15]),
        ("save_balance", {"balance": 0}, "merged-balance0", [1.0, 1.0]),
        ("save_two", {"first": 0.8, "second": 1.2}, "merged-s80-t120", [0.8, 1.2]),
    ):
        shown = page.event(button, "click", lora=merged, **given)
        assert f"Saved: &lt;lora:{name}:1&gt; (" in shown["saved"], shown["saved"]
        assert "MB" in shown["saved"]
        assert name in shown["lora"]["choices"]
        assert json.loads(read(host.destination(name)).metadata["ziplora.strengths"]) == pytest.approx(wanted)


def test_a_split_writes_the_halves(page, host, merged):
    halves = page.event("lora", "change", lora=merged)["halves"]
    shown = page.event("split", "click", lora=merged, halves=halves)
    assert "&lt;lora:merged-subject:1&gt;" in shown["saved"]
    assert "&lt;lora:merged-style:1&gt;" in shown["saved"]
    assert shown["lora"]["choices"] == ["merged"], "halves have no strengths of their own"
    whole, parts = (
        dense_deltas(host.destination(merged)),
        [dense_deltas(host.destination(f"merged-{role}")) for role in ("subject", "style")],
    )
    key = next(key for key in whole if all(key in part for part in parts))
    assert (sum(part[key] for part in parts) - whole[key]).abs().max() < 1e-5


def test_what_cannot_be_saved_is_said_in_red(page, host, merged):
    before = sorted(path.name for path in host.folder.iterdir())
    for button, given, word in (
        ("save_balance", {"lora": None}, "no LoRA is picked"),
        ("save_balance", {"name": "merged"}, "already there"),
        ("save_two", {"name": "a/b"}, "a/b"),
        ("split", {"halves": "one"}, "2 halves"),
        ("split", {"halves": "one, one"}, "same name"),
        ("split", {"halves": ""}, "2 halves"),
    ):
        shown = page.event(button, "click", **{"lora": merged, **given})
        assert "class='error'" in shown["saved"]
        assert word in shown["saved"]
        assert is_unchanged(shown["lora"])
    assert sorted(path.name for path in host.folder.iterdir()) == before


def test_a_strangers_names_do_no_harm(page, host, pair_files, recipe_of, tmp_path):
    """A parent's name and a prompt are shown as they are."""
    evil = tmp_path / "<img src=x onerror=alert(1)>.safetensors"
    evil.write_bytes(pair_files[0].read_bytes())
    job.run(recipe_of(subject=evil, method="direct", preview_prompt="<b>bold</b>"), host)
    shown = page.event("lora", "change", lora="merged")
    assert "<img" not in shown["note"]
    assert "&lt;img" in shown["note"]
    made, shown = page.drawn("draw_grid", lora="merged", prompt="", seed=1, size=64, first_list="1", second_list="1")
    assert made.state == "done", made.error
    assert "&lt;b&gt;bold" in shown["summary"]
    assert "<b>bold" not in shown["summary"]


def test_names_of_what_is_made_of_a_merge():
    assert at_balance("m", -0.2, "subject") == "m-subject20"
    assert at_balance("m", 0.55, "cat and fox") == "m-cat and fox55"
    assert at_strengths("m", 0.8, 1.15) == "m-s80-t115"
    pair = [{"name": "dog", "role": "subject"}, {"name": "ink", "role": "style"}]
    assert of_halves("m", pair) == ["m-subject", "m-style"]
    assert of_halves("m", [*pair, {"name": "oil", "role": "style"}]) == ["m-dog", "m-ink", "m-oil"]
    assert of_halves("m", [pair[1], pair[1]]) == ["m-ink-1", "m-ink-2"]
