"""`evaluate`: the list of pairs, the scores by CLIP and DINO, joint success, the table and the report.

CLIP and DINO are small stand-ins with random weights, saved as their originals are and loaded by the same code.
"""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.reader import read

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from ziplora_lib.evaluation import scoring  # noqa: E402
from ziplora_lib.evaluation.pairs import ROWS, Pair, read_pairs  # noqa: E402

SIDE = 64
SMALL = ["--model", "miniature", "--device", "cpu", "--resolution", str(SIDE), "--sampler-steps", "2", "--steps", "2",
         "--pictures", "1", "--samples", "2", "--at-once", "8", "--seeds", "5", "6"]  # fmt: skip
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])


def noise(seed, side=SIDE):
    """A picture of large coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(side // 8, 0).repeat(side // 8, 1))


def awake(model):
    """Fixed weights, large enough that different inputs get different embeddings."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "class_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from ziplora_lib.hosts.miniature import _text_config, _tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("clip"), _tokenizer("<|endoftext|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=_text_config(32, "quick_gelu", tokenizer).to_dict(),
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    awake(transformers.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # as the originals on the hub have it, from before transformers 5
    settings = {"crop_size": 32, "size": 32, "do_center_crop": True, "do_resize": True, "do_normalize": True,
                "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": MEAN.tolist(), "image_std": STD.tolist()}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    # DINO's files have no pooler
    awake(transformers.ViTModel(config, add_pooling_layer=False)).save_pretrained(folder)
    settings = {"size": 32, "do_resize": True, "do_normalize": True, "resample": 3,
                "feature_extractor_type": "ViTFeatureExtractor",
                "image_mean": MEAN.tolist(), "image_std": STD.tolist()}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    from ziplora_lib.evaluation.encoders import Clip

    return Clip(str(clip_folder))


@pytest.fixture(scope="module")
def dino(dino_folder):
    from ziplora_lib.evaluation.encoders import Dino

    return Dino(str(dino_folder))


def by_hand(picture):
    """A picture of 32 pixels as both models take it, (1, 3, 32, 32)."""
    pixels = (np.asarray(picture) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]


def cosine(a, b):
    a, b = (np.asarray(v.detach(), dtype=float).ravel() for v in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# the encoders


def test_cosines_are_those_worked_out_by_hand(clip, dino, clip_folder, dino_folder):
    one, other, text = noise(1, 32), noise(2, 32), "a sks dog in szn style"
    a, b = clip.pictures([one, other])
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    ids = torch.tensor([transformers.CLIPTokenizer.from_pretrained(clip_folder)(text)["input_ids"]])
    whole = model(input_ids=ids, pixel_values=torch.cat([by_hand(one), by_hand(other)]))
    wanted = cosine(whole.image_embeds[0], whole.image_embeds[1])
    assert wanted < 0.95
    assert float(a @ b) == pytest.approx(wanted, abs=1e-5)
    assert float(a @ clip.texts([text])[0]) == pytest.approx(
        cosine(whole.image_embeds[0], whole.text_embeds[0]), abs=1e-5
    )
    a, b = dino.pictures([one, other])
    model = transformers.ViTModel.from_pretrained(dino_folder).eval()
    states = [model(pixel_values=by_hand(picture)).last_hidden_state[:, 0] for picture in (one, other)]
    wanted = cosine(*states)
    assert wanted < 0.95
    assert float(a @ b) == pytest.approx(wanted, abs=1e-5)


def test_embeddings_have_length_1_and_know_no_batch(clip, dino):
    pictures = [noise(seed) for seed in range(3)]
    for encoder in (clip, dino):
        together = encoder.pictures(pictures)
        assert together.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-6)
        assert torch.allclose(together, torch.cat([encoder.pictures([p]) for p in pictures]), atol=1e-5)
    texts = ["a dog", "a red house in szn style"]
    assert torch.allclose(clip.texts(texts), torch.cat([clip.texts([t]) for t in texts]), atol=1e-6)


def test_a_text_too_long_for_clip_is_cut(clip):
    assert clip.texts(["dog " * 500]).shape == (1, 16)


@pytest.mark.parametrize("which", ["clip", "dino"])
def test_what_cannot_be_loaded_is_refused(which, tmp_path, clip_folder, dino_folder):
    from ziplora_lib.evaluation.encoders import Clip, Dino

    kind, own, other = (Clip, clip_folder, dino_folder) if which == "clip" else (Dino, dino_folder, clip_folder)
    for name in ("/nowhere/model", "nobody/nothing", str(tmp_path)):
        with pytest.raises(BadInput, match="cannot be loaded") as error:
            kind(name)
        assert error.value.file == name
        assert error.value.remedy
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=f"no {which.upper()}"):
        kind(str(other))
    # a file without some weights: transformers would put random ones there, and say nothing here
    from safetensors.torch import load_file, save_file

    for path in own.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(own / "model.safetensors")
    lost = next(name for name in tensors if "layers.1" in name or "layer.1" in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="lacks 1 of its weights"):
        kind(str(tmp_path))


# the scores of one pair


@pytest.fixture(scope="module")
def world(tmp_path_factory, pair_files):
    """A list of one pair beside its files: two subject pictures in a folder, one style picture."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "dog").mkdir()
    noise(1).save(folder / "dog" / "1.png")
    noise(2).save(folder / "dog" / "2.png")
    noise(3).save(folder / "ink.png")
    for name, path in zip(("subject", "style"), pair_files):
        (folder / f"{name}.safetensors").write_bytes(path.read_bytes())
    return folder


def entry(**changed):
    """A pair as a list has it; None takes a field out."""
    fields = {
        "subject": "subject.safetensors", "style": "style.safetensors",
        "subject_prompt": "a photo of sks cat", "style_prompt": "a house in szn style",
        "prompts": ["a sks cat in szn style", "a sks cat by the sea in szn style"],
        "subject_pictures": "dog", "style_pictures": "ink.png", **changed,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def listed(folder, *pairs, name="pairs.json"):
    path = folder / name
    path.write_text(json.dumps(pairs or [entry()]))
    return path


def test_a_picture_is_judged_by_the_mean_of_its_cosines_to_each_reference(world, clip, dino):
    from ziplora_lib.evaluation.run import _Judge

    [pair] = read_pairs(listed(world))
    judge = _Judge(pair, clip, dino, SIDE)
    assert judge.references == {"subject": 2, "style": 1}
    scores = judge(noise(3), "a dog")
    assert scores["style"] == pytest.approx(1, abs=1e-6)  # it is the style picture
    one, other, mine = (dino.pictures([noise(seed)])[0] for seed in (1, 2, 3))
    assert scores["subject"] == pytest.approx(float(mine @ one + mine @ other) / 2, abs=1e-6)
    assert scores["text"] == pytest.approx(cosine(clip.pictures([noise(3)]), clip.texts(["a dog"])), abs=1e-6)
    # against two references a copy of one of them is judged against the other too
    between = float(one @ other)
    assert judge(noise(1), "a dog")["subject"] == pytest.approx((1 + between) / 2, abs=1e-6)


def test_references_are_cropped_to_their_middle_square(world, clip, dino, tmp_path):
    from ziplora_lib.evaluation.run import _Judge

    wide = Image.new("RGB", (3 * SIDE, SIDE), "red")
    wide.paste(noise(7), (SIDE, 0))
    wide.save(tmp_path / "wide.png")
    path = str(tmp_path / "wide.png")
    [pair] = read_pairs(listed(world, entry(subject_pictures=path, style_pictures=path)))
    scores = _Judge(pair, clip, dino, SIDE)(noise(7), "a dog")
    assert (scores["subject"], scores["style"]) == pytest.approx((1, 1), abs=1e-6)


def test_harmonic_mean():
    assert scoring.harmonic_mean(0.3, 0.6) == pytest.approx(0.4)
    assert scoring.harmonic_mean(0.5, 0.5) == pytest.approx(0.5)
    assert scoring.harmonic_mean(0.0, 1.0) == scoring.harmonic_mean(-0.1, 0.9) == scoring.harmonic_mean(0.9, -0.1) == 0
    assert scoring.harmonic_mean(-0.1, 0.1) == 0


def test_threshold():
    assert scoring.threshold(0.2, 0.6, 0.5) == pytest.approx(0.4)
    assert scoring.threshold(0.2, 0.6, 1.0) == pytest.approx(0.6)
    assert scoring.threshold(0.6, 0.6, 0.5) is scoring.threshold(0.7, 0.6, 0.5) is None


def pictures(*scores):
    return [{"subject": subject, "style": style, "text": 0.25} for subject, style in scores]


def judged_rows(share=0.5):
    rows = {
        "subject alone": pictures((0.8, 0.4), (0.6, 0.6)),  # style without its LoRA: 0.5
        "style alone": pictures((0.1, 0.9), (0.3, 0.7)),  # subject without its LoRA: 0.2
        "plain sum": pictures((0.6, 0.4), (0.1, 0.8)),
        "zip": pictures((0.4, 0.7), (0.39, 0.9)),
    }
    own = {"subject": [0.5, 0.7], "style": [0.9]}
    return rows, scoring.judged(rows, own, {"subject": share, "style": share})


def test_joint_success_asks_for_both_in_one_picture():
    rows, thresholds = judged_rows()
    assert thresholds == pytest.approx({"subject": 0.4, "style": 0.7})
    assert {row: [p["success"] for p in told] for row, told in rows.items()} == {
        "subject alone": [0, 0], "style alone": [0, 0], "plain sum": [0, 0], "zip": [1, 0],
    }  # fmt: skip
    assert rows["zip"][0]["harmonic"] == pytest.approx(2 * 0.4 * 0.7 / 1.1)
    rows, thresholds = judged_rows(share=1.0)
    assert thresholds == pytest.approx({"subject": 0.6, "style": 0.9})
    assert not any(p["success"] for p in rows["zip"])


def test_where_a_lora_adds_nothing_joint_success_is_not_told():
    rows, _ = judged_rows()
    thresholds = scoring.judged(rows, {"subject": [0.2], "style": [0.9]}, {"subject": 0.5, "style": 0.5})
    assert thresholds["subject"] is None
    assert {p["success"] for told in rows.values() for p in told} == {None}


def results(*shifts):
    """Pairs whose "zip" row is that much better than the plain sum, and which differ far more from each other."""
    made = []
    for k, shift in enumerate(shifts):
        rows = {row: pictures(*[(0.1 * k + 0.01 * i, 0.3)] * 2) for i, row in enumerate(ROWS)}
        rows["zip"] = pictures((0.1 * k + 0.02 + shift - 0.01, 0.3), (0.1 * k + 0.02 + shift + 0.01, 0.3))
        own = {"subject": [0.9 + 0.1 * k], "style": [0.8, 0.6]}
        thresholds = scoring.judged(rows, own, {"subject": 0.5, "style": 0.5})
        own_prompt = {role: [{"seed": s, role: v} for s, v in enumerate(values)] for role, values in own.items()}
        made.append({"name": f"pair {k}", "own_prompt": own_prompt, "thresholds": thresholds, "rows": rows})
    return made


def test_the_summary_counts_each_pair_once_and_compares_on_the_same_pairs():
    from ziplora_lib.bootstrap import interval

    made = results(0.05, 0.07, 0.03)
    made[0]["rows"]["zip"] *= 3  # more pictures of a pair do not give it more weight
    table = scoring.summary(made)
    zipped = table["zip"]["subject"]
    assert zipped["mean"] == pytest.approx(np.mean([0.07, 0.19, 0.25]))
    assert zipped["difference"] == pytest.approx(0.05)
    assert zipped["interval"] == pytest.approx(list(interval([0.05, 0.07, 0.03])))
    assert zipped["pairs"] == 3
    assert table["plain sum"]["subject"] == {
        "mean": pytest.approx(0.12), "pairs": 3, "difference": None, "interval": None,
    }  # fmt: skip
    assert table["own prompt"]["style"]["mean"] == pytest.approx(0.7)
    assert table["own prompt"].keys() == {"style", "subject"}
    assert table["zip"]["text"]["difference"] == 0
    assert list(table) == ["own prompt", *ROWS, "zip"]


def test_pairs_without_thresholds_count_in_all_but_the_joint_success():
    made = results(0.05, 0.07, 0.03)
    for told in made[1]["rows"].values():
        for picture in told:
            picture["success"] = None
    made[1]["thresholds"]["subject"] = None
    table = scoring.summary(made)
    assert table["zip"]["success"]["pairs"] == 2
    assert table["zip"]["style"]["pairs"] == 3
    shown = scoring.text({"pairs": made, "summary": table, "shares": {"subject": 0.5, "style": 0.25}})
    assert "Not in the joint success: pair 1" in shown
    assert "at least 50% (subject) and 25% (style)" in shown


def test_the_table_says_over_how_many_pairs():
    shares = {"subject": 0.5, "style": 0.5}
    made = results(0.05, 0.07, 0.03)
    shown = scoring.text({"pairs": made, "summary": scoring.summary(made), "shares": shares})
    assert "95% bootstrap interval, over 3 pairs" in shown
    assert "too narrow with so few" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("zip")]
    assert "0.170 (+0.030, +0.070)" in line
    [one] = results(0.05)
    table = scoring.summary([one])
    assert table["zip"]["subject"]["interval"] is None
    shown = scoring.text({"pairs": [one], "summary": table, "shares": shares})
    assert "no interval" in shown
    assert "(+" not in shown


# the list of pairs


def test_a_list_is_read_with_names_and_paths(world, tmp_path):
    (world / "sub").mkdir(exist_ok=True)
    up = {f: f"../{entry()[f]}" for f in ("subject", "style", "subject_pictures", "style_pictures")}
    [pair] = read_pairs(listed(world / "sub", entry(**up, merged={"sum": str(world / "style.safetensors")})))
    assert pair.name == "subject-style"
    assert read(pair_path := world / "sub" / up["subject"]).hash == read(world / "subject.safetensors").hash
    assert pair.subject == str(pair_path)
    assert pair.merged == {"sum": str(world / "style.safetensors")}
    named = read_pairs(listed(world, entry(), entry(name="again")))
    assert [pair.name for pair in named] == ["subject-style", "again"]


def test_the_readme_shows_every_field():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [shown] = [json.loads(block.split("```")[0]) for block in text.split("```json\n")[1:]]
    assert {*shown[0]} == {*Pair.__fields__}
    assert Pair.parse_obj(shown[0]).merged


BAD_PAIRS = {
    "no pairs": ([], None, "at least 1"),
    "no list": ({"pairs": []}, None, "list"),
    "no pair": (["dog"], "0", "dict"),
    "unknown field": ([entry(promts=["x"])], "0.promts", "no such field"),
    "missing field": ([entry(style_prompt=None)], "0.style_prompt", "required"),
    "missing pictures": ([entry(), entry(name="b", subject_pictures=None)], "1.subject_pictures", "required"),
    "no prompts": ([entry(prompts=[])], "0.prompts", "at least 1"),
    "one prompt as text": ([entry(prompts="a dog")], "0.prompts", "list"),
    "blank prompt": ([entry(prompts=["a dog", " "])], "0.prompts", "empty"),
    "blank own prompt": ([entry(subject_prompt=" ")], "0.subject_prompt", "empty"),
    "no such folder": ([entry(subject_pictures="cat")], "0.subject_pictures", "does not exist"),
    "bad name": ([entry(name="a/b")], "0.name", "character"),
    "same names": ([entry(), entry()], "1.name", "two pairs"),
    "taken row": ([entry(merged={"plain sum": "style.safetensors"})], "0.merged", "name"),
    "other rows": ([entry(merged={"x": "style.safetensors"}), entry(name="b")], "1.merged", "other rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_lists_are_refused_with_file_and_key(world, case):
    content, key, word = BAD_PAIRS[case]
    path = world / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=word) as error:
        read_pairs(path)
    assert error.value.file == str(path)
    assert error.value.key == key
    assert error.value.remedy


def test_bad_files_are_refused_by_their_own_name(world, tmp_path):
    (world / "empty").mkdir(exist_ok=True)
    (world / "text.png").write_text("no picture")
    (world / "text.safetensors").write_text("no LoRA")
    for changed, name in (
        ({"subject": "no.safetensors"}, "no.safetensors"),
        ({"style": "text.safetensors"}, "text.safetensors"),
        ({"merged": {"x": "no.safetensors"}}, "no.safetensors"),
        ({"subject_pictures": "empty"}, "empty"),
        ({"style_pictures": "text.png"}, "text.png"),
    ):
        with pytest.raises(BadInput) as error:
            read_pairs(listed(world, entry(**changed), name="bad.json"))
        assert name in error.value.file
        assert error.value.remedy
    for path, word in ((tmp_path / "no.json", "cannot be read"), (world / "text.png", "is not JSON")):
        with pytest.raises(BadInput, match=word):
            read_pairs(path)
    (world / "broken.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not JSON"):
        read_pairs(world / "broken.json")


# the command


def command(*arguments):
    """(status, stdout, stderr) of `evaluate`, in this process."""
    from ziplora_lib.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["evaluate", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def encoders(clip_folder, dino_folder):
    return ["--clip", clip_folder, "--dino", dino_folder]


@pytest.fixture(scope="module")
def finished(world, encoders, tmp_path_factory):
    """One pair by ziplora, its merged LoRA kept: (folder with report.json and the sheet, stdout)."""
    folder = tmp_path_factory.mktemp("results")
    status, out, err = command(
        listed(world), *SMALL, *encoders, "--method", "ziplora", "--json", folder / "report.json", "--grids", folder,
        "--zipped", folder,
    )  # fmt: skip
    assert status == 0, err
    return folder, out


def test_the_scores_are_those_of_the_pictures_that_a_zip_would_show(finished, world, host, recipe_of, clip, dino):
    from ziplora_lib.comparison import comparison
    from ziplora_lib.evaluation.run import _Judge

    folder, _ = finished
    told = json.loads((folder / "report.json").read_text())["pairs"][0]
    [pair] = read_pairs(listed(world))
    judge = _Judge(pair, clip, dino, SIDE)
    for prompt in pair.prompts:
        recipe = recipe_of(preview_prompt=prompt)
        rows = comparison(recipe, folder / "subject-style-ziplora.safetensors", host, [5, 6]).rows
        for row, drawn in zip((*ROWS, "ziplora"), rows[1:]):
            scores = [
                {k: p[k] for k in ("style", "subject", "text")} for p in told["rows"][row] if p["prompt"] == prompt
            ]
            assert scores == [pytest.approx(judge(picture, prompt), abs=1e-6) for picture in drawn]
    # each LoRA alone on its own prompt
    for i, (role, prompt) in enumerate((("subject", "a photo of sks cat"), ("style", "a house in szn style"))):
        rows = comparison(
            recipe_of(preview_prompt=prompt), folder / "subject-style-ziplora.safetensors", host, [5, 6]
        ).rows
        scores = [judge(picture, prompt)[role] for picture in rows[1 + i]]
        assert [p[role] for p in told["own_prompt"][role]] == pytest.approx(scores, abs=1e-6)


def test_a_picture_that_is_the_reference_scores_one_and_sets_the_threshold(
    finished, world, host, recipe_of, encoders, tmp_path
):
    from ziplora_lib.comparison import comparison

    folder, _ = finished
    merged = folder / "subject-style-ziplora.safetensors"
    for i, prompt in enumerate((entry()["subject_prompt"], entry()["style_prompt"])):
        drawn = comparison(recipe_of(preview_prompt=prompt), merged, host, [5]).rows
        drawn[1 + i][0].save(tmp_path / f"{i}.png")
    changed = {"subject_pictures": str(tmp_path / "0.png"), "style_pictures": str(tmp_path / "1.png")}
    path = listed(world, entry(**changed, merged={"zip": str(merged)}))
    arguments = [path, *SMALL, *encoders, "--subject-share", "0.01", "--style-share", "1"]
    status, out, err = command(*arguments, "--seeds", "5", "--json", tmp_path / "report.json")
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    [pair] = report["pairs"]
    assert [pair["own_prompt"][role][0][role] for role in ("subject", "style")] == pytest.approx([1, 1], abs=1e-6)
    without = np.mean([p["subject"] for p in pair["rows"]["style alone"]])
    assert pair["thresholds"] == pytest.approx({"subject": without + 0.01 * (1 - without), "style": 1}, abs=1e-6)
    # nothing but the style picture itself reaches the style's
    assert all(p["success"] == 0 for told in pair["rows"].values() for p in told)
    assert report["summary"]["zip"]["success"]["mean"] == 0
    assert "Not in the joint success" not in out


def test_the_report_has_everything(finished, world, clip_folder):
    folder, out = finished
    report = json.loads((folder / "report.json").read_text())
    assert {"ziplora", "python", "torch", "diffusers", "transformers", "numpy", "Pillow"} == report["versions"].keys()
    assert report["model"]["name"] == "miniature"
    assert report["clip"]["name"] == str(clip_folder)
    assert (report["seeds"], report["methods"]) == ([5, 6], ["ziplora"])
    assert report["shares"] == {"subject": 0.5, "style": 0.5}
    assert (report["settings"]["steps"], report["settings"]["start"], report["settings"]["resolution"]) == (
        2,
        1.0,
        SIDE,
    )
    assert report["listed_pairs"] == ["subject-style"]
    [pair] = report["pairs"]
    assert pair["subject"]["sha256"] == read(world / "subject.safetensors").hash
    assert pair["reference_pictures"] == {"subject": 2, "style": 1}
    assert pair["merged"]["ziplora"]["sha256"] == read(folder / "subject-style-ziplora.safetensors").hash
    assert pair["merged"]["ziplora"]["learned"]["error"]
    assert list(pair["rows"]) == [*ROWS, "ziplora"]
    for told in pair["rows"].values():
        assert [(p["prompt"], p["seed"]) for p in told] == [(p, s) for p in entry()["prompts"] for s in (5, 6)]
        for picture in told:
            assert picture["harmonic"] == scoring.harmonic_mean(picture["subject"], picture["style"])
            assert all(math.isfinite(picture[k]) and abs(picture[k]) <= 1.00001 for k in ("style", "subject", "text"))
    own = {role: [p[role] for p in told] for role, told in pair["own_prompt"].items()}
    assert pair["thresholds"] == scoring.judged(pair["rows"], own, report["shares"])
    assert report["summary"] == scoring.summary(report["pairs"])
    assert out == scoring.text(report) + "\n"
    for word in ("style CLIP-I", "subject DINO", "text CLIP-T", "plain sum", "ziplora", "One pair: no interval"):
        assert word in out
    # a sheet: four rows, two prompts with two seeds
    with Image.open(folder / "subject-style.png") as sheet:
        assert sheet.height > 4 * 256
        assert sheet.width > 4 * 256


def test_the_same_command_gives_the_same_report_and_leaves_no_file(finished, world, encoders, tmp_path):
    folder, _ = finished
    before = {f.name for f in world.rglob("*")}
    status, _, err = command(listed(world), *SMALL, *encoders, "--json", tmp_path / "report.json")
    assert status == 0, err
    assert (tmp_path / "report.json").read_bytes() == (folder / "report.json").read_bytes()
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]
    assert {f.name for f in world.rglob("*")} == before


def test_a_merged_file_is_a_row_and_nothing_is_zipped_then(finished, world, encoders, tmp_path):
    folder, _ = finished
    merged = folder / "subject-style-ziplora.safetensors"
    path = listed(world, entry(merged={"ready": str(merged)}))
    status, out, err = command(path, *SMALL, *encoders, "--json", tmp_path / "report.json")
    assert status == 0, err
    [again] = json.loads((tmp_path / "report.json").read_text())["pairs"]
    [pair] = json.loads((folder / "report.json").read_text())["pairs"]
    assert list(again["rows"]) == [*ROWS, "ready"]
    assert again["rows"]["ready"] == pair["rows"]["ziplora"]
    assert again["merged"] == {"ready": {"file": merged.name, "sha256": read(merged).hash}}
    assert "ready" in out


def test_the_subject_as_merged_file_scores_as_the_subject_alone(world, encoders, tmp_path):
    path = listed(world, entry(merged={"copy": "subject.safetensors"}, prompts=["a sks cat in szn style"]))
    status, _, err = command(path, *SMALL, *encoders, "--json", tmp_path / "report.json")
    assert status == 0, err
    [pair] = json.loads((tmp_path / "report.json").read_text())["pairs"]
    for copy, alone in zip(pair["rows"]["copy"], pair["rows"]["subject alone"]):
        assert copy == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--subject-share", "0"], "subject share"),
        (["--style-share", "nan"], "style share"),
        (["--seeds", "1", "1"], "seeds"),
        (["--seeds", "-1"], "seeds"),
        (["--method", "ziplora", "--method", "ziplora"], "twice"),
        (["--resolution", "100"], "resolution"),
        (["--clip", "/nowhere/clip"], "/nowhere/clip"),
        (["--dino", "/nowhere/dino"], "/nowhere/dino"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--device", "tpu9"], "tpu9"),
        (["--json", "/nowhere/report.json"], "/nowhere"),
        (["--json", "report.txt"], "not a .json"),
        (["--grids", "/nowhere/grids"], "--grids"),
        (["--zipped", "/nowhere/zipped"], "--zipped"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_settings_are_refused_in_one_line(world, encoders, more, word):
    status, out, err = command(listed(world), *SMALL, *encoders, *more)
    assert status == 2, err
    assert out == ""
    assert word in err
    assert len(err.splitlines()) == 1


def test_what_does_not_fit_is_refused_before_any_picture(world, encoders, tmp_path, finished):
    from loras import write_lora

    foreign = write_lora(
        tmp_path / "sd1.safetensors", {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 768)}
    )
    folder, _ = finished
    good = entry(merged={"x": "style.safetensors"})
    for pairs, more, word in (
        ([good, {**good, "name": "b", "style": str(foreign)}], [], "SD 1.5"),
        ([good, {**good, "name": "b", "merged": {"x": str(foreign)}}], [], "SD 1.5"),
        ([entry(style="subject.safetensors")], [], "same LoRA"),
        ([entry(merged={"ziplora": "style.safetensors"})], ["--method", "ziplora"], "two rows"),
        ([entry()], ["--zipped", folder], "already there"),
    ):
        report = tmp_path / "report.json"
        status, out, err = command(listed(world, *pairs), *SMALL, *encoders, *more, "--json", report)
        assert status == 2, err
        assert word in err
        assert (out, report.exists(), len(err.splitlines())) == ("", False, 1)


def test_results_do_not_take_the_place_of_the_list(world, encoders):
    path = listed(world)
    before = path.read_bytes()
    status, _, err = command(path, *SMALL, *encoders, "--json", path)
    assert status == 2
    assert "list of pairs itself" in err
    assert path.read_bytes() == before


def test_an_interrupt_keeps_the_pairs_that_are_done(world, encoders, tmp_path, monkeypatch):
    from ziplora_lib.evaluation import run

    evaluated, begun = run.evaluated, []

    def interrupted(pair, *rest):
        begun.append(pair.name)
        if len(begun) == 2:
            raise KeyboardInterrupt  # as Ctrl-C does, also where a signal would be ignored
        return evaluated(pair, *rest)

    monkeypatch.setattr(run, "evaluated", interrupted)
    one = entry(merged={"x": "style.safetensors"}, prompts=["a sks cat in szn style"])
    path = listed(world, one, {**one, "name": "second"})
    status, out, err = command(path, *SMALL, *encoders, "--json", tmp_path / "report.json")
    assert status == 130
    assert "stopped after 1 of 2 pairs" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [pair["name"] for pair in report["pairs"]] == ["subject-style"]
    assert report["listed_pairs"] == ["subject-style", "second"]
    assert out == scoring.text(report) + "\n"
