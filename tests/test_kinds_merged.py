"""Every kind the whole way: zipped with a plain LoRA, saved, and read by somebody else, ΔW_m = Σ m_i ⊗ ΔW_i."""

import re

import kinds
import pytest
import torch
from kinds import FILES
from loras import dense_deltas, write_lora
from safetensors.torch import load_file
from test_loader_agreement import ROUNDING, peft_deltas, rounding_bound

from ziplora_lib import job
from ziplora_lib.job import run
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read

pytest.importorskip("diffusers")
pytest.importorskip("lycoris.kohya")
pytest.importorskip("peft")

# a layer or two of every type, of whatever the file has (of a text encoder's attention always out_proj: without it
# diffusers does not know the format)
FEW = (
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
    "input_blocks_7_1_transformer_blocks_1_attn2_to_k",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "middle_block_1_transformer_blocks_0_norm1",
    "middle_block_0_in_layers_0",
    "middle_block_0_in_layers_2",
    "middle_block_0_emb_layers_1",
    "input_blocks_3_0_op",
    "output_blocks_5_2_conv",
    "output_blocks_3_0_skip_connection",
    "time_embed_0",
    "out_2",
    "te1_text_model_encoder_layers_0_self_attn_q_proj",
    "te1_text_model_encoder_layers_0_self_attn_out_proj",
    "te2_text_model_encoder_layers_1_self_attn_out_proj",
    "te2_text_model_encoder_layers_1_mlp_fc1",
)
# the plain LoRA has some of these, and one of its own
PLAIN = (
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_v",
    "middle_block_0_in_layers_2",
    "input_blocks_3_0_op",
    "output_blocks_3_0_skip_connection",
    "time_embed_0",
    "te1_text_model_encoder_layers_0_self_attn_q_proj",
    "te1_text_model_encoder_layers_0_self_attn_out_proj",
)


@pytest.fixture(scope="module")
def pipe():
    """The miniature that the libraries write for."""
    from ziplora_lib.hosts.miniature import build_miniature

    return build_miniature()


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory):
    """One miniature for all merges here: each leaves it as it was."""
    from ziplora_lib.hosts.diffusers import DiffusersHost

    return DiffusersHost("miniature", tmp_path_factory.mktemp("merged"), "cpu")


@pytest.fixture(scope="module")
def few(pipe, tmp_path_factory):
    """few(name): a file of the table with a few layers, gentle enough to make pictures; written once."""
    known = {}

    def make(name):
        if name not in known:
            written = kinds.write(FILES[name], pipe, tmp_path_factory.mktemp(name), "fp32")
            known[name] = written.only({key for key in (*written.deltas, *written.vectors) if key.endswith(FEW)})
        return known[name]

    return make


@pytest.fixture(scope="module")
def plain(layers, tmp_path_factory):
    shapes = {layer_key(f"{part}.{name}"): shape for (part, name), shape in layers.items()}
    chosen = {key: shape for key, shape in shapes.items() if key.endswith(PLAIN)}
    assert len(chosen) == len(PLAIN)
    return write_lora(
        tmp_path_factory.mktemp("plain") / "plain.safetensors", chosen, rank=3, alpha=1.5, seed=5, size=0.3
    )


@pytest.fixture
def learned(monkeypatch):
    """The coefficients of the run that follows, as the method returned them: {layer key: (P, columns)}."""
    kept, method = {}, job.METHODS["ziplora"]

    def recording(*args):
        merged = method(*args)
        kept.clear()
        kept.update(merged.coefficients)
        return merged

    monkeypatch.setitem(job.METHODS, "ziplora", recording)
    return kept


def quick(recipe_of, *files, **fields):
    """A recipe for these files, subject first, as short as it can be; what has no factors is kept whole."""
    roles = ["subject"] * (len(files) - 1) + ["style"]
    parents = [{"lora": str(f), "role": role, "prompt": f"{role} {i}"} for i, (f, role) in enumerate(zip(files, roles))]
    settings = dict(
        parents=parents, samples=2, steps=2, lr=0.05, dense_rank=0, sampler_steps=1, overwrite=True, objective="paper"
    )
    return recipe_of(**{**settings, **fields})


def expected(parents, strengths, coefficients):
    """Σ m_i ⊗ strength_i ΔW_i in float64. parents: {layer key: ΔW} of each."""
    total = {}
    for i, (deltas, strength) in enumerate(zip(parents, strengths)):
        for key, delta in deltas.items():
            delta = delta.double() * strength
            if key in coefficients:
                delta = delta * coefficients[key][i].double().reshape(delta.shape[1:])
            total[key] = total.get(key, 0) + delta
    return total


def plain_deltas(path):
    return {layer_key(name): delta for name, delta in dense_deltas(path).items()}


def saved_deltas(path):
    """ΔW of a saved file, from its tensors: factors, or whole beside a bias."""
    whole = {n.removesuffix(".diff"): t.double() for n, t in load_file(path).items() if n.endswith(".diff")}
    return {layer_key(name): delta for name, delta in {**dense_deltas(path), **whole}.items()}


def agree(given, wanted, path, dtype):
    """Equal layer by layer: but for one rounding of each factor to dtype, and fp32's of the parent's own ΔW."""
    bounds, unit = rounding_bound(path, dtype), ROUNDING[dtype][0]
    assert given.keys() == wanted.keys() == bounds.keys()
    for key, delta in wanted.items():
        error = (given[key].double().reshape(delta.shape) - delta).abs()
        # whole layers are rounded once themselves, and the parent's library took ‖W‖ ~ 1 away in fp32
        bound = bounds[key].reshape(delta.shape) + 2 * unit * delta.abs() + 2e-6
        assert (error <= bound).all(), (key, float((error - bound).max()), float(delta.abs().max()))


EVERY_KIND = [row.files[0].name for row in kinds.TABLE if row.files]
ALSO = ["locon-tucker", "loha-tucker", "lokr-whole", "peft-dora", "diffusers-lora", "boft", "peft-biases"]


@pytest.mark.parametrize("name", [*EVERY_KIND, *ALSO])
def test_zipped_with_a_plain_lora_it_is_what_the_coefficients_say(shared_host, recipe_of, few, plain, learned, name):
    written, strengths = few(name), (0.8, 1.25)
    assert len(written.deltas) >= 9
    recipe = quick(recipe_of, written.path, plain)
    recipe.parents[0].strength, recipe.parents[1].strength = strengths
    result = run(recipe, shared_host)
    path = shared_host.destination(recipe.output)
    parents = [written.deltas, plain_deltas(plain)]
    wanted = expected(parents, strengths, learned)
    assert learned.keys() == {key for key in wanted if "_unet_" in key}, "every UNet layer of either is learned"
    assert any(float((m - 0.5).abs().max()) > 0.03 for m in learned.values())
    agree(saved_deltas(path), wanted, path, recipe.dtype)
    assert not [said for said in result.warnings if "lost" in said]
    tensors = load_file(path)
    for key, (weight, bias) in written.vectors.items():
        parts = {"w_norm": weight, "b_norm": bias} if weight is not None else {"diff_b": bias}
        for part, values in parts.items():
            torch.testing.assert_close(tensors[f"{key}.{part}"].float(), 0.8 * values, rtol=2e-3, atol=1e-6)
    assert bool(written.vectors) == any(n.endswith(("_norm", "diff_b")) for n in tensors)
    if not written.vectors:  # diffusers knows no norms and no whole layers
        try:
            agree(peft_deltas(shared_host.pipe, path), wanted, path, recipe.dtype)
        finally:
            shared_host.pipe.unload_lora_weights()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_three_kinds_in_one_file(shared_host, recipe_of, few, plain, learned, dtype):
    """A LoHa subject, a DoRA subject and a plain style make one LoRA that diffusers loads."""
    loha, dora, strengths = few("loha"), few("dora"), (1.2, 0.7, 0.9)
    recipe = quick(recipe_of, loha.path, dora.path, plain, dtype=dtype)
    for parent, strength in zip(recipe.parents, strengths):
        parent.strength = strength
    result = run(recipe, shared_host)
    path = shared_host.destination(recipe.output)
    wanted = expected([loha.deltas, dora.deltas, plain_deltas(plain)], strengths, learned)
    assert {len(m) for m in learned.values()} == {3}
    agree(saved_deltas(path), wanted, path, dtype)
    try:
        agree(peft_deltas(shared_host.pipe, path), wanted, path, dtype)
    finally:
        shared_host.pipe.unload_lora_weights()
    assert [parent["kinds"] for parent in result.preflight["parents"]] == [
        read(file).kinds for file in (loha.path, dora.path, plain)
    ]
    assert len(result.learned["error"]) == 3


def test_a_rank_for_the_others_and_a_limit_are_told_with_their_loss(shared_host, recipe_of, few, plain, learned):
    """dense_rank brings what has no factors to them, max_rank and keep_norm cut the merge: each says what it lost."""
    full = few("full")
    run(quick(recipe_of, full.path, plain, method="direct", dtype="fp32"), shared_host)
    path = shared_host.destination("merged")
    whole, size = saved_deltas(path), path.stat().st_size
    for fields in ({"dense_rank": 4}, {"max_rank": 4}, {"keep_norm": 0.8}, {"keep_energy": 0.5}):
        result = run(quick(recipe_of, full.path, plain, method="direct", dtype="fp32", **fields), shared_host)
        assert path.stat().st_size < size
        (said,) = [warning for warning in result.warnings if " lost " in warning]
        given = saved_deltas(path)
        left = {key: float((whole[key] - given[key]).square().sum()) for key in whole}
        energy = {key: float(whole[key].square().sum()) for key in whole}
        share, worst = (float(number) / 100 for number in re.findall(r"([\d.]+)%", said))
        if "dense_rank" in fields:  # before the plain LoRA is added
            energy = {key: float(full.deltas[key].square().sum()) for key in full.deltas}
        changed = [key for key in energy if left[key] > 1e-9 * energy[key] or "dense_rank" in fields]
        assert len(changed) == int(re.search(r"(\d+) layers", said)[1])
        assert share == pytest.approx(sum(left[k] for k in changed) / sum(energy[k] for k in changed), abs=2e-4)
        assert worst == pytest.approx(max(left[k] / energy[k] for k in changed), abs=2e-4)
        assert worst > 0.05, "there was something to lose"


def test_what_is_brought_to_factors_is_told_before_and_after(shared_host, recipe_of, few, plain):
    ia3 = few("ia3")
    result = run(quick(recipe_of, ia3.path, plain, method="direct", dense_rank=4), shared_host)
    n = len(ia3.deltas)
    assert any(f"ia3: {n} layers ((IA)³) have no factors" in w and "rank 4" in w for w in result.warnings)
    assert any(f"ia3: bringing {n} layers to factors lost" in w for w in result.warnings)


def test_equal_norms(shared_host, recipe_of, few, plain):
    """A pair of which one is far stronger comes out with halves of one norm, and says at which strengths."""
    from ziplora_lib.lora.bake import stacks

    fields = dict(method="direct", dtype="fp32")
    for files in ((few("loha").path, plain), (few("full").path, plain)):
        result = run(quick(recipe_of, *files, equal_norms=True, **fields), shared_host)
        (said,) = [warning for warning in result.warnings if "brought to one norm" in warning]
        assert plain.stem in said
        lora = read(shared_host.destination("merged"))
        halves = [[stack.part(i) for stack in stacks(lora).values()] for i in range(2)]
        norms = [sum(part.norm() ** 2 for part in half if part is not None) ** 0.5 for half in halves]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
