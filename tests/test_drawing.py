"""Pictures of a merged LoRA at other strengths, from the halves in its file: on the miniature, and from the command line."""

import json

import numpy as np
import pytest
from loras import write_lora
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_command_line import interrupted, refused

from ziplora_lib import job
from ziplora_lib.comparison import comparison
from ziplora_lib.drawing import MOST, Plan, along_balance, draw, over_strengths, recipe_of
from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.lora.bake import bake, split
from ziplora_lib.lora.reader import peek, read
from ziplora_lib.merge import balance
from ziplora_lib.opening import attached

PROMPT = "sks cat in szn style"


@pytest.fixture
def merged(host, recipe_of):
    """The pair, summed: its file in the host's folder."""
    job.run(recipe_of(method="direct", preview_prompt=PROMPT, seed=7, dtype="fp32"), host)
    return host.destination("merged")


@pytest.fixture
def of_three(host, pair_files, third_file, recipe_of_files):
    return recipe_of_files((pair_files[0], "subject"), (third_file, "subject"), (pair_files[1], "style"))


@pytest.fixture
def recipe_of_files(host, recipe_of):
    """recipe_of_files((file, role), …) -> the merged file."""

    def make(*cast):
        parents = [{"lora": str(file), "role": role, "prompt": f"a {file.stem}"} for file, role in cast]
        job.run(recipe_of(parents=parents, method="direct"), host)
        return host.destination("merged")

    return make


def prompted(host, path, seed=7):
    """The picture of a prompt with this LoRA's tag."""
    lora = read(path)
    with host.session(), host.embeddings([lora]), attached(lora, host):
        return host.decode(host.sample(PROMPT, seed, 64, 2, 5.0))


def sheet_of(host, path, *strengths, seed=7):
    """A row of pictures at these strengths, one a parent."""
    labels = [str(weights) for weights in strengths]
    plan = Plan(recipe_of_file(path), [[(list(weights), seed) for weights in strengths]], [""], labels)
    return draw(host, path.stem, plan)


def recipe_of_file(path, **given):
    return recipe_of(peek(path), **given)


def pixels(picture):
    return np.asarray(picture, dtype=int)


def test_as_learned_it_is_the_loras_own_picture_and_a_half_is_the_split_half(host, merged):
    halves = [host.folder / f"half-{i}.safetensors" for i in range(2)]
    split(merged, halves)
    whole, subject, style, none = sheet_of(host, merged, (1, 1), (1, 0), (0, 1), (0, 0)).rows[0]
    assert whole.tobytes() == prompted(host, merged).tobytes()
    # sums of another length can differ in the last bit
    for drawn, half in zip((subject, style), halves):
        assert np.abs(pixels(drawn) - pixels(prompted(host, half))).max() <= 1
    with host.session():
        assert none.tobytes() == host.decode(host.sample(PROMPT, 7, 64, 2, 5.0)).tobytes()
    assert len({picture.tobytes() for picture in (whole, subject, style, none)}) == 4


def test_other_strengths_are_those_of_a_baked_file(host, merged):
    baked = host.folder / "baked.safetensors"
    bake(merged, baked, [0.5, 1.3])
    [[drawn]] = sheet_of(host, merged, (0.5, 1.3)).rows
    assert np.abs(pixels(drawn) - pixels(prompted(host, baked))).max() <= 1
    assert drawn.tobytes() != prompted(host, merged).tobytes()


def test_the_strip_and_the_grid_share_their_middle(host, merged):
    lora, recipe = peek(merged), recipe_of_file(merged)
    strip = draw(host, "merged", along_balance(lora, recipe, [7], 3))
    assert strip.column_labels == ["more subject (1.20 : 0.75)", "as learned", "more style (0.70 : 1.15)"]
    assert [text for _, text in strip.pictures] == strip.column_labels
    assert strip.weights == [[balance.weights(point, ["subject", "style"]) for point in (-1, 0, 1)]]
    grid = draw(host, "merged", over_strengths(lora, recipe, [7], [0.6, 1.0], [0.7, 1.0, 1.15]))
    assert [len(row) for row in grid.rows] == [2, 2, 2]
    assert [text for _, text in grid.pictures] == [
        f"subject {x}, style {y}" for y in ("0.7", "1", "1.15") for x in ("0.6", "1")
    ]
    assert grid.weights == [[[0.6, y], [1.0, y]] for y in (0.7, 1.0, 1.15)]
    drawn = {text: picture.tobytes() for picture, text in grid.pictures}
    assert len(set(drawn.values())) == 6
    assert strip.rows[0][1].tobytes() == drawn["subject 1, style 1"] == prompted(host, merged).tobytes()
    assert json.loads(json.dumps(grid.public())) == grid.public()
    for sheet, rows, columns in ((strip, 1, 3), (grid, 3, 2)):
        assert sheet.whole.width >= columns * 64
        assert sheet.whole.height >= rows * 64


def test_every_seed_has_a_row(host, merged):
    lora, recipe = peek(merged), recipe_of_file(merged)
    strip = draw(host, "merged", along_balance(lora, recipe, [7, 8], 1))
    assert [row[0].tobytes() for row in strip.rows] == [prompted(host, merged, seed).tobytes() for seed in (7, 8)]
    assert [text for _, text in strip.pictures] == ["as learned, seed 7", "as learned, seed 8"]
    grid = over_strengths(lora, recipe, [7, 8], [1.0], [0.5, 1.0])
    assert grid.row_labels == ["style 0.5, seed 7", "style 1, seed 7", "style 0.5, seed 8", "style 1, seed 8"]
    assert [seed for row in grid.cells for _, seed in row] == [7, 7, 8, 8]


def test_several_of_a_role_share_their_strength(host, of_three):
    lora, recipe = peek(of_three), recipe_of_file(of_three)
    grid = over_strengths(lora, recipe, [1], [0.6], [1.2])
    assert grid.cells == [[([0.6, 0.6, 1.2], 1)]]
    assert along_balance(lora, recipe, [1], 3).cells[0][0] == ([1.2, 1.2, 0.75], 1)
    [[drawn]] = draw(host, "merged", grid).rows
    baked = host.folder / "baked.safetensors"
    bake(of_three, baked, [0.6, 0.6, 1.2])
    with host.session(), attached(read(baked), host):
        wanted = host.decode(host.sample(recipe.picture_prompt, 1, 64, 2, 5.0))
    assert np.abs(pixels(drawn) - pixels(wanted)).max() <= 2, "fp16 was rounded twice"


def test_of_one_role_the_first_stands_against_the_others(pair_files, third_file, recipe_of_files):
    path = recipe_of_files((pair_files[0], "style"), (third_file, "style"), (pair_files[1], "style"))
    plan = over_strengths(peek(path), recipe_of_file(path), [1], [0.6], [1.2])
    assert plan.cells == [[([0.6, 1.2, 1.2], 1)]]
    assert (plan.column_labels, plan.row_labels) == (["subject 0.6"], ["third and style 1.2"])  # these are their names


def test_what_is_not_said_is_as_the_file_has_it(host, merged):
    recipe = recipe_of_file(merged)
    assert (recipe.picture_prompt, recipe.picture_size) == (PROMPT, 64)
    assert (recipe.seed, recipe.sampler_steps, recipe.guidance) == (7, 2, 5.0)
    given = {"resolution": 128, "sampler_steps": 3, "guidance": 2.0, "seed": 9}
    recipe = recipe_of_file(merged, prompt="a hat", **given)
    assert (recipe.picture_prompt, recipe.picture_size) == ("a hat", 128)
    assert (recipe.seed, recipe.sampler_steps, recipe.guidance) == (9, 3, 2.0)
    assert recipe_of_file(merged, prompt="", resolution=None, seed=None) == recipe_of_file(merged)


def test_a_file_whose_recipe_cannot_be_read_tells_its_trigger_words(merged):
    """Another tool may have changed it; the parents' trigger words stand beside it."""
    with safe_open(merged, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    changed = merged.with_name("changed.safetensors")
    for said in ("nonsense", "[1]", "{}", '{"parents": 3}', '{"method": "of another version"}'):
        save_file(tensors, changed, {**metadata, "ziplora.recipe": said})
        assert recipe_of_file(changed).picture_prompt == "a photo of sks cat, a house in szn style"
        assert recipe_of_file(changed, prompt="a hat", resolution=64).picture_size == 64


def test_settings_that_cannot_be_are_refused(merged):
    for given, word in (
        ({"resolution": 100}, "resolution: must be a multiple of 64"),
        ({"resolution": 0}, "resolution"),
        ({"sampler_steps": 0}, "sampler_steps"),
        ({"guidance": 0.5}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"prompt": "x" * 2001}, "preview_prompt"),
    ):
        with pytest.raises(BadInput, match=word):
            recipe_of_file(merged, **given)


def test_sheets_that_cannot_be_are_refused(merged, pair_files):
    lora, recipe = peek(merged), recipe_of_file(merged)
    for points in (0, -1, MOST + 1):
        with pytest.raises(BadInput, match="no sheet"):
            along_balance(lora, recipe, [1], points)
    for first, second in (([], [1.0]), ([1.0], []), ([1.0] * (MOST + 1), [1.0]), ([1.0], [1.0] * (MOST + 1))):
        with pytest.raises(BadInput, match="no sheet"):
            over_strengths(lora, recipe, [1], first, second)
    for strength in (5.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="between -4 and 4"):
            over_strengths(lora, recipe, [1], [strength], [1.0])
    with pytest.raises(BadInput, match="seed -1"):
        along_balance(lora, recipe, [1, -1])
    wordless = recipe.copy(update={"preview_prompt": " "})
    with pytest.raises(BadInput, match="no prompt"):
        along_balance(lora, wordless, [1])
    with pytest.raises(BadInput, match="not made by ZipLoRA"):
        recipe_of(peek(pair_files[0]))


def test_a_half_has_no_balance(merged, host):
    halves = [host.folder / f"half-{i}.safetensors" for i in range(2)]
    split(merged, halves)
    with pytest.raises(BadInput, match="is one half of a merge"):
        recipe_of_file(halves[0])


def test_a_stop_keeps_what_was_drawn(host, merged):
    plan = over_strengths(peek(merged), recipe_of_file(merged), [7], [0.5, 1.0], [0.5, 1.0])
    told = []

    def stop_at(step):
        def callback(info):
            told.append(info)
            return info["phase"] == "draw" and info["step"] == step

        return callback

    sheet = draw(host, "merged", plan, stop_at(3))
    assert sheet.stopped
    assert [len(row) for row in sheet.rows] == [2, 1]
    assert [len(row) for row in sheet.weights] == [2, 1]
    assert [text for _, text in sheet.pictures] == [
        "subject 0.5, style 0.5",
        "subject 1, style 0.5",
        "subject 0.5, style 1",
    ]
    assert sheet.whole.height >= 2 * 64
    previews = [info for info in told if info["phase"] == "draw"]
    assert [(info["step"], info["steps"]) for info in previews] == [(k, 4) for k in range(4)]
    assert previews[3]["what"] == "drawing subject 1, style 1"
    with pytest.raises(Stopped):
        draw(host, "merged", plan, stop_at(0))
    with pytest.raises(Stopped):
        draw(host, "merged", plan, lambda info: True)


def test_one_for_another_model_is_refused_before_any_picture(host, tmp_path, recipe_of):
    """Merged for the miniature, it has layers that another model has not."""
    files = [
        write_lora(tmp_path / f"{name}.safetensors", {"lora_unet_input_blocks_4_1_proj_in": (64, 64)}, seed=i)
        for i, name in enumerate("ab")
    ]
    job.run(recipe_of(*files, method="direct"), host)
    path = host.destination("merged")
    with safe_open(path, framework="pt") as file:
        tensors = {name.replace("input_blocks_4_1", "input_blocks_99_1"): file.get_tensor(name) for name in file.keys()}
        save_file(tensors, path, file.metadata())
    plan = along_balance(peek(path), recipe_of_file(path), [1])
    told = []
    with pytest.raises(BadInput, match="none of its 1 layers"):
        draw(host, "merged", plan, lambda info: told.append(info["phase"]))
    assert "draw" not in told


def test_the_comparison_draws_a_prompt_of_its_own_and_can_be_stopped(host, merged, recipe_of):
    recipe, told = recipe_of(method="direct"), []
    sheet = comparison(recipe, merged, host, [7], told.append, PROMPT)
    assert sheet.prompt == PROMPT
    assert sheet.rows[-1][0].tobytes() == prompted(host, merged).tobytes()
    assert [text for _, text in sheet.pictures] == [f"seed 7, {label}" for label in sheet.row_labels]
    assert [info["step"] for info in told if info["phase"] == "draw"] == [0, 1, 2, 3, 4]
    stopped = comparison(recipe, merged, host, [7], lambda info: info["phase"] == "draw" and info["step"] == 2, PROMPT)
    assert stopped.stopped
    assert [row[0].tobytes() for row in stopped.rows] == [row[0].tobytes() for row in sheet.rows[:2]]
    with pytest.raises(Stopped):
        comparison(recipe, merged, host, [7], lambda info: True)


# --- from the command line ------------------------------------------------------------------------------------


@pytest.fixture
def stripping(merged):
    """stripping(*more, out=…): the arguments of a small `strip`."""

    def arguments(*more, file=merged, out=None):
        out = out or merged.with_name("strip.png")
        return ["strip", file, "--model", "miniature", "--device", "cpu", "--out", out, "--points", "3", *more]

    return arguments


def test_strip_writes_the_pictures_that_the_recipe_asks_for(cli, stripping, host, merged):
    status, out, err = cli(*stripping())
    assert status == 0, err
    assert out.splitlines() == [
        f"saved {merged.with_name('strip.png')}",
        "more subject (1.20 : 0.75)",
        "as learned",
        "more style (0.70 : 1.15)",
    ]
    sheet = draw(host, "merged", along_balance(peek(merged), recipe_of_file(merged), [7], 3)).whole
    with Image.open(merged.with_name("strip.png")) as written:
        assert written.tobytes() == sheet.tobytes()


def test_strip_takes_other_settings_and_several_seeds(cli, stripping, host, merged):
    more = ["--prompt", "a hat", "--seed", "3", "4", "--resolution", "128", "--sampler-steps", "1", "--guidance", "2"]
    status, out, err = cli(*stripping(*more))
    assert status == 0, err
    assert "as learned, seed 4" in out
    recipe = recipe_of_file(merged, prompt="a hat", resolution=128, sampler_steps=1, guidance=2.0)
    sheet = draw(host, "merged", along_balance(peek(merged), recipe, [3, 4], 3)).whole
    with Image.open(merged.with_name("strip.png")) as written:
        assert written.tobytes() == sheet.tobytes()


def test_what_strip_cannot_do_is_refused_in_one_line(cli, stripping, tmp_path):
    for more, word in (
        (["--points", "0"], "1 to 16"),
        (["--resolution", "100"], "multiple of 64"),
        (["--sampler-steps", "0"], "sampler_steps"),
        (["--guidance", "nan"], "guidance"),
        (["--seed", "-1"], "seed -1"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--device", "tpu9"], "tpu9"),
        (["--out", "strip.jpg"], "not a .png"),
        (["--out", "/nowhere/strip.png"], "/nowhere"),
    ):
        refused(cli, tmp_path, stripping(*more), word)


def test_strip_refuses_other_files_and_spares_the_preview(cli, stripping, tmp_path, pair_files, merged):
    refused(cli, tmp_path, stripping(file=pair_files[0]), "not made by ZipLoRA")
    refused(cli, tmp_path, stripping(file=tmp_path / "no.safetensors"), "no.safetensors")
    refused(cli, tmp_path, stripping(out=merged.with_suffix(".png")), "own preview")


def test_strip_checks_before_the_model_is_loaded(cli, stripping, tmp_path, pair_files):
    refused(cli, tmp_path, stripping("--model", "/nowhere", file=pair_files[0]), "not made by ZipLoRA")
    refused(cli, tmp_path, stripping("--model", "/nowhere", "--seed", "-1"), "seed -1")


def test_an_interrupted_strip_keeps_what_was_drawn(stripping, tmp_path, merged):
    status, out, err = interrupted(stripping("--points", "16", "--sampler-steps", "20"), "draw 2/16")
    assert status == 130, err
    assert "Traceback" not in err
    drawn = out.splitlines()[1:]
    assert 2 <= len(drawn) < 16
    with Image.open(tmp_path / "strip.png") as written:
        assert written.width >= len(drawn) * 64
