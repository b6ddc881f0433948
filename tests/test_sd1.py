"""SD 1.5 and SD 2.x without a WebUI: the miniature, every way to load a model, and a merge the whole way."""

import json
from pathlib import Path

import pytest
import torch
from loras import dense_deltas, kohya_name, write_lora

from ziplora_lib import job
from ziplora_lib.errors import BadInput
from ziplora_lib.job import preflight, run
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.recipe import parse

pytest.importorskip("diffusers")

SIDE = 64


def sd1():
    from ziplora_lib.hosts.miniature import build_miniature_sd1

    return build_miniature_sd1()


def sd2():
    """The miniature as SD 2.x: text of width 1024, linear projections, heads of one width."""
    from diffusers import UNet2DConditionModel

    pipe = sd1()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changes = {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (2, 4, 8, 8)}
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **changes).eval()
        text = type(pipe.text_encoder.config).from_dict(
            {**pipe.text_encoder.config.to_dict(), "hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu"}
        )
        pipe.text_encoder = type(pipe.text_encoder)(text).eval()
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two miniatures as folders that diffusers wrote, by base."""
    made = {}
    for base, build in {"sd1": sd1, "sd2": sd2}.items():
        made[base] = tmp_path_factory.mktemp(base)
        build().save_pretrained(made[base])
    return made


def host_of(model, folder):
    from ziplora_lib.hosts.diffusers import DiffusersHost

    return DiffusersHost(str(model), folder, "cpu")


def parents_of(pipe, folder):
    """A subject and a style with random factors, as kohya's trainer for SD 1.x and 2.x names their layers."""
    shapes = {
        kohya_name(part, name).replace("lora_te1_", "lora_te_"): tuple(module.weight.shape)
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    subject = {name: shape for name, shape in shapes.items() if "attn" in name or "sampler" in name}
    style = {name: shape for name, shape in shapes.items() if "lora_te_" not in name}
    said = {"ss_base_model_version": "sd_v2", "ss_v2": "True"} if pipe.unet.config.cross_attention_dim == 1024 else {}
    return (
        write_lora(folder / "subject.safetensors", subject, said, rank=3, alpha=1.5, seed=1, size=0.3),
        write_lora(folder / "style.safetensors", style, said, rank=5, alpha=10.0, seed=2, size=0.3),
    )


def recipe(parents, **fields):
    return parse({
        "parents": [
            {"lora": str(parents[0]), "role": "subject", "prompt": "a photo of sks cat"},
            {"lora": str(parents[1]), "role": "style", "prompt": "a house in szn style", "strength": 0.8},
        ],
        "output": "merged", "steps": 4, "resolution": SIDE, "pictures": 1, "samples": 4, "sampler_steps": 2,
        "balance_points": 1, "memory": "fast", "at_once": 8, "dtype": "fp32", **fields,
    })  # fmt: skip


# --- the miniature ----------------------------------------------------------------------------------


def test_the_miniature_is_the_same_every_time_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first, second = sd1(), sd1()
    assert torch.equal(state, torch.get_rng_state())
    for part in ("unet", "text_encoder", "vae"):
        ours, theirs = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_has_the_layers_of_sd15():
    """Names and shapes but for the width, against the original's numbers."""
    unet = sd1().unet
    modules = dict(unet.named_modules())
    keys = {
        layer_key(f"unet.{name}", "sd1")
        for name, m in modules.items()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    attended = {key.split("_transformer")[0] for key in keys if "attn2_to_k" in key}
    assert attended == {
        *(f"lora_unet_input_blocks_{n}_1" for n in (1, 2, 4, 5, 7, 8)), "lora_unet_middle_block_1",
        *(f"lora_unet_output_blocks_{n}_1" for n in range(3, 12)),
    }  # fmt: skip
    samplers = {key for key in keys if key.endswith("_op") or (key.endswith("_conv") and "output_blocks" in key)}
    assert samplers == {
        *(f"lora_unet_input_blocks_{n}_0_op" for n in (3, 6, 9)),
        "lora_unet_output_blocks_2_1_conv", "lora_unet_output_blocks_5_2_conv", "lora_unet_output_blocks_8_2_conv",
    }  # fmt: skip
    attention = modules["down_blocks.0.attentions.0"]
    assert isinstance(attention.proj_in, torch.nn.Conv2d)
    assert attention.transformer_blocks[0].attn2.to_k.in_features == 768
    heads = {m.heads for m in modules.values() if hasattr(m, "to_q")}
    assert heads == {8}


def test_its_pictures_follow_prompt_and_seed(tmp_path):
    host = host_of("miniature-sd1", tmp_path)
    red, blue, other = (
        host.sample(prompt, seed, 128, 4, 5.0)
        for prompt, seed in (
            ("a photo of a red cat", 1),
            ("a painting of a blue house", 1),
            ("a photo of a red cat", 2),
        )
    )
    assert (red - blue).std() > 0.01
    assert (red - other).std() > 0.1
    assert host.decode(red).size == (128, 128)


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sd1", "sd2"])
def test_a_folder_is_loaded_with_its_base(folders, tmp_path, base):
    host = host_of(folders[base], tmp_path)
    assert host.model().base == base
    assert host.model().prediction == "epsilon"
    pipe = {"sd1": sd1, "sd2": sd2}[base]()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        cond = host.encode("a photo of sks cat", SIDE)
        assert cond[0].shape == (1, 77, {"sd1": 768, "sd2": 1024}[base])
        wanted = pipe.unet(x, t, pipe.encode_prompt("a photo of sks cat", "cpu", 1, False)[0]).sample
        # up to rounding: where weights lie in memory decides on some processors in which order they are summed
        torch.testing.assert_close(host.predict(x, t, [cond]), wanted)


def test_a_single_file_is_loaded_with_its_base(folders, tmp_path, monkeypatch):
    """A checkpoint in the WebUI's format; which configuration belongs to it diffusers would look up on the hub."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "webui"))
    for module in ("single_file", "single_file_model"):
        monkeypatch.setattr(
            f"diffusers.loaders.{module}.fetch_diffusers_config",
            lambda checkpoint: {"pretrained_model_name_or_path": str(folders["sd1"])},
        )
    import ldm_miniature
    import sgm_miniature

    # diffusers' own encoder needs the channels that sgm's does not have
    monkeypatch.setattr(sgm_miniature, "_narrow_encoder_entry", lambda *_: None)
    checkpoint = ldm_miniature.write_ldm_miniature(tmp_path)
    host = host_of(checkpoint, tmp_path)
    assert host.model().base == "sd1"
    x, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([500]), "a photo of sks cat"
    other = host_of("miniature-sd1", tmp_path)
    with torch.no_grad():
        ours, wanted = (h.predict(x, t, [h.encode(prompt, SIDE)]) for h in (host, other))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"in_channels": 9}, {"in_channels": 8}, {"cross_attention_dim": 512}, {"class_embed_type": "projection"},
     {"addition_embed_type": "text"}],
)  # fmt: skip
def test_models_that_read_more_or_other_things_are_not_plain(changes):
    from ziplora_lib.hosts.diffusers import base_of

    pipe = sd1()
    assert base_of(pipe) == "sd1"
    pipe.unet.register_to_config(**changes)
    assert base_of(pipe) is None


def test_what_is_no_pipeline_is_refused_plainly(folders, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for model in (tmp_path / "other", tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(BadInput, match=r"SD 1\.5, SD 2\.x or SDXL") as caught:
            host_of(model, tmp_path)
        assert "miniature-sd1" in caught.value.remedy


# --- merges -----------------------------------------------------------------------------------------


@pytest.fixture
def learned(monkeypatch):
    """The coefficients of the run that follows, as the method returned them: {layer key: (2, columns)}."""
    kept, method = {}, METHODS["ziplora"]

    def recording(*args):
        merged = method(*args)
        kept.update(merged.coefficients)
        return merged

    monkeypatch.setitem(job.METHODS, "ziplora", recording)
    return kept


def expected(parents, strengths, coefficients, base):
    """Eq. 2 in float64 from the parents' own tensors: {layer key: ΔW_m}."""
    total = {}
    for i, (file, strength) in enumerate(zip(parents, strengths)):
        for name, delta in dense_deltas(file).items():
            key, delta = layer_key(name, base), strength * delta
            if key in coefficients:
                delta = delta * coefficients[key][i].double().reshape(delta.shape[1:])
            total[key] = total.get(key, 0) + delta
    return total


def peft_deltas(pipe, path, base):
    """ΔW of every layer as diffusers loads the file and peft applies it."""
    pytest.importorskip("peft")
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="merged")
    return {
        layer_key(f"{part}.{name}", base): module.get_delta_weight("merged").detach()
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if hasattr(module, "get_delta_weight") and "merged" in module.lora_A
    }


V = {"prediction_type": "v_prediction"}
ZSNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("base", "schedule"),
    [("sd1", {}), ("sd1", ZSNR), ("sd1", {**V, **ZSNR}), ("sd2", V)],
    ids=["sd1", "sd1 zsnr", "sd1 v zsnr", "sd2 v"],
)
def test_a_merge_goes_the_whole_way(folders, tmp_path, learned, base, schedule):
    pipe = {"sd1": sd1, "sd2": sd2}[base]()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **schedule)
    scheduler.save_pretrained(folders[base] / "scheduler")
    host, parents = host_of(folders[base], tmp_path), parents_of(pipe, tmp_path)
    prediction = "v" if schedule.get("prediction_type") else "epsilon"
    assert host.model().prediction == prediction

    torch.testing.assert_close(host.alphas, scheduler.alphas_cumprod)
    before = host.sample("a photo of sks cat", 1, SIDE, 2, 5.0)
    # the paper's form: its columns are combinations of the LoRAs' own
    result = run(recipe(parents, objective="paper"), host)
    assert torch.equal(host.sample("a photo of sks cat", 1, SIDE, 2, 5.0), before)
    assert (tmp_path / "merged.png").is_file()
    assert all(torch.isfinite(torch.tensor(result.learned["error"])))

    path = tmp_path / "merged.safetensors"
    merged = read(path)
    assert merged.base == base
    assert merged.metadata["ss_v2"] == str(base == "sd2")
    assert merged.metadata["modelspec.prediction_type"] == prediction
    assert json.loads(path.with_suffix(".json").read_text())["sd version"] == base.upper()

    assert learned, "there are layers that both have"
    wanted = expected(parents, (1.0, 0.8), learned, base)
    theirs = peft_deltas(pipe, path, base)
    assert merged.deltas.keys() == wanted.keys() == theirs.keys()
    for key, delta in wanted.items():
        for found in (merged.deltas[key].dense().double(), theirs[key].double()):
            error = (found.reshape(delta.shape) - delta).norm() / delta.norm()
            assert error < 1e-5, key


def test_a_lora_for_the_other_base_is_refused_on_either(tmp_path, pair_files):
    parents = parents_of(sd1(), tmp_path)
    for model, pair, words in (
        ("miniature", parents, "is a LoRA for SD 1.5, but miniature is SDXL"),
        ("miniature-sd1", pair_files, "is SD 1.5|of miniature-sd1"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            preflight(recipe(pair), host_of(model, tmp_path))
        assert caught.value.file
        assert caught.value.remedy


def test_a_resolution_that_doubles_pictures_is_pointed_out(tmp_path):
    host, parents = host_of("miniature-sd1", tmp_path), parents_of(sd1(), tmp_path)
    for resolution, warned in ((512, False), (768, False), (1024, True)):
        warnings = preflight(recipe(parents, resolution=resolution), host).report["warnings"]
        assert any("doubles" in warning for warning in warnings) == warned
