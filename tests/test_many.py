"""Many merges at once: every subject with every style, planned before any work; what fails costs the others nothing."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loras import kohya_name, write_lora
from PIL import Image
from safetensors.torch import load_file, save_file

from ziplora_lib.batch import Batch, Outcome
from ziplora_lib.errors import BadInput
from ziplora_lib.lora.reader import read
from ziplora_lib.many import Chosen, Pair, drafted, plan, run_many

ROOT = Path(__file__).resolve().parents[1]
PATTERN = "{subject}-{style}"
TINY = {
    "steps": 2,
    "resolution": 64,
    "pictures": 1,
    "samples": 4,
    "sampler_steps": 2,
    "memory": "fast",
    "at_once": 8,
}
FLAGS = ["--steps", "2", "--resolution", "64", "--pictures", "1", "--samples", "4", "--sampler-steps", "2",
         "--at-once", "8", "--device", "cpu"]  # fmt: skip
SUMS = {**TINY, "method": "direct"}  # no model is asked, but for the preview
SUBJECTS, STYLES = [Chosen("cat"), Chosen("dog")], [Chosen("ink"), Chosen("oil")]


@pytest.fixture(scope="session")
def shelf(layers, tmp_path_factory):
    """Two subjects and two styles for the miniature, which name their trigger words."""
    folder = tmp_path_factory.mktemp("shelf")
    shapes = {
        kohya_name(part, name): shape for (part, name), shape in layers.items() if part == "unet" and "attn" in name
    }
    for seed, name in enumerate(("cat", "dog", "ink", "oil")):
        phrase = {"modelspec.trigger_phrase": f"a picture of {name}"}
        write_lora(folder / f"{name}.safetensors", shapes, phrase, rank=2, seed=seed)
    return folder


@pytest.fixture
def folder(host, shelf):
    """The folder of the host's LoRAs, with the shelf in it."""
    for file in shelf.iterdir():
        shutil.copy(file, host.folder)
    return host.folder


def zeroed(path):
    """The file with nothing in it to learn."""
    tensors = load_file(path)
    nothing = {name: torch.zeros_like(t) if "lora_up" in name else t for name, t in tensors.items()}
    save_file(nothing, path, {"modelspec.trigger_phrase": "nothing"})


def spoiled(path):
    """The file with a value that is no number: its header is still in order."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, {"modelspec.trigger_phrase": "spoiled"})


def states(batch):
    return {one.name: one.state for one in batch.outcomes}


def test_a_plan_has_every_pair_with_its_prompts_and_its_name(host, folder):
    (folder / "dog.json").write_text(json.dumps({"activation text": "my dog"}))
    planned = plan(host, [Chosen("cat", "a red cat", 0.5), Chosen("dog")], STYLES, "{style} of {subject}", TINY)
    assert [one.output for one in planned] == ["ink of cat", "oil of cat", "ink of dog", "oil of dog"]
    assert [one.problem for one in planned] == [""] * 4
    assert [[p.prompt for p in one.recipe.parents] for one in planned[::3]] == [
        ["a red cat", "a picture of ink"],
        ["my dog", "a picture of oil"],
    ]
    assert planned[0].sources == ("given", "trigger phrase in the file")
    assert planned[3].sources[0] == "activation text of its card"
    assert planned[0].recipe.strengths == [0.5, 1.0]
    assert all(one.bytes > 10_000 and one.recipe.balance_points == 1 for one in planned)


def test_one_pair_fails_and_three_are_done(host, folder):
    zeroed(folder / "dog.safetensors")
    zeroed(folder / "oil.safetensors")
    planned = plan(host, SUBJECTS, STYLES, PATTERN, TINY)
    assert [one.problem for one in planned] == [""] * 4
    batch = run_many(planned, host)
    assert states(batch) == {"cat-ink": "done", "cat-oil": "done", "dog-ink": "done", "dog-oil": "failed"}
    failed = batch.outcomes[3]
    assert "there is nothing to learn" in failed.said
    assert failed.picture is None
    assert not batch.complete
    assert not batch.stopped
    for one in batch.outcomes[:3]:
        assert one.tag == f"<lora:{one.name}:1>"
        assert read(folder / f"{one.name}.safetensors").ranks == [4]
        assert np.array_equal(
            np.asarray(one.picture), np.asarray(Image.open(folder / f"{one.name}.png").convert("RGB"))
        )
    assert not (folder / "dog-oil.safetensors").exists()


def test_a_damaged_lora_is_refused_with_its_sentence_and_the_others_are_done(host, folder):
    spoiled(folder / "dog.safetensors")
    (folder / "oil.safetensors").write_bytes(b"nothing")
    planned = plan(host, SUBJECTS, STYLES, PATTERN, SUMS)
    assert [bool(one.problem) for one in planned] == [False, True, False, True]
    assert all(one.where == "style" and "oil.safetensors" in one.problem for one in planned[1::2])
    batch = run_many(planned, host)
    assert states(batch) == {"cat-ink": "done", "cat-oil": "refused", "dog-ink": "refused", "dog-oil": "refused"}
    assert "dog.safetensors" in batch.outcomes[2].said
    assert "finite" in batch.outcomes[2].said
    assert batch.outcomes[1].said == planned[1].problem


def test_stop_keeps_what_is_finished_and_the_best_of_the_one_at_work(host, folder):
    steps = []

    def callback(info):
        steps.append(info["step"])
        assert info["phase"] == "many"
        assert info["steps"] == 40
        return info["what"].startswith("2 of 4: cat-oil: merge")

    batch = run_many(plan(host, SUBJECTS, STYLES, PATTERN, {**TINY, "steps": 10}), host, callback)
    assert states(batch) == {"cat-ink": "done", "cat-oil": "stopped", "dog-ink": "not begun", "dog-oil": "not begun"}
    assert batch.stopped
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert 10 < steps[-1] < 20
    assert any("the best coefficients so far" in warning for warning in batch.outcomes[1].warnings)
    assert len(read(folder / "cat-oil.safetensors").deltas) > 20
    assert not (folder / "dog-ink.safetensors").exists()


def test_stop_before_anything_was_learned_keeps_what_is_finished(host, folder):
    batch = run_many(
        plan(host, SUBJECTS, STYLES, PATTERN, SUMS), host, lambda info: info["what"].startswith("2 of 4: cat-oil: ")
    )
    assert [one.state for one in batch.outcomes] == ["done", "not begun", "not begun", "not begun"]
    assert batch.stopped
    assert sorted(path.name for path in folder.glob("*-*.safetensors")) == ["cat-ink.safetensors"]


def test_names_that_collide_are_refused_before_any_work(host, folder):
    planned = plan(host, SUBJECTS, STYLES, "{subject}", TINY)
    assert [one.problem.partition(".")[0] for one in planned] == [
        f"2 pairs would be called {name}" for name in ("cat", "cat", "dog", "dog")
    ]
    planned = plan(host, SUBJECTS, STYLES, "{style}-by", TINY)
    assert ["2 pairs would be called ink-by" in one.problem for one in planned] == [True, False, True, False]
    before = sorted(folder.iterdir())
    seen = []
    batch = run_many(planned, host, seen.append)
    assert set(states(batch).values()) == {"refused"}
    assert seen == []
    assert sorted(folder.iterdir()) == before
    with pytest.raises(BadInput, match="name pattern"):
        plan(host, SUBJECTS, STYLES, "{colour}", TINY)


def test_a_lora_of_the_batch_is_never_overwritten(host, folder):
    dog = (folder / "dog.safetensors").read_bytes()
    pairs = [Pair(Chosen("cat"), Chosen("ink"), "dog"), Pair(Chosen("dog"), Chosen("ink"))]
    planned = drafted(pairs, PATTERN, TINY, "overwrite", host.peek, host.destination)
    assert "dog.safetensors is one of the LoRAs that go in" in planned[0].problem
    assert planned[1].to_do
    run_many(planned[:1], host)
    assert (folder / "dog.safetensors").read_bytes() == dog


def test_names_that_are_taken(host, folder):
    first = run_many(plan(host, SUBJECTS[:1], STYLES, PATTERN, SUMS), host)
    kept = (folder / "cat-ink.safetensors").read_bytes()
    assert first.complete

    planned = plan(host, SUBJECTS, STYLES, PATTERN, {**SUMS, "seed": 1})
    assert [one.taken for one in planned] == [True, True, False, False]
    batch = run_many(planned, host)
    assert list(states(batch).values()) == ["skipped", "skipped", "done", "done"]
    assert batch.complete
    assert (folder / "cat-ink.safetensors").read_bytes() == kept
    # its preview is there from the first time
    assert batch.outcomes[0].picture.tobytes() == first.outcomes[0].picture.tobytes()

    planned = plan(host, SUBJECTS[:1], STYLES[:1], PATTERN, SUMS, "refuse")
    assert "is already there" in planned[0].problem
    assert planned[0].where == "output"

    planned = plan(host, SUBJECTS[:1], STYLES[:1], PATTERN, {**SUMS, "seed": 1}, "overwrite")
    assert states(run_many(planned, host)) == {"cat-ink": "done"}
    assert (folder / "cat-ink.safetensors").read_bytes() != kept


def test_what_cannot_be_asked_is_refused_at_once(host, folder):
    with pytest.raises(BadInput, match="lr"):
        plan(host, SUBJECTS, STYLES, PATTERN, {**TINY, "lr": 7})
    with pytest.raises(BadInput, match="nonsense"):
        plan(host, SUBJECTS, STYLES, PATTERN, TINY, "nonsense")
    far = plan(host, [Chosen("cat", "p", 9.0), Chosen("cat", "x" * 3000), Chosen("owl")], STYLES[:1], "{date}", TINY)
    assert [one.where for one in far[:2]] == ["output", "output"]  # they also have one name
    pairs = [Pair(Chosen("cat", "p", 9.0), STYLES[0], "a"), Pair(Chosen("cat", "x" * 3000), STYLES[0], "b"),
             Pair(Chosen("owl"), STYLES[0], "c"), Pair(Chosen("cat"), STYLES[0], "a/b")]  # fmt: skip
    planned = drafted(pairs, PATTERN, TINY, "skip", host.peek, host.destination)
    assert [one.where for one in planned] == ["subject_strength", "subject_prompt", "subject", "output"]
    assert planned[0].problem.startswith("the subject's strength: ")


def test_a_lora_that_names_no_words_needs_a_prompt(host, folder):
    save_file(load_file(folder / "cat.safetensors"), folder / "cat.safetensors")
    (none,) = plan(host, SUBJECTS[:1], STYLES[:1], PATTERN, TINY)
    assert none.where == "subject_prompt"
    assert "names no trigger words" in none.problem
    assert plan(host, [Chosen("cat", "a cat")], STYLES[:1], PATTERN, TINY)[0].to_do
    assert plan(host, SUBJECTS[:1], STYLES[:1], PATTERN, {**TINY, "method": "direct"})[0].to_do


def outcome(subject, style, state="done", colour=None):
    picture = colour and Image.new("RGB", (80, 80), colour)
    return Outcome(f"{subject}-{style}", subject, style, state, picture=picture)


def test_the_contact_sheet_has_a_row_a_subject_and_a_column_a_style():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    batch = Batch([outcome("a", "x", colour=red), outcome("a", "y", "failed"), outcome("b", "x", colour=green),
                   outcome("b", "y", colour=blue)])  # fmt: skip
    sheet = batch.sheet()
    left, top = sheet.width - 2 * 82, sheet.height - 2 * 82
    middles = [[sheet.getpixel((left + c * 82 + 40, top + r * 82 + 70)) for c in range(2)] for r in range(2)]
    assert middles[0][0] == red
    assert middles[1] == [green, blue]
    assert len(set(middles[0][1])) == 1  # grey, without a picture
    assert left > 0
    assert top > 0
    words = np.asarray(sheet.crop((left + 82, top, left + 162, top + 60)))
    assert words.min() < words.max()
    assert Batch([outcome("a", "x", "failed")]).sheet() is None


def test_a_contact_sheet_of_many_long_names_stays_small():
    names = [f"{'名' * 40}-{i}" for i in range(40)]
    sheet = Batch([outcome(s, t, colour=(9, 9, 9)) for s in names for t in names]).sheet()
    assert max(sheet.size) < 9000


def test_the_report_as_csv_and_json():
    batch = Batch([outcome('a "b", c', "é"), outcome("a", "x", "failed")])
    rows = list(csv.DictReader(io.StringIO(batch.csv())))
    assert [row["name"] for row in rows] == ['a "b", c-é', "a-x"]
    assert [row["state"] for row in rows] == ["done", "failed"]
    told = json.loads(json.dumps(batch.public()))
    assert [one["subject"] for one in told["outcomes"]] == ['a "b", c', "a"]
    assert told["counted"] == "1 done, 1 failed"


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def zipping(shelf, tmp_path):
    """zipping(text, *more): the arguments of a small `zip-many` of this list, which lies beside the shelf's files."""
    (tmp_path / "out").mkdir()
    for file in shelf.iterdir():
        shutil.copy(file, tmp_path)

    def arguments(text, *more):
        pairs = tmp_path / "pairs.csv"
        pairs.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["zip-many", pairs, "--out-folder", tmp_path / "out", *FLAGS, *more]

    return arguments


LIST = """subject,style,subject_prompt,style_prompt,output,subject_strength
cat.safetensors,ink.safetensors,"a cat, sitting",,first,0.8

dog.safetensors,ink.safetensors,,an ink drawing,,
"""


def test_the_command_merges_a_list(cli, zipping, tmp_path):
    report, out = tmp_path / "report.json", tmp_path / "out"
    status, said, err = cli(*zipping(LIST, "--report", report))
    assert status == 0, err
    assert "done: first  <lora:first:1>" in said
    assert "done: dog-ink  <lora:dog-ink:1>" in said
    recipe = json.loads(read(out / "first.safetensors").metadata["ziplora.recipe"])
    assert [(p["prompt"], p["strength"]) for p in recipe["parents"]] == [
        ("a cat, sitting", 0.8),
        ("a picture of ink", 1),
    ]
    assert {file.name for file in out.iterdir()} == {
        "contact-sheet.png", *(f"{name}.{kind}" for name in ("first", "dog-ink") for kind in ("safetensors", "json", "png"))
    }  # fmt: skip
    assert Image.open(out / "contact-sheet.png").height > 2 * 64
    assert [one["state"] for one in json.loads(report.read_text())["outcomes"]] == ["done", "done"]

    status, said, err = cli(*zipping(LIST))
    assert status == 2
    assert "line 2, column output: first.json" in err
    status, said, err = cli(*zipping(LIST, "--skip-existing"))
    assert status == 0, err
    assert "2 pairs: 2 skipped" in said


def test_the_command_lists_what_failed(cli, zipping, tmp_path):
    spoiled(tmp_path / "dog.safetensors")
    status, said, _ = cli(*zipping(LIST, "--method", "direct"))
    assert status == 1
    assert "done: first" in said
    assert "refused: dog-ink  dog.safetensors: " in said
    assert (tmp_path / "out" / "contact-sheet.png").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "line 1, column subject: is missing"),
        ("subject,subject_prompt\ncat.safetensors,x\n", "line 1, column style: is missing"),
        ("subject,style,colour\n", "line 1, column 'colour': is not a column that is known"),
        ("subject,style,style\n", "line 1, column 'style': stands there twice"),
        ("subject,style\n", "has no pair"),
        ("subject,style\ncat.safetensors,ink.safetensors,more\n", "line 2: 3 cells for 2 columns"),
        ("subject,style\ncat.safetensors,ink.safetensors\n\ndog.safetensors,\n", "line 4, column style: is empty"),
        ("subject,style\nowl.safetensors,ink.safetensors\n", "owl.safetensors: there is no such file"),
        ("subject,style\ncat.safetensors,pairs.csv\n", "line 2, column style: pairs.csv: "),
        ("subject,style,subject_strength\ncat.safetensors,ink.safetensors,much\n", "column subject_strength: 'much'"),
        ("subject,style,style_strength\ncat.safetensors,ink.safetensors,9\n", "line 2, column style_strength: the style's"),
        ("subject,style,output\ncat.safetensors,ink.safetensors,a/b\n", "line 2, column output: output name 'a/b'"),
        ("subject,style,output\ncat.safetensors,ink.safetensors,Contact-Sheet\n", "line 2, column output: contact-sheet"),
        ('subject,style,subject_prompt\ncat.safetensors,ink.safetensors,"a\nb"\ndog.safetensors,x,\n', "line 4, col"),
        ('subject,style\ncat.safetensors,"ink.safetensors\n', "line 2: is not CSV"),
        ("subject,style,output\n" + 2 * "cat.safetensors,ink.safetensors,x\n", "line 2, column output: 2 pairs would be"),
        (b"subject,style\n\xff\xfe,x\n", "is not text in UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_bad_rows_are_refused_before_any_model_is_loaded(cli, zipping, tmp_path, text, word):
    status, said, err = cli(*zipping(text, "--model", "no-such-model"))
    assert (status, said) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert "pairs.csv: " in err
    assert word in err
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_flags_are_refused(cli, zipping, tmp_path):
    for more, word in (
        (["--lr", "7"], "lr"),
        (["--overwrite", "--skip-existing"], "either --overwrite or --skip-existing"),
        (["--name", "{colour}"], "name pattern"),
        (["--report", tmp_path / "out" / "first.json"], "the LoRA's own card".replace("the", "a")),
        (["--report", tmp_path / "nowhere" / "report.json"], "does not exist"),
        (["--out-folder", tmp_path / "nowhere"], "does not exist"),
    ):
        status, _, err = cli(*zipping(LIST, "--model", "no-such-model", *more))
        assert status == 2
        assert word in err


def test_a_list_from_a_spreadsheet(cli, zipping, tmp_path):
    text = "\ufeffsubject;style;output\r\ncat.safetensors;ink.safetensors;first\r\n"
    status, said, err = cli(*zipping(text, "--method", "direct"))
    assert status == 0, err
    assert "done: first" in said


def test_ctrl_c_keeps_what_is_finished(zipping, tmp_path):
    command = [sys.executable, "-m", "ziplora_lib", *map(str, zipping(LIST))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    seen = ""
    while "2 of 2: dog-ink: " not in seen:
        letter = process.stderr.read(1)
        assert letter, f"ended with {process.wait()}: {seen}"
        seen += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "done: first" in out
    assert (tmp_path / "out" / "first.safetensors").exists()
    assert not list((tmp_path / "out").glob(".*"))


# --- the tab ----------------------------------------------------------------------------------------------------


@pytest.fixture
def section(host, folder):
    """The section Many over the shelf, and what its page holds: (many, values(**changed))."""
    gr = pytest.importorskip("gradio")
    from ziplora_lib.tab.controls import ADVANCED, control
    from ziplora_lib.tab.many import build
    from ziplora_lib.tab.place import Place
    from ziplora_lib.tab.running import Runner

    jobs = {}
    place = Place(host, jobs, Runner(host, jobs))
    with gr.Blocks():
        place.runner.area()
        fields = ["output", "steps", "seed", *(field for group in ADVANCED.values() for field in group)]
        settings = {field: control(field, host) for field in fields}
        many = build(place, settings)
        place.runner.connect()

    def values(subjects=("cat", "dog"), styles=("ink", "oil"), prompts="", names=PATTERN, existing="skip", **changed):
        held = {field: component.value for field, component in many.settings.items()} | SUMS | changed
        return [list(subjects), list(styles), prompts, names, existing, *held.values()]

    return many, values


def test_the_page_shows_the_plan_as_it_changes(section, folder):
    many, values = section
    assert many.looked_at(*values(subjects=())) == ""
    (folder / "oil.safetensors").write_bytes(b"")
    told = many.looked_at(*values(prompts="cat: a <b>red</b> cat"))
    assert "4 pairs: 2 to zip, 2 cannot be done." in told
    assert "a &lt;b&gt;red&lt;/b&gt; cat”, as given" in told
    assert "“a picture of ink”, trigger phrase in the file" in told
    assert "ink (LoRA, rank 2): “a" in told
    assert told.count("<td class='error'>oil.safetensors: ") == 2
    assert "Learning rate: " in many.looked_at(*values(lr=7))
    assert "Prompts, line 1: " in many.looked_at(*values(prompts="cow: a cow"))
    assert "the name pattern" in many.looked_at(*values(names="{colour}"))


def test_a_long_plan_shows_what_is_wrong_first(section):
    many, values = section
    told = many.looked_at(*values([f"cat-{i}" for i in range(20)] + ["cat"], [f"ink-{i}" for i in range(20)] + ["ink"]))
    assert told.count("<tr>") == 201
    assert "… and 241 pairs more" in told
    assert "cat-ink</th>" not in told
    assert "1 to zip" in told


def test_zip_all_on_the_page(section, host, folder):
    many, values = section
    (folder / "oil.safetensors").write_bytes(b"")
    job = many.zipping(*values())
    assert (job.kind, job.title) == ("many", "2 pairs")
    job.run(host)
    table, sheet, files, unfinished, _, *pickers = many.batch_shown(job)
    assert not unfinished["visible"]
    assert job.state == "done"
    assert "<td class='error'>oil.safetensors: " in table
    assert "2 done, 2 refused" in table.replace("2 refused, 2 done", "2 done, 2 refused")
    assert sheet["visible"]
    csv_file, json_file = map(Path, files["value"])
    assert len(list(csv.DictReader(io.StringIO(csv_file.read_text("utf-8-sig"))))) == 4
    assert json.loads(json_file.read_text())["outcomes"][0]["tag"] == "<lora:cat-ink:1>"
    assert all("cat-ink" in picker["choices"] for picker in pickers)
    assert json.dumps(job.public())

    many.place.jobs[job.id] = job
    assert "by the merges before" in many.looked_at(*values(existing="overwrite"))
    with pytest.raises(BadInput, match=r"none of the 4 pairs is left to zip \(oil"):
        many.zipping(*values())


def test_a_plan_that_is_stopped_says_what_it_did_not_look_at(section, host):
    from ziplora_lib.tab.running import live

    many, values = section
    job = many.planning(*values())
    job.run(host, lambda info: info["step"] == 1)
    (told,) = many.plan_shown(job)
    assert "3 were not looked at yet" in told
    job = many.planning(*values())
    job.run(host)
    assert "The new files will have" in many.plan_shown(job)[0]
    job = many.zipping(*values())
    seen = []
    job.run(host, lambda info: seen.append(live(job)))
    assert any("<tr><th scope='row'>cat-oil</th><td>at work</td>" in text and "<td>done</td>" in text for text in seen)
