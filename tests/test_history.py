"""What was merged, and its recipe back out of the LoRA, its pictures and JSON: the same merge again, or a plain refusal."""

import ast
import json
import math
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ziplora_lib.catalogue import Catalogue
from ziplora_lib.errors import BadInput
from ziplora_lib.history import as_json, in_words, matched, merges, recipe_from, understood
from ziplora_lib.infotext import extended, infotext
from ziplora_lib.lora.bake import bake, split
from ziplora_lib.merge.pairing import equalising
from ziplora_lib.pictures import png, png_texts
from ziplora_lib.recipe import parse, stored

WEBUI = Path(os.environ.get("WEBUI_DIR", Path.home() / "stable-diffusion-webui"))
PARENTS = [
    {"lora": "dog", "role": "subject", "prompt": "a photo of sks dog, sitting", "strength": 0.9},
    {"lora": "ink", "role": "style", "prompt": 'a "house": in szn style'},
]


@pytest.fixture
def there(host, pair_files):
    """The headless host with the pair in its folder, so that names find them."""
    for file in pair_files:
        shutil.copy(file, host.folder)
    return host


@pytest.fixture(scope="module")
def finished(pair_files, tmp_path_factory):
    """A small merge of LoRAs that are named and not pathed: its result."""
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.diffusers import DiffusersHost
    from ziplora_lib.job import run

    folder = tmp_path_factory.mktemp("finished")
    for file in pair_files:
        shutil.copy(file, folder)
    parents = [{"lora": file.stem, "role": file.stem, "prompt": f"a photo of sks {file.stem}"} for file in pair_files]
    recipe = parse({
        "parents": parents, "output": "merged", "preview_prompt": "a cat, in szn style", "balance_points": 3, "steps": 4,
        "resolution": 64, "pictures": 1, "samples": 4, "sampler_steps": 2, "memory": "fast", "at_once": 8,
    })  # fmt: skip
    return run(recipe, DiffusersHost("miniature", folder, "cpu"))


@pytest.fixture
def merged(there, finished):
    """The same, with its files in the host's folder."""
    for ending in (".safetensors", ".json", ".png"):
        shutil.copy(Path(finished.file).with_suffix(ending), there.folder)
    return replace(finished, file=str(there.folder / "merged.safetensors"))


def again(host, recipe):
    """The same name merged once more by a recipe, as its bytes."""
    from ziplora_lib.job import run

    fields, gone = matched(recipe, host.loras())
    assert gone == []
    return Path(run(parse({**fields, "memory": "fast", "overwrite": True}), host).file).read_bytes()


def test_the_recipe_of_a_file_and_of_its_picture_gives_the_same_merge(there, merged, tmp_path):
    file = Path(merged.file)
    before = file.read_bytes()
    recipe = recipe_from(file)
    assert recipe == recipe_from(file.with_suffix(".png")) == merged.recipe
    fields, notes = understood(recipe)
    assert notes == []
    assert [parent["lora"] for parent in fields["parents"]] == ["subject", "style"]
    assert again(there, fields) == before
    for name, text in (
        ("plain.json", as_json(recipe)),
        ("report.json", json.dumps({**merged.public(), "history": merged.history})),
        ("job.json", json.dumps({"job": "1", "state": "done", "result": merged.public()})),
    ):
        (tmp_path / name).write_text(text)
        assert understood(recipe_from(tmp_path / name))[0] == fields, name


def test_the_pictures_carry_it_all_and_differ_by_their_balance_alone(merged):
    told = [picture.info for _, picture in merged.pictures]
    assert [text["ziplora"] for text in told] == [json.dumps(merged.recipe, sort_keys=True)] * 3
    for (point, _), text in zip(merged.pictures, told):
        line = text["parameters"].splitlines()[-1]
        assert {-1: "balance more subject", 0: "balance as learned", 1: "balance more style"}[point] in line
    with Image.open(Path(merged.file).with_suffix(".png")) as preview:
        assert preview.info == told[1]
        assert preview.tobytes() == merged.pictures[1][1].tobytes()


def test_the_strip_of_the_command_line_carries_the_recipe(pair_files, tmp_path):
    from ziplora_lib.__main__ import main

    out = tmp_path / "merged.safetensors"
    arguments = ["zip", "--subject", pair_files[0], "--style", pair_files[1], "--out", out, "--method", "direct",
                 "--resolution", 64, "--sampler-steps", 1, "--balance-points", 3, "--device", "cpu",
                 "--report", tmp_path / "report.json"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    recipe = recipe_from(out)
    assert recipe == recipe_from(tmp_path / "merged.balance.png") == recipe_from(tmp_path / "report.json")
    assert "/" not in json.dumps(recipe), "a path of this machine"
    told = [png_texts(path)["parameters"] for path in (out.with_suffix(".png"), tmp_path / "merged.balance.png")]
    assert told[0] == told[1]


def test_the_card_tells_the_recipe_in_a_line(merged):
    notes = json.loads(Path(merged.file).with_suffix(".json").read_text())["notes"]
    assert "\n" not in notes
    for part in ("subject subject at 1 + style style at 1", "ziplora, 4 steps", "seed 0", "64 pixels", "as learned"):
        assert part in notes
    assert "balance more ink (0.70 : 1.15)" in in_words({"parents": [{**p, "role": "style"} for p in PARENTS]}, 1.0)
    assert "steps" not in in_words({"parents": PARENTS, "method": "direct"})


# --- infotext --------------------------------------------------------------------------------------------------


def webui_parser():
    """The WebUI's own parse_generation_parameters, out of its source: importing it would start half a WebUI."""
    source = (WEBUI / "modules" / "infotext_utils.py").read_text(encoding="utf-8")
    wanted = {"re_param_code", "re_param", "re_imagesize", "unquote", "parse_generation_parameters"}
    wanted |= {"restore_old_hires_fix_params"}
    found = [
        node
        for node in ast.parse(source).body
        if (getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None)) in wanted
    ]
    assert len(found) == len(wanted)

    class Anything:
        """Settings and styles of a WebUI where nobody has changed any."""

        infotext_skip_pasting, infotext_styles = (), "Ignore"

        def __getattr__(self, name):
            return lambda *_: []

    names = {"re": re, "json": json, **dict.fromkeys(("infotext_versions", "prompt_parser", "processing"), Anything())}
    names["shared"] = type("shared", (), {"opts": Anything()})
    code = ast.Module([ast.parse("from __future__ import annotations").body[0], *found], [])
    exec(compile(code, "infotext_utils", "exec"), names)
    return names["parse_generation_parameters"]


def documented_parser(text):
    """The same by the format alone: the prompt, and below it NAME: VALUE or NAME: "VALUE" between commas."""
    prompt, _, line = text.rpartition("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    values = {name: json.loads(value) if value[:1] == '"' else value for name, value in found}
    width, height = values.pop("Size").split("x")
    return {"Prompt": prompt, **values, "Size-1": width, "Size-2": height}


def parsers():
    found = [documented_parser]
    return [*found, webui_parser()] if (WEBUI / "modules" / "infotext_utils.py").is_file() else found


def test_the_webui_reads_what_a_picture_says(merged):
    told = png_texts(Path(merged.file).with_suffix(".png"))["parameters"]
    for read in parsers():
        found = read(told)
        assert found["Prompt"] == "a cat, in szn style <lora:merged:1>"
        assert found["Steps"] == "2"
        assert (found["Sampler"], found["Schedule type"]) == ("Euler", "Automatic")
        assert (found["CFG scale"], found["Seed"]) == ("5.0", "0")
        assert (found["Size-1"], found["Size-2"], found["Model"]) == ("64", "64", "miniature")
        assert found["Lora hashes"] == f"merged: {merged.saved['sha256'][:12]}"
        assert found["ZipLoRA"] == in_words(merged.recipe)
    with safe_open(merged.file, framework="pt") as file:  # by which the WebUI finds a LoRA under another name
        assert file.metadata()["sshs_model_hash"].startswith(merged.saved["sha256"][:12])


@given(value=st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_name_can_stand_in_an_infotext(value):
    value = value.strip() or "x"
    told = extended(infotext("a dog", {"Steps": 1, "Model": value, "Size": "8x8"}), {"ZipLoRA": value})
    if len(told.splitlines()) == 2:
        found = documented_parser(told)
        assert (found["Model"], found["ZipLoRA"], found["Steps"]) == (value, value, "1")


@given(st.text(max_size=60))
def test_any_text_goes_into_a_picture_and_comes_out(tmp_path_factory, text):
    picture = Image.new("RGB", (2, 2))
    picture.info = {"ziplora": text}
    path = tmp_path_factory.mktemp("texts") / "x.png"
    path.write_bytes(png(picture))
    assert png(picture) == path.read_bytes()
    assert png_texts(path)["ziplora"] == text.encode("utf-8", "replace").decode()


# --- what a recipe says, and what is there --------------------------------------------------------------------


def test_what_is_stored_is_a_body_for_the_api():
    asked = {"parents": [{**PARENTS[0], "reference": ["/home/me/a.png", "/home/me/b.png"]}, PARENTS[1]],
             "output": "dog-ink", "steps": 7, "lam": 0.5, "preview_size": 512, "memory": "fast"}  # fmt: skip
    recipe = parse(asked)
    kept = stored(recipe, ["dog", "ink"], recipe.strengths)
    fields, notes = understood(kept)
    back = parse(json.loads(as_json(kept)))
    assert back == parse({**asked, "parents": PARENTS, "memory": "auto"})
    assert "memory" not in fields, "what depends on the machine is not in it"
    assert [note for note in notes if "dog" in note and "training pictures" in note] == notes != []
    assert not any(parent.reference for parent in back.parents), "no file of somebody else's is ever named"


def test_a_field_of_a_newer_version_is_left_out_and_named():
    newer = {"parents": [{**PARENTS[0], "mask": 1}, PARENTS[1]], "output": "x", "magic": [1]}
    fields, notes = understood(newer)
    assert parse(fields) == parse({"parents": PARENTS, "output": "x"})
    assert len(notes) == 1
    assert "magic, mask" in notes[0]
    _, (note,) = understood({**newer, **{f"{i} {'x' * 500}": i for i in range(100)}})
    assert len(note) < 1000
    assert "more" in note


def test_strengths_that_equal_norms_found_are_evened_out_to_the_same_again():
    norms, given = [0.001, 5.0], [1.0, 0.7]

    def evened(strengths):
        return [w * f for w, f in zip(strengths, equalising([n * w for n, w in zip(norms, strengths)]))]

    recipe = parse(
        {
            "parents": [{**p, "strength": w} for p, w in zip(PARENTS, given)],
            "output": "x",
            "equal_norms": True,
        }
    )
    used = evened(given)
    assert used[0] > 4, "more than a recipe may ask for"
    fields, _ = understood(stored(recipe, ["dog", "ink"], used))
    assert evened(parse(fields).strengths) == pytest.approx(used, rel=1e-5)


def test_loras_are_found_by_name_and_those_that_are_gone_are_told():
    recipe = {"parents": [*PARENTS, {"lora": "/home/me/Old.v2.safetensors", "role": "style"}], "output": "x"}
    found, gone = matched(recipe, ["dog", "Ink", "ink", "old.v2"])
    assert ([parent["lora"] for parent in found["parents"]], gone) == (["dog", "ink", "old.v2"], [])
    found, gone = matched(recipe, ["Ink"])
    assert [parent["lora"] for parent in found["parents"]] == [None, "Ink", None]
    assert gone == ["subject dog", "style Old.v2"]
    assert found["parents"][0]["prompt"] == PARENTS[0]["prompt"]
    windows = {"parents": [{"lora": r"C:\loras\dog.safetensors", "role": "subject"}, PARENTS[1]], "output": "x"}
    assert matched(windows, ["dog", "ink"])[1] == []


def test_merges_are_listed_newest_first_and_halves_and_strangers_are_none(there, merged, recipe_of):
    from ziplora_lib.job import run

    other = run(recipe_of("subject", "style", output="other", method="direct"), there)
    bake(Path(merged.file), there.folder / "baked.safetensors", [1.0, 0.5])
    split(Path(merged.file), [there.folder / "half-a.safetensors", there.folder / "half-b.safetensors"])
    for when, name in ((3000, "merged"), (2000, "other"), (1000, "baked")):
        os.utime(there.folder / f"{name}.safetensors", (when, when))
    past = merges(Catalogue(there), 10)
    assert [(p.name, p.when, p.method) for p in past] == [
        ("merged", 3000, "ziplora"), ("other", 2000, "direct"), ("baked", 1000, "ziplora")
    ]  # fmt: skip
    assert past[0].parents == ["subject", "style"]
    assert past[0].picture == Path(merged.file).with_suffix(".png")
    assert "merged.png" in past[0].preview
    assert (past[2].picture, past[2].preview) == (None, "")
    assert parse(past[1].recipe).output == Path(other.file).stem
    assert [p.name for p in merges(Catalogue(there), 1)] == ["merged"]


def test_a_file_with_an_odd_recipe_is_listed_with_its_problem(host, pair_files):
    odd = {"ziplora.recipe": '{"parents": 3}'}
    save_file(load_file(pair_files[0]), host.folder / "odd.safetensors", odd)
    (past,) = merges(Catalogue(host), 10)
    assert past.recipe == {}
    assert past.parents == []
    assert "odd.safetensors" in past.problem


# --- what is none ----------------------------------------------------------------------------------------------


def refused(path, *said):
    with pytest.raises(BadInput) as caught:
        recipe_from(path)
    told = str(caught.value)
    assert path.name in told
    assert caught.value.remedy
    assert "\n" not in told
    assert len(told) < 1000
    for word in said:
        assert word in told


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def picture_with(*chunks, size=(1, 1)):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


DEEP = "[" * 100_000
BOMB = chunk(b"zTXt", b"ziplora\0\0" + zlib.compress(b" " * 50_000_000))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"{}", "neither"),
        ("x.png", b"", "PNG"),
        ("x.png", b"not a picture", "PNG"),
        ("x.png", picture_with(), "carries no recipe"),
        ("x.png", picture_with(chunk(b"tEXt", b"ziplora\0{")), "not JSON"),
        ("x.png", picture_with(chunk(b"tEXt", b"ziplora\0" + b" " * 2_000_000)), "longer than any recipe"),
        ("x.png", picture_with(BOMB), "PNG"),
        ("x.png", picture_with(size=(2**31 - 1, 2**31 - 1)), "PNG"),
        ("x.png", picture_with(chunk(b"tEXt", b"ziplora\0" + DEEP.encode())), "nested"),
        ("x.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"tEXtziplora\0", "PNG"),
        ("x.json", b"", "not JSON"),
        ("x.json", b"\xff\xfe\x00\x80", "no text"),
        ("x.json", DEEP.encode(), "nested"),
        ("x.json", b'{"activation text": "sks", "notes": "a card"}', "not a recipe"),
        ("x.json", b"[1, 2]", "not a recipe"),
        ("x.json", b"null", "not a recipe"),
        ("x.json", b'{"recipe": {"recipe": {"parents": []}}}', "not a recipe"),
        ("x.json", b'{"parents": [1, 2], "output": "x"}', "not a recipe"),
        ("x.json", b'{"parents": [{"lora": "a", "role": "subject"}], "output": "x"}', "parents"),
        ("x.safetensors", b"", "safetensors"),
        ("x.safetensors", b"\xff" * 100, "safetensors"),
        ("x.safetensors", struct.pack("<Q", 2) + b"{}", "no recipe"),
    ],
)
def test_what_has_no_recipe_is_refused_in_plain_words(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, said)


@pytest.mark.parametrize("name", ["gone.json", "gone.png", "gone.safetensors"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    refused(tmp_path / name)


def test_a_lora_of_another_tool_is_refused(pair_files):
    refused(pair_files[0], "not a LoRA that ZipLoRA merged")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", "many"), ("steps", {}), ("method", []), ("seed", 10**4000), ("lr", math.nan), ("output", "\ud800"),
     ("parents.lora", None), ("parents.lora", "\udfff"), ("parents.role", "content"), ("parents.strength", 10**4000),
     ("parents.strength", math.nan)],
)  # fmt: skip
@pytest.mark.parametrize("norms", [False, True])
def test_a_wrong_field_is_named(tmp_path, field, value, norms):
    recipe = {"parents": [dict(parent) for parent in PARENTS], "output": "x", "equal_norms": norms}
    if field.startswith("parents."):
        recipe["parents"][1][field.removeprefix("parents.")] = value
    else:
        recipe[field] = value
    (tmp_path / "x.json").write_text(json.dumps(recipe))
    refused(tmp_path / "x.json", "broken character" if value in ("\ud800", "\udfff") else "recipe cannot be used")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*parse({"parents": PARENTS, "output": "x"}).dict(), "unknown"])
PARENT_FIELDS = st.sampled_from(["lora", "role", "prompt", "strength", "reference", "unknown"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, anything, max_size=3), st.dictionaries(PARENT_FIELDS, anything, max_size=2))
def test_whatever_stands_in_a_recipe_is_understood_or_refused(fields, parent):
    recipe = {"parents": [{**PARENTS[0], **parent}, PARENTS[1]], "output": "x", **fields}
    try:
        kept, notes = understood(recipe, "x.json")
    except BadInput:
        return
    assert parse(json.loads(as_json(recipe))) == parse(kept)
    assert understood(kept)[0] == kept
    in_words(kept)
    "".join(notes).encode()
    matched(kept, ["dog"])


# --- the section of the tab --------------------------------------------------------------------------------------


@pytest.fixture
def section(there):
    """section(): the section on the headless host, and every recipe that it put into the page."""
    gr = pytest.importorskip("gradio")
    from ziplora_lib.tab.history import build
    from ziplora_lib.tab.place import Place
    from ziplora_lib.tab.running import Runner

    used = []

    def use(recipe):
        used.append(recipe)
        return ["filled"]

    with gr.Blocks(analytics_enabled=False):
        other = gr.Textbox()
        made = build(Place(there, {}, Runner(there, {})), use, [other])
    return made, used


class Chosen:
    def __init__(self, index):
        self.index = index


def test_a_page_without_merges_says_so(section):
    made, _ = section
    gallery, said, names = made.listed()
    assert not gallery["visible"]
    assert "Nothing was merged yet" in said
    assert names == []


def test_a_merge_that_is_clicked_shows_its_recipe_and_goes_back_into_the_page(section, merged):
    made, used = section
    gallery, said, names = made.listed()
    assert (names, said, gallery["visible"]) == (["merged"], "", True)
    ((picture, caption),) = gallery["value"]
    assert picture == str(Path(merged.file).with_suffix(".png"))
    for part in ("merged", "subject + style", "ziplora"):
        assert part in caption
    said, card, told, text, download, recipe = made._selected(names, Chosen(0))
    assert said == ""
    assert card["visible"]
    assert "a photo of sks subject" in told
    assert json.loads(text) == json.loads(Path(download).read_text()) == recipe
    assert Path(download).name == "merged.recipe.json"
    assert parse(json.loads(text)).steps == 4
    said, *updates = made._used(recipe)
    assert updates == ["filled"]
    assert used == [recipe]
    assert "has the settings of merged" in said
    assert "class='error'" in made._used({})[0], "nothing was picked"
    assert "class='error'" in made._selected(["gone"], Chosen(0))[0]


@pytest.mark.parametrize("ending", [".safetensors", ".png", ".json"])
def test_what_is_dropped_is_restored_and_what_is_gone_is_told(section, merged, there, tmp_path, ending):
    made, used = section
    path = tmp_path / f"dropped{ending}"
    if ending == ".json":
        path.write_text(as_json(merged.recipe))
    else:
        shutil.copy(Path(merged.file).with_suffix(ending), path)
    (there.folder / "style.safetensors").unlink()
    said, card, *_, recipe, update = made._dropped(str(path))
    assert f"dropped{ending}" in said
    assert "style style is not there now" in said
    assert "subject subject is not there" not in said
    assert card["visible"]
    assert [parent["lora"] for parent in used[0]["parents"]] == ["subject", None]
    assert recipe["parents"][1]["lora"] == "style", "its recipe still names what it was made of"
    assert update == "filled"


def test_what_is_dropped_and_is_none_is_refused_in_red_and_escaped(section, tmp_path):
    made, used = section
    path = tmp_path / "<b>x.json"
    path.write_text('{"parents": [{"lora": "<script>", "role": "<script>"}]}')
    said, card, *_ = made._dropped(str(path))
    assert "class='error'" in said
    assert "<b>" not in said
    assert "<script>" not in said
    assert not card["visible"]
    assert used == []
    path = tmp_path / "y.json"
    hostile = {"parents": [{**PARENTS[0], "lora": "<img src=x>"}, PARENTS[1]], "output": "../../y", "<u>": 1}
    path.write_text(json.dumps(hostile))
    said, _, told, _, download, *_ = made._dropped(str(path))
    assert "<img" not in said + told
    assert "<u>" not in said + told
    assert Path(download).name == "recipe.json"
