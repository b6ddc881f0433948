"""What is made of a merged file by itself: other strengths, and its halves as files of their own. No model."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import dense_deltas
from safetensors.torch import load_file

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.bake import bake, in_order, origins, split, stacks, strengths
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.extras import extra_tensors
from ziplora_lib.lora.metadata import merged_metadata, trigger_words
from ziplora_lib.lora.reader import Lora, read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors

QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
SHAPES = {QUERY: (6, 8), CONV: (4, 3, 3, 3), KEY: (6, 2048)}
TAGS = {"10_dog": {"sks": 10, "grass": 3}}


def delta(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, *shape[1:], generator=generator)
    return LowRankDelta(up, down, 0.5)


def merge(folder, roles=("subject", "subject", "style"), ranks=None, dtype="fp32"):
    """A merged file of parents called a, b, c, … and, by key, what each of them gave to it."""
    ranks = ranks or {QUERY: (3, 2, 4), CONV: (2, 0, 5), KEY: (0, 2, 4)}
    parts = {
        key: [delta(SHAPES[key], rank, 10 * i + len(key)) if rank else None for i, rank in enumerate(split_)]
        for key, split_ in ranks.items()
    }
    content = {key: Stack.of(given) for key, given in parts.items()}
    said = {"ss_tag_frequency": json.dumps(TAGS)}
    parents = [
        Lora(name, folder / f"{name}.safetensors", {}, {} if i else said, {}, hash=f"hash of {name}")
        for i, name in enumerate("abcdefgh"[: len(roles)])
    ]
    recipe = {"parents": [{"role": role, "prompt": f"prompt of {p.name}"} for role, p in zip(roles, parents)]}
    table = {key: stack.ranks for key, stack in content.items()}
    metadata = merged_metadata("merged", parents, table, recipe, {}, "sdxl", "epsilon")
    path = folder / "merged.safetensors"
    writer.write(path, content, dtype, metadata, True)
    return path, parts


def dense(part, key):
    return torch.zeros(SHAPES[key], dtype=torch.float64) if part is None else part.dense().double()


def test_three_strengths(tmp_path):
    path, parts = merge(tmp_path)
    out = tmp_path / "baked.safetensors"
    bake(path, out, [0.5, -2.0, 1.5])
    given = dense_deltas(out)
    for key, (a, b, c) in parts.items():
        wanted = 0.5 * dense(a, key) - 2 * dense(b, key) + 1.5 * dense(c, key)
        torch.testing.assert_close(given[key], wanted, rtol=1e-5, atol=1e-5)
    assert json.loads(read(out).metadata["ziplora.strengths"]) == [0.5, -2.0, 1.5]
    assert "0.50 : -2.00 : 1.50" in json.loads(out.with_suffix(".json").read_text())["notes"]
    bake(out, tmp_path / "again.safetensors", [2, 1, 0])
    assert json.loads(read(tmp_path / "again.safetensors").metadata["ziplora.strengths"]) == [1.0, -2.0, 0.0]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_halves_add_up_to_the_merged_one(tmp_path, dtype):
    path, _ = merge(tmp_path, dtype=dtype)
    outs = [tmp_path / f"half-{i}.safetensors" for i in range(3)]
    told = split(path, outs)
    whole, halves = dense_deltas(path), [dense_deltas(out) for out in outs]
    assert [half.keys() for half in halves] == [{QUERY, CONV}, {QUERY, KEY}, {QUERY, CONV, KEY}], "no layers of rank 0"
    # a factor is rounded once more, where alpha / rank of the half is another than of the whole
    unit = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}[dtype]
    for key, wanted in whole.items():
        lora = read(path).deltas[key]
        bound = lora.scale * (lora.up.double().abs() @ lora.down.double().flatten(1).abs()).reshape(wanted.shape)
        assert ((sum(half[key] for half in halves if key in half) - wanted).abs() <= 2.1 * unit * bound + 1e-6).all()
    assert [t["sha256"] for t in told] == [read(out).hash for out in outs]
    assert {read(out).dtype for out in outs} == {read(path).dtype}


def test_a_half_says_what_it_is(tmp_path):
    path, _ = merge(tmp_path)
    outs = [tmp_path / f"half-{i}.safetensors" for i in range(3)]
    split(path, outs)
    a, b, c = map(read, outs)
    assert [half.metadata["ss_output_name"] for half in (a, b, c)] == ["half-0", "half-1", "half-2"]
    assert [half.metadata["ss_network_dim"] for half in (a, b, c)] == ["3", "2", "5"]
    assert [half.metadata["ss_network_alpha"] for half in (a, b, c)] == ["3.0", "2.0", "5.0"]
    assert json.loads(a.metadata["ziplora.split_from"]) == {
        "name": "merged",
        "sha256": read(path).hash,
        "parent": {"name": "a", "role": "subject", "sha256": "hash of a", "trigger": "sks"},
    }
    assert [trigger_words(half)[0] for half in (a, b, c)] == ["sks", "prompt of b", "prompt of c"]
    assert json.loads(a.metadata["ss_tag_frequency"]) == TAGS
    assert json.loads(b.metadata["ss_tag_frequency"]) == {}
    whole = read(path).metadata
    for field in ("ss_base_model_version", "ss_network_module", "modelspec.architecture", "ziplora.recipe"):
        assert a.metadata[field] == whole[field]
    assert "modelspec.merged_from" not in a.metadata
    assert {half.base for half in (a, b, c)} == {"sdxl"}
    card = json.loads((tmp_path / "half-1.json").read_text())
    assert card["activation text"] == "prompt of b"
    assert "half of b in merged" in card["notes"]
    for command in (
        lambda: bake(outs[0], tmp_path / "x.safetensors", [1]),
        lambda: split(outs[0], [tmp_path / "x.safetensors"]),
    ):
        with pytest.raises(BadInput, match="is one half of a merge"):
            command()  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cast_splits_and_adds_up(tmp_path, data):
    roles = data.draw(st.lists(st.sampled_from(["subject", "style"]), min_size=2, max_size=5).map(
        lambda roles: sorted(roles, key=lambda role: role != "subject")))  # fmt: skip
    some = st.lists(st.integers(0, 3), min_size=len(roles), max_size=len(roles)).filter(any)
    ranks = {QUERY: tuple(range(1, len(roles) + 1)), CONV: tuple(data.draw(some))}
    path, parts = merge(tmp_path, roles, ranks)
    assert [parent["role"] for parent in origins(read(path))] == roles
    outs = [tmp_path / f"half-{i}.safetensors" for i in range(len(roles))]
    split(path, outs, overwrite=True)
    for key, given_ in parts.items():
        for out, part in zip(outs, given_):
            half = dense_deltas(out)
            assert (key in half) == (part is not None)
            if part is not None:
                torch.testing.assert_close(half[key], dense(part, key), rtol=1e-5, atol=1e-5)


NORM = "lora_unet_input_blocks_4_0_in_layers_0"
BIAS = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
BARE_BIAS = "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2"


def test_norms_biases_and_embeddings_follow_the_strengths_and_the_halves(tmp_path):
    """A norm of all three, a bias beside a ΔW of the first, a bias alone of the third; one embedding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, 6, generator=generator)
    rows[2, 1:], rows[3, :2] = 0, 0
    vectors = {NORM: Vectors(rows[0], rows[1]), BIAS: Vectors(bias=rows[2]), BARE_BIAS: Vectors(bias=rows[3])}
    content = {
        QUERY: Stack.of([delta(SHAPES[QUERY], 2, i) for i in range(3)]),
        BIAS: Stack.of([delta((6, 8), 2, 9), None, None]),
    }
    parents = [Lora(name, tmp_path / f"{name}.safetensors", {}) for name in "abc"]
    recipe = {"parents": [{"role": role, "prompt": ""} for role in ("subject", "subject", "style")]}
    table = {key: stack.ranks for key, stack in content.items()}
    plain, extra = extra_tensors(content, vectors, {NORM: (6,), BARE_BIAS: (6, 8)}, lambda key: key)
    extra["bundle_emb.word.string_to_param"] = torch.ones(2, 8)
    path, baked = tmp_path / "merged.safetensors", tmp_path / "baked.safetensors"
    metadata = merged_metadata("merged", parents, table, recipe, {}, "sdxl", "epsilon")
    writer.write(path, plain, "fp32", metadata, False, extra=extra)

    bake(path, baked, [2.0, -1.0, 0.5])
    w = torch.tensor([2.0, -1.0, 0.5])[:, None]
    tensors = load_file(baked)
    torch.testing.assert_close(tensors[f"{NORM}.w_norm"], (rows[0] * w).sum(0))
    torch.testing.assert_close(tensors[f"{NORM}.b_norm"], (rows[1] * w).sum(0))
    torch.testing.assert_close(tensors[f"{BIAS}.diff_b"], 2 * rows[2, 0])
    torch.testing.assert_close(tensors[f"{BIAS}.diff"], 2 * content[BIAS].total().dense())
    torch.testing.assert_close(tensors[f"{BARE_BIAS}.diff_b"], 0.5 * rows[3, 2])
    assert tensors[f"{BARE_BIAS}.diff"].shape == (6, 8)
    assert "bundle_emb.word.string_to_param" in tensors
    bake(baked, tmp_path / "again.safetensors", [0.5, -1.0, 2.0])
    for name, tensor in load_file(path).items():
        torch.testing.assert_close(load_file(tmp_path / "again.safetensors")[name], tensor)

    outs = [tmp_path / f"half-{i}.safetensors" for i in range(3)]
    split(path, outs)
    halves = [load_file(out) for out in outs]
    assert [f"{BIAS}.diff_b" in half for half in halves] == [True, False, False]
    assert [f"{BARE_BIAS}.diff_b" in half for half in halves] == [False, False, True]
    for name in (f"{NORM}.w_norm", f"{NORM}.b_norm", f"{BIAS}.diff", f"{BIAS}.diff_b", f"{BARE_BIAS}.diff_b"):
        torch.testing.assert_close(sum(half[name] for half in halves if name in half), load_file(path)[name])
    assert all("bundle_emb.word.string_to_param" in half for half in halves)
    for out in outs:
        assert read(out).deltas


def test_the_spelling_and_the_base_stay(tmp_path):
    """SD 1.5 with diffusers' names: the baked file and the halves have them too."""
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    content = {key: Stack.of([delta((6, 768), 2, 0), delta((6, 768), 3, 1)])}
    parents = [Lora(name, tmp_path / f"{name}.safetensors", {}) for name in "ab"]
    recipe = {"parents": [{"role": r, "prompt": ""} for r in ("subject", "style")], "layer_names": "diffusers"}
    metadata = merged_metadata("merged", parents, {key: (2, 3)}, recipe, {}, "sd1", "epsilon")
    path, outs = tmp_path / "merged.safetensors", [tmp_path / f"{name}.safetensors" for name in "xyz"]
    writer.write(path, content, "fp32", metadata, False, names="diffusers", base="sd1")
    bake(path, outs[0], [1, 1])
    split(path, outs[1:])
    for out in outs:
        assert load_file(out).keys() == load_file(path).keys()
        assert read(out).base == "sd1"
        assert json.loads(out.with_suffix(".json").read_text())["sd version"] == "SD1"
    torch.testing.assert_close(load_file(outs[0]), load_file(path))


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    path, _ = merge(tmp_path)
    a, b, c, d = (tmp_path / f"{name}.safetensors" for name in "wxyz")
    before = sorted(f.name for f in tmp_path.iterdir())
    for outs, word in (
        ([a, b], "3 halves"),
        ([a, b, c, d], "3 halves"),
        ([a, b, a], "same name"),
        ([a, b, tmp_path / "W.safetensors"], "same name"),
        ([a, b, path], "same name"),
        ([a, b, tmp_path / "con.safetensors"], "con"),
        ([a, b, tmp_path / "nowhere/x.safetensors"], "does not exist"),
    ):
        with pytest.raises(BadInput, match=word) as caught:
            split(path, outs, overwrite=True)
        assert caught.value.remedy
    for weights, word in (
        ([1, 1], "3 strengths"),
        ([1] * 4, "3 strengths"),
        ([1, 1, 4.1], "4.1"),
        ([1, 1, float("nan")], "nan"),
    ):
        with pytest.raises(BadInput, match=word) as caught:
            bake(path, a, weights)
        assert caught.value.remedy  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_what_is_given_by_role_comes_in_the_parents_order(tmp_path):
    lora = read(merge(tmp_path)[0])
    assert in_order(lora, {"subject": ["p", "q"], "style": ["r"]}) == ["p", "q", "r"]
    assert strengths(lora, {"subject": [0.5], "style": [2.0]}) == [0.5, 0.5, 2.0]
    assert strengths(lora, {"subject": [0.5, 0.7]}) == [0.5, 0.7, 1.0]
    for given_ in ({"subject": [1, 2, 3]}, {"style": [1, 2]}):
        with pytest.raises(BadInput, match="has "):
            strengths(lora, given_)
    (tmp_path / "styles").mkdir()
    styles = read(merge(tmp_path / "styles", ("style", "style"), {QUERY: (1, 1)})[0])
    assert strengths(styles, {"style": [0.5]}) == [0.5, 0.5]
    with pytest.raises(BadInput, match="has 0 subjects, but 1"):
        strengths(styles, {"subject": [1.0], "style": [1.0]})


def changed(lora, **fields):
    metadata = {**lora.metadata, **{f"ziplora.{name}": value for name, value in fields.items()}}
    return Lora(lora.name, lora.path, lora.deltas, metadata)


def test_files_of_before_roles_have_one_subject_and_one_style(tmp_path):
    lora = read(merge(tmp_path, ("subject", "style"), {QUERY: (2, 3)})[0])
    old = changed(lora, parents=json.dumps([{"name": "a", "sha256": "1"}, {"name": "b", "sha256": "2"}]))
    assert [(p["name"], p["role"], p["trigger"]) for p in origins(old)] == [("a", "subject", ""), ("b", "style", "")]
    assert stacks(old)[QUERY].ranks == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [{"parents": "[]"}, {"parents": "{"}, {"parents": "[1, 2, 3]"}, {"parents": "3"}, {"parents": '[{"name": "a"}]'},
     {"ranks": "[]"}, {"ranks": "{}"}, {"ranks": '{"*": "many"}'}, {"ranks": '{"*": [1, null, 2]}'},
     {"ranks": '{"*": [1, 2]}'}, {"ranks": '{"*": [3, 2, 5]}'}, {"ranks": '{"*": [-1, 6, 4]}'}, {"ranks": "["*9999}],
    ids=str,
)  # fmt: skip
def test_metadata_that_another_tool_changed_is_refused(tmp_path, fields):
    lora = read(merge(tmp_path)[0])
    with pytest.raises(BadInput):
        stacks(changed(lora, **fields))
