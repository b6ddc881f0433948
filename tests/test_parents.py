"""Merges of more than two LoRAs, and of two of a kind: a whole job on the miniature."""

import json

import pytest
import torch
from loras import dense_deltas

from ziplora_lib.errors import BadInput
from ziplora_lib.job import preflight, prepare, run
from ziplora_lib.lora.bake import split
from ziplora_lib.lora.keys import is_unet, layer_key
from ziplora_lib.lora.reader import read


def by_key(path):
    return {layer_key(name): delta for name, delta in dense_deltas(path).items()}


def parents(*files_and_roles):
    return [{"lora": str(file), "role": role, "prompt": f"a photo of {file.stem}"} for file, role in files_and_roles]


@pytest.fixture
def three(pair_files, third_file):
    """The style first: the recipe puts the subjects first."""
    return parents((pair_files[1], "style"), (pair_files[0], "subject"), (third_file, "subject"))


def test_every_column_of_three_is_a_combination_of_theirs(host, pair_files, third_file, three, recipe_of):
    result = run(recipe_of(parents=three, dtype="fp32", lr=0.02, steps=6, balance_points=3, objective="paper"), host)
    files = [pair_files[0], third_file, pair_files[1]]
    own, merged = [by_key(file) for file in files], by_key(host.destination("merged"))
    assert merged.keys() == set().union(*own)
    shared = [key for key in merged if is_unet(key) and all(key in deltas for deltas in own)]
    assert len(shared) > 20
    learned = []
    for key in shared:
        delta = merged[key].flatten(1).T  # (columns, out)
        basis = torch.stack([deltas[key].reshape(merged[key].shape).flatten(1).T for deltas in own], dim=2)
        m = torch.linalg.lstsq(basis, delta[:, :, None]).solution
        assert ((basis @ m)[:, :, 0] - delta).norm() < 1e-4 * delta.norm()
        learned.append(m[:, :, 0].T)
    learned = torch.cat(learned, dim=1)
    assert float(learned.std(1).min()) > 0.005, "the coefficients of all three were learned"
    for field in ("mean", "error", "error_plain_sum"):
        assert len(result.learned[field]) == 3
    assert sum(result.learned["error"]) < sum(result.learned["error_plain_sum"])
    assert len(result.history[-1]["errors"]) == len(result.history[-1]["mean_m"]) == 3
    assert [point for point, _ in result.pictures] == [-1, 0, 1]
    assert [(p["role"], p["title"], p["name"]) for p in result.preflight["parents"]] == [
        ("subject", "subject subject", "subject"), ("subject", "subject third", "third"), ("style", "style", "style")
    ]  # fmt: skip
    metadata = read(host.destination("merged")).metadata
    assert [(p["name"], p["role"]) for p in json.loads(metadata["ziplora.parents"])] == [
        ("subject", "subject"), ("third", "subject"), ("style", "style")
    ]  # fmt: skip
    table = json.loads(metadata["ziplora.ranks"])
    assert table.get(shared[0], table["*"]) == [3, 2, 5]

    halves = [host.folder / f"half-{i}.safetensors" for i in range(3)]
    split(host.destination("merged"), halves)
    halves = [by_key(half) for half in halves]
    assert [half.keys() for half in halves] == [deltas.keys() for deltas in own]
    for key, delta in merged.items():
        total = sum(half[key] for half in halves if key in half)
        torch.testing.assert_close(total.reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)


def test_the_same_three_give_the_same_file(host, three, recipe_of):
    saved = []
    for _ in range(2):
        run(recipe_of(parents=three, steps=2, overwrite=True), host)
        saved.append(host.destination("merged").read_bytes())
    assert saved[0] == saved[1]


@pytest.mark.parametrize("role", ["subject", "style"])
def test_two_of_a_kind(host, pair_files, recipe_of, role):
    """Learned like a subject and a style; only the words differ."""
    pair = parents(*((file, role) for file in pair_files))
    result = run(recipe_of(parents=pair, steps=2, dtype="fp32", balance_points=3), host)
    assert [p["title"] for p in result.preflight["parents"]] == [f"{role} subject", f"{role} style"]
    of_a_kind = by_key(host.destination("merged"))
    mixed = [{**parent, "role": r} for parent, r in zip(pair, ("subject", "style"))]
    other = run(recipe_of(parents=mixed, steps=2, dtype="fp32", balance_points=3, overwrite=True), host)
    for key, delta in by_key(host.destination("merged")).items():
        assert torch.equal(of_a_kind[key], delta)
    assert [p.tobytes() for _, p in result.pictures] == [p.tobytes() for _, p in other.pictures], "the same balance"


def test_what_is_printed_loops_over_the_parents(host, three, recipe_of):
    from ziplora_lib.__main__ import summary

    recipe = recipe_of(parents=three, steps=1)
    said = summary(run(recipe, host))
    for title in recipe.titles:
        assert f"\n{title}: error against this LoRA alone" in said


def test_the_tabs_words_loop_over_the_parents():
    pytest.importorskip("gradio")
    from ziplora_lib.tab.result import _learned

    cast = [("subject", "dog"), ("subject", "cat"), ("style", "ink")]
    told = [{"role": r, "name": n, "title": f"{r} {n}" if r == "subject" else r} for r, n in cast]
    rows = _learned({"error": [0.2, 3.0, 0.5], "error_plain_sum": [2.0, 3.0, 0.4], "best_step": 7}, told)
    assert [
        f"{role} {name}</th>" in rows for role, name in (("Subject", "dog"), ("Subject", "cat"), ("Style", "ink"))
    ] == [True] * 3


def test_the_comparison_has_a_row_for_each(host, three, recipe_of):
    from ziplora_lib.comparison import comparison

    recipe = recipe_of(parents=three, steps=1)
    result = run(recipe, host)
    sheet = comparison(recipe, host.destination("merged"), host, [1])
    assert sheet.row_labels == [
        "no LoRA", "subject subject alone", "subject third alone", "style alone", "plain sum", "ZipLoRA"
    ]  # fmt: skip
    assert len(sheet.rows) == 6
    assert len({row[0].tobytes() for row in sheet.rows}) == 6, "each is another picture"
    assert result.file == str(host.destination("merged"))


def test_attached_factors_grow_with_the_sum_of_the_ranks(host, pair_files, third_file, three, recipe_of):
    """Memory: every further LoRA costs its own factors, and no dense ΔW is ever formed."""
    recipe = recipe_of(parents=three)
    ready = preflight(recipe, host)
    with host.session():
        stacks = prepare(recipe, ready, host, lambda _: None)[0].stacks
    held = sum(stack.up.numel() + stack.down.numel() for stack in stacks.values())
    files = [read(file) for file in (*pair_files, third_file)]
    assert held == sum(d.up.numel() + d.down.numel() for lora in files for d in lora.deltas.values())
    for key, stack in stacks.items():
        assert stack.up.shape[1] == sum(lora.deltas[key].rank for lora in files if key in lora.deltas)


def test_the_same_lora_twice_among_three_is_refused_unless_allowed(host, pair_files, third_file, recipe_of):
    cast = parents((third_file, "subject"), (pair_files[1], "style"), (third_file, "style"))
    with pytest.raises(BadInput, match="subject and style third are the same LoRA") as caught:
        preflight(recipe_of(parents=cast), host)
    assert caught.value.file == "third.safetensors"
    run(recipe_of(parents=cast, allow_same=True, method="direct", dtype="fp32"), host)
    third, style = by_key(third_file), by_key(pair_files[1])
    for key, delta in by_key(host.destination("merged")).items():
        wanted = 2 * third.get(key, torch.zeros(1)).double() + style.get(key, torch.zeros(1)).double()
        torch.testing.assert_close(delta, wanted.reshape(delta.shape), rtol=1e-5, atol=1e-6)


def test_a_missing_prompt_is_named_by_role_and_lora(host, three, recipe_of):
    three[2]["prompt"] = ""
    with pytest.raises(BadInput, match="the subject third has no prompt") as caught:
        preflight(recipe_of(parents=three), host)
    assert caught.value.file == "third.safetensors"
