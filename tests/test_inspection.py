"""`inspect` and `compare`: what they say of files, in words and as JSON."""

import json

import pytest
import torch
from loras import lora_tensors, write_lora
from safetensors.torch import load_file, save_file

from ziplora_lib.__main__ import main
from ziplora_lib.lora.reader import read

ATTN = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
MID = "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj"
CONV = "lora_unet_output_blocks_3_0_in_layers_2"
TE1 = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
SDXL = {ATTN: (8, 2048), MID: (12, 6), CONV: (4, 3, 3, 3), TE1: (6, 6)}
SD1 = {ATTN: (8, 768), MID: (12, 6), "lora_te_text_model_encoder_layers_0_mlp_fc1": (12, 6)}


@pytest.fixture
def call(capsys):
    """call(*arguments) -> (status, stdout, stderr), in this process."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def seen(call):
    """seen(path) -> (what inspect --json says of it, what inspect prints)."""

    def run(path):
        status, out, err = call("inspect", "--json", path)
        assert (status, err) == (0, "")
        return json.loads(out)[0], call("inspect", path)[1]

    return run


def test_a_kohya_file_in_json_and_in_words(seen, tmp_path):
    told = {"ss_sd_model_name": "sd_xl.safetensors", "ss_resolution": "(1024, 1024)", "ss_num_epochs": "4",
            "ss_steps": "900", "ss_base_model_version": "sdxl_base_v1-0", "modelspec.trigger_phrase": "sks dog"}  # fmt: skip
    path = write_lora(tmp_path / "dog.safetensors", SDXL, told, rank=2, alpha=1.0)
    view, text = seen(path)
    assert view["file"] == str(path)
    assert (view["kind"], view["kinds"]) == ("LoCon", {"LoRA": 3, "LoCon": 1})
    assert (view["base"], view["base_from"]) == ("SDXL", "the width of its cross-attention")
    assert (view["layers"], view["unet_layers"], view["text_encoder_layers"]) == (4, 3, 1)
    assert view["parts"] == {"UNet attention": 1, "UNet feed-forward": 1, "UNet convolution": 1, "text encoder 1": 1}
    assert (view["ranks"], view["rank_counts"], view["rank_median"]) == ([2], {"2": 4}, 2)
    assert (view["scales"], view["scale_from"], view["dtype"]) == ([0.5], "alpha in the file", "float32")
    assert list(view["norms_by_block"]) == ["te1", "in 4", "mid", "out 3"]
    assert sum(norm**2 for norm in view["norms_by_block"].values()) == pytest.approx(view["norm"] ** 2, rel=1e-4)
    assert view["norm"] == pytest.approx(read(path).norm(), rel=1e-5)
    assert (view["trigger"], view["trigger_from"]) == ("sks dog", "trigger phrase in the file")
    assert view["training"] == {
        "model": "sd_xl.safetensors",
        "resolution": "(1024, 1024)",
        "epochs": "4",
        "steps": "900",
    }
    assert (view["problems"], view["ziplora"], view["embeddings"]) == ([], {}, [])
    lines = text.splitlines()
    assert lines[0] == str(path)
    assert all(line.startswith("  ") and line[18] != " " for line in lines[1:])  # one column of values
    for word in ("LoCon (3 LoRA, 1 LoCon)", "SDXL, told by", "2 (4 layers)", "0.5 (from alpha", "sks dog", "epochs 4"):
        assert word in text
    assert "problem" not in text


def test_different_ranks_and_scales(seen, tmp_path):
    tensors = {}
    for rank, (name, shape) in zip((1, 2, 3, 4, 5), [*SDXL.items(), (MID.replace("net_0_proj", "net_2"), (6, 12))]):
        tensors |= lora_tensors({name: shape}, rank=rank, alpha=1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    view, text = seen(tmp_path / "a.safetensors")
    assert (view["ranks"], view["rank_median"]) == ([1, 2, 3, 4, 5], 3)
    assert view["scales"] == pytest.approx([0.2, 0.25, 1 / 3, 0.5, 1.0], rel=1e-5)
    assert "1 to 5, median 3" in text
    assert "0.2 to 1 (from" in text


def test_sd1_and_its_one_text_encoder(seen, tmp_path):
    view, text = seen(write_lora(tmp_path / "a.safetensors", SD1, alpha=4.0))
    assert view["base"] == "SD 1.5"
    assert view["parts"]["text encoder"] == 1
    assert list(view["norms_by_block"]) == ["te", "in 4", "mid"]
    assert "SD 1.5, told by the width" in text


@pytest.mark.parametrize(
    ("metadata", "wanted"), [({"ss_base_model_version": "sdxl_base_v1-0"}, "ss_base_model_version"), ({}, "")]
)
def test_where_the_base_was_told(seen, tmp_path, metadata, wanted):
    view, _ = seen(write_lora(tmp_path / "a.safetensors", {MID: (12, 6)}, metadata, alpha=4.0))
    assert view["base_from"] == wanted
    assert view["base"] == ("SDXL" if wanted else "unknown")
    assert bool(view["problems"]) == (not wanted)


def problems_of(seen, path):
    view, text = seen(path)
    assert all(problem in text for problem in view["problems"])
    return view["problems"]


def test_a_lora_without_problems_has_none(seen, tmp_path):
    assert problems_of(seen, write_lora(tmp_path / "a.safetensors", SDXL, alpha=4.0)) == []


def test_zero_layers(seen, tmp_path):
    tensors = lora_tensors(SDXL, alpha=4.0)
    tensors[f"{MID}.lora_up.weight"].zero_()
    save_file(tensors, tmp_path / "some.safetensors")
    assert problems_of(seen, tmp_path / "some.safetensors") == [f"all zero, as if never trained: 1 layer ({MID})"]
    for name in tensors:
        if "lora_up" in name:
            tensors[name].zero_()
    save_file(tensors, tmp_path / "all.safetensors")
    assert problems_of(seen, tmp_path / "all.safetensors") == ["changes nothing: all its values are zero"]


def test_huge_ranks_and_a_missing_alpha(seen, tmp_path):
    key = ATTN.replace("attn2", "attn1")
    (huge, missing) = problems_of(
        seen, write_lora(tmp_path / "a.safetensors", {ATTN: (8, 2048), key: (320, 320)}, rank=300)
    )
    assert huge == f"ranks above 256, up to 300, which make the merged file large: 2 layers ({key}, {ATTN})"
    assert missing.startswith("the layers have no alpha: taken as the rank")
    tensors = lora_tensors(SDXL, alpha=4.0)
    del tensors[f"{MID}.alpha"]
    save_file(tensors, tmp_path / "some.safetensors")
    (missing,) = problems_of(seen, tmp_path / "some.safetensors")
    assert missing.startswith("1 of 4 layers have no alpha")


def test_v_prediction_and_metadata_that_contradicts_the_layers(seen, tmp_path):
    v = write_lora(tmp_path / "v.safetensors", SDXL, {"modelspec.prediction_type": "v"}, alpha=4.0)
    assert ["predicts v" in problem for problem in problems_of(seen, v)] == [True]
    assert seen(v)[0]["prediction"] == "v"
    other = write_lora(tmp_path / "b.safetensors", SDXL, {"ss_base_model_version": "sd_v1"}, alpha=4.0)
    assert problems_of(seen, other) == ["its layers are those of SDXL, but its metadata says 'sd_v1'"]


def test_text_encoder_layers_that_the_webui_does_not_apply(seen, tmp_path):
    def attention(layer, names):
        return {f"lora_te2_text_model_encoder_layers_{layer}_self_attn_{n}_proj": (6, 6) for n in names}

    whole = {**SDXL, **attention(0, ("q", "k", "v", "out"))}
    assert problems_of(seen, write_lora(tmp_path / "a.safetensors", whole, alpha=4.0)) == []
    partly = {**whole, **attention(1, ("q", "v")), "lora_te2_text_projection": (6, 6)}
    some, skipped = problems_of(seen, write_lora(tmp_path / "b.safetensors", partly, alpha=4.0))
    assert "four together or none: 1 layer (lora_te2_text_model_encoder_layers_1_self_attn)" in some
    assert skipped == "skipped by the WebUI and some other loaders: 1 layer (lora_te2_text_projection)"


def test_norms_biases_embeddings_and_layers_that_need_the_model(seen, tmp_path):
    tensors = lora_tensors(SDXL, alpha=4.0)
    tensors[f"{MID}.dora_scale"] = torch.ones(12, 1)
    tensors["lora_unet_input_blocks_4_0_in_layers_0.w_norm"] = torch.ones(4)
    tensors["lora_unet_input_blocks_4_0_in_layers_0.b_norm"] = torch.ones(4)
    tensors[f"{ATTN}.diff_b"] = torch.ones(8)
    tensors["bundle_emb.sks.clip_l"] = torch.ones(2, 6)
    save_file(tensors, tmp_path / "a.safetensors")
    view, text = seen(tmp_path / "a.safetensors")
    assert (view["norm_layers"], view["biases"], view["embeddings"]) == (1, 1, ["sks"])
    assert view["need_the_model"] == {"DoRA of LoRA": 1}
    assert "mid" not in view["norms_by_block"]
    for word in ("1 DoRA of LoRA", "norm layers 1, biases 1", "sks"):
        assert word in text


def test_lycoris_files(host, seen, tmp_path, lycoris_network):
    for algo, kind in (("locon", "LoCon"), ("loha", "LoHa")):
        network = lycoris_network(host.pipe, algo, lora_dim=4, alpha=2, conv_lora_dim=3, conv_alpha=6)
        network.save_weights(str(tmp_path / f"{algo}.safetensors"), torch.float16, {})
        view, text = seen(tmp_path / f"{algo}.safetensors")
        assert (view["kind"], view["dtype"], view["layers"]) == (kind, "float16", len(network.loras))
        assert view["scale_from"] == "alpha in the file"
        assert {"text encoder 1", "text encoder 2", "UNet attention", "UNet convolution"} <= view["parts"].keys()
        assert kind in text


def test_a_peft_file_with_its_settings(host, seen, tmp_path):
    peft = pytest.importorskip("peft")
    unet = peft.get_peft_model(host.pipe.unet, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    unet.save_pretrained(tmp_path)
    view, _ = seen(tmp_path / "adapter_model.safetensors")
    assert (view["scales"], view["scale_from"]) == ([2.0], "PEFT's settings")
    assert "changes nothing: all its values are zero" in view["problems"]  # peft starts with lora_B = 0


@pytest.fixture
def two(tmp_path):
    """Two SDXL LoRAs: three layers in both, one in the first alone, two in the second alone."""
    other = {key: shape for key, shape in SDXL.items() if key != TE1}
    other |= {MID.replace("net_0_proj", "net_2"): (6, 12), "lora_unet_out_2": (4, 4, 3, 3)}
    return (
        write_lora(tmp_path / "dog.safetensors", SDXL, rank=2, alpha=1.0, seed=1),
        write_lora(tmp_path / "ink.safetensors", other, rank=3, seed=2, size=0.6),
    )


def test_compare_in_json(call, two, tmp_path):
    status, out, err = call("compare", "--json", *two)
    assert (status, err) == (0, "")
    view = json.loads(out)
    a, b = view["loras"]
    assert (a["label"], a["layers"], a["alone"], a["ranks"], a["base"]) == ("A", 4, 1, [2], "SDXL")
    assert (b["label"], b["layers"], b["alone"], b["ranks"], b["file"]) == ("B", 5, 2, [3], str(two[1]))
    assert (view["fit"], view["layers"], view["shared"], view["shared_unet"]) == (True, 6, 3, 3)
    assert view["merged_ranks"] == [2, 3, 5]
    assert view["merged_bytes_fp16"] == 2 * sum(
        t.numel() for path in two for name, t in load_file(path).items() if "alpha" not in name
    )
    assert a["suggested_strength"] * a["norm_shared"] == pytest.approx(
        b["suggested_strength"] * b["norm_shared"], rel=1e-4
    )
    assert a["norm"] > a["norm_shared"]
    (pair,) = view["pairs"]
    assert (pair["of"], pair["layers_shared"], list(pair["layers"])) == (["A", "B"], 3, sorted({ATTN, MID, CONV}))
    assert (list(pair["blocks"]), list(pair["groups"])) == (["in 4", "mid", "out 3"], ["attn2", "ff", "resnet"])
    assert pair["all"]["columns"] == 2048 + 6 + 27
    assert pair["layers"][ATTN]["block"] == "in 4"
    deltas = [read(path).deltas[CONV] for path in two]
    assert pair["layers"][CONV]["column_cosine"] == pytest.approx(
        float(deltas[0].column_cosine(deltas[1]).abs().mean()), rel=1e-4
    )
    assert pair["blocks"]["out 3"]["cosine"] == pair["layers"][CONV]["cosine"]
    first, second = view["sparsity"]
    assert (len(first["layers"]), len(second["layers"])) == (4, 5)
    assert list(second["blocks"]) == ["in 4", "mid", "out 3", "end"]
    assert list(first["all"]["columns"]) == ["50%", "80%", "95%"]
    assert list(first["all"]["elements"]) == ["1%", "10%"]
    assert view["merges"] == []


def test_compare_in_words(call, two):
    status, out, err = call("compare", *two)
    assert (status, err) == (0, "")
    assert "3 of 6 layers are in all (3 of the UNet, 0 of text encoders)" in out
    assert "they fit each other's shapes" in out
    tables = [part.splitlines() for part in out.split("\n\n")]
    table = next(lines for lines in tables if lines[0].startswith("A and B"))
    assert [line.split("  ")[0] for line in table[1:-1]] == [
        "in 4",
        "mid",
        "out 3",
        "· attn2",
        "· ff",
        "· resnet",
        "all",
    ]
    assert len({len(line) for line in table[:-1]}) == 1  # aligned


def test_a_lora_compared_with_itself(call, two):
    (pair,) = json.loads(call("compare", "--json", two[0], two[0])[1])["pairs"]
    for view in (pair["all"], *pair["blocks"].values(), *pair["layers"].values()):
        assert (view["column_cosine"], view["interference"], view["cosine"]) == pytest.approx((1, 1, 1), abs=1e-5)


def test_three_loras(call, two, tmp_path):
    third = write_lora(tmp_path / "third.safetensors", {ATTN: (8, 2048), TE1: (6, 6)}, rank=1, seed=3)
    status, out, _ = call("compare", "--json", *two, third)
    view = json.loads(out)
    assert status == 0
    assert [pair["of"] for pair in view["pairs"]] == [["A", "B"], ["A", "C"], ["B", "C"]]
    assert [pair["layers_shared"] for pair in view["pairs"]] == [3, 2, 1]
    assert (view["shared"], [lora["alone"] for lora in view["loras"]]) == (1, [0, 2, 0])
    assert view["merged_ranks"] == [3, 5, 6]
    text = call("compare", *two, third)[1]
    assert all(f"{pair}  " in text for pair in ("A and B", "A and C", "B and C"))


def test_loras_that_share_nothing(call, tmp_path):
    files = [
        write_lora(tmp_path / f"{key[-4:]}.safetensors", {key: (8, 2048)})
        for key in (ATTN, ATTN.replace("to_k", "to_v"))
    ]
    status, out, _ = call("compare", *files)
    assert status == 0
    assert "A and B share no layer" in out


def test_different_bases_are_refused_in_one_line(call, two, tmp_path):
    old = write_lora(tmp_path / "old.safetensors", SD1)
    status, out, err = call("compare", two[0], old)
    assert (status, out) == (2, "")
    assert "old.safetensors: is a LoRA for SD 1.5, but dog.safetensors is for SDXL" in err
    assert err.count("\n") == 1


def test_one_file_and_a_missing_one_are_refused(call, two, tmp_path):
    for arguments in ([two[0]], [two[0], tmp_path / "no.safetensors"]):
        status, out, err = call("compare", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_layers_of_other_shapes_are_listed(call, two, tmp_path):
    odd = write_lora(tmp_path / "odd.safetensors", {**SDXL, MID: (12, 7)})
    status, out, _ = call("compare", "--json", two[0], odd)
    view = json.loads(out)
    assert (status, view["fit"], len(view["unfit"])) == (2, False, 1)
    assert "odd.safetensors" in view["unfit"][0]
    assert MID in view["unfit"][0]
    assert MID not in view["pairs"][0]["layers"]
    status, out, _ = call("compare", two[0], odd)
    assert status == 2
    assert "layers that do not fit each other: 1, left out of all numbers: odd.safetensors" in out


def test_layers_that_need_the_model_are_counted_and_left_out(call, two, tmp_path):
    tensors = load_file(two[0])
    tensors[f"{MID}.dora_scale"] = torch.ones(12, 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    status, out, _ = call("compare", "--json", tmp_path / "dora.safetensors", two[1])
    view = json.loads(out)
    assert (status, view["need_the_model"], view["loras"][0]["need_the_model"]) == (0, 1, 1)
    assert (view["shared"], view["loras"][1]["alone"]) == (2, 2)
    assert MID not in view["pairs"][0]["layers"]
    assert "layers that need the model: 1, left out" in call("compare", tmp_path / "dora.safetensors", two[1])[1]


def test_files_without_a_single_factor(call, seen, two, tmp_path):
    save_file({f"{ATTN}.diff": torch.ones(8, 2048)}, tmp_path / "full.safetensors")
    save_file({"lora_unet_input_blocks_4_0_in_layers_0.w_norm": torch.ones(8)}, tmp_path / "norm.safetensors")
    view, text = seen(tmp_path / "full.safetensors")
    assert (view["kind"], view["norm"], view["need_the_model"]) == ("full", None, {"full": 1})
    assert "‖ΔW‖" not in text
    files = [tmp_path / "full.safetensors", tmp_path / "norm.safetensors", two[0]]
    status, out, _ = call("compare", "--json", *files)
    assert status == 0
    assert [lora["norm"] for lora in json.loads(out)["loras"][:2]] == [None, None]
    assert "A and B share no layer" in call("compare", *files)[1]


def test_a_zero_lora_can_be_compared(call, tmp_path, two):
    tensors = {name: t * 0 if "lora_up" in name else t for name, t in load_file(two[0]).items()}
    save_file(tensors, tmp_path / "zero.safetensors")
    for more in ([], ["--json"]):
        status, out, _ = call("compare", *more, tmp_path / "zero.safetensors", two[1])
        assert status == 0
        assert "NaN" not in out


def test_a_kernel_of_one_may_be_written_either_way(call, tmp_path):
    flat = write_lora(tmp_path / "flat.safetensors", {ATTN: (8, 2048), CONV: (4, 6)})
    kernel = write_lora(tmp_path / "kernel.safetensors", {ATTN: (8, 2048), CONV: (4, 6, 1, 1)})
    view = json.loads(call("compare", "--json", flat, kernel)[1])
    assert (view["fit"], view["shared"]) == (True, 2)


def test_compare_files_of_different_tools(host, call, tmp_path, lycoris_network):
    """kohya's names and PEFT's are the same layers."""
    network = lycoris_network(host.pipe, "locon", lora_dim=4, alpha=2, conv_lora_dim=3, conv_alpha=6)
    network.save_weights(str(tmp_path / "locon.safetensors"), torch.float32, {})
    network.restore()
    peft = pytest.importorskip("peft")
    unet = peft.get_peft_model(host.pipe.unet, peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    unet.save_pretrained(tmp_path)
    status, out, _ = call("compare", "--json", tmp_path / "locon.safetensors", tmp_path / "adapter_model.safetensors")
    view = json.loads(out)
    assert (status, view["fit"]) == (0, True)
    assert view["shared"] == view["loras"][1]["layers"] > 20
    assert view["loras"][1]["alone"] == 0


def test_a_merge_beside_its_parents_shows_what_is_left_of_their_overlap(host, call, pair_files, recipe_of, tmp_path):
    from ziplora_lib.job import run

    recipe = recipe_of(method="direct")
    parents = [p.copy(update={"strength": w}) for p, w in zip(recipe.parents, (0.5, 0.8))]
    run(recipe.copy(update={"parents": parents, "dtype": "fp32"}), host)
    status, out, _ = call("compare", "--json", tmp_path / "merged.safetensors", *pair_files)
    assert status == 0
    (merge,) = json.loads(out)["merges"]
    assert (merge["of"], merge["from"]) == ("A", ["B", "C"])
    assert merge["weighted_overlap"]["all"] == pytest.approx(0.4, rel=1e-3)
    assert merge["weighted_overlap"]["mid"] == pytest.approx(0.4, rel=1e-3)
    text = call("compare", tmp_path / "merged.safetensors", *pair_files)[1]
    assert "A is a merge of B and C: their overlap in it, 1 as in the sum at strengths of 1" in text
    view, _ = json.loads(call("inspect", "--json", tmp_path / "merged.safetensors", pair_files[0])[1])
    assert view["ziplora"]["recipe"]["method"] == "direct"
    text = call("inspect", tmp_path / "merged.safetensors")[1]
    for word in ("subject + style", "subject, style", "0.5 : 0.8", "direct"):
        assert word in text


def test_metadata_of_another_shape_does_not_break_inspect(seen, tmp_path):
    told = {
        "ziplora.parents": "[1, 2]",
        "ziplora.recipe": "{}",
        "ziplora.coefficients": "not json",
        "ss_resolution": "None",
    }
    view, _ = seen(write_lora(tmp_path / "a.safetensors", SDXL, told, alpha=4.0))
    assert view["training"] == {}
    assert view["ziplora"]["coefficients"] == "not json"
