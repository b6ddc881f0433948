"""Files written by other people's tools: ΔW as read is the writer's own ΔW, for every layer of the miniature."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read

PARTS = ("unet", "text_encoder", "text_encoder_2")
# every Linear and Conv2d, by the ends of their names
ALL = r"(.*\.)?(to_[qkv]|to_out\.0|time_emb_proj|proj|proj_in|proj_out|net\.2|conv|conv[12]|conv_(shortcut|in|out)|linear_.)"
TEXT = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2|text_projection)"


def randomised(pipe, **config):
    """The pipeline with peft adapters of random values: {layer key: peft's own ΔW}."""
    peft = pytest.importorskip("peft")
    wanted = {}
    for part in PARTS:
        root = getattr(pipe, part)
        root.add_adapter(peft.LoraConfig(target_modules=ALL if part == "unet" else TEXT, **config))
        generator = torch.Generator().manual_seed(len(part))
        for name, parameter in root.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        for name, module in root.named_modules():
            if hasattr(module, "get_delta_weight"):
                wanted[layer_key(f"{part}.{name}")] = module.get_delta_weight("default").detach()
    assert len(wanted) > 250
    assert any(delta.ndim == 4 and delta.shape[2:] == (3, 3) for delta in wanted.values())
    return wanted


def state_dicts(pipe):
    utils = pytest.importorskip("peft.utils")
    return {part: utils.get_peft_model_state_dict(getattr(pipe, part)) for part in PARTS}


def assert_read_as(path, wanted):
    lora = read(path)
    assert lora.deltas.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert lora.deltas[key].shape[:2] == delta.shape[:2]
        given = lora.deltas[key].dense().reshape(delta.shape)
        torch.testing.assert_close(given, delta.float(), rtol=1e-5, atol=1e-6, msg=f"{key} differs")
    return lora


def test_kohya_as_diffusers_converts_to_it(host, tmp_path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    # the converter writes the rank as every alpha, so only such an adapter comes through unchanged
    wanted = randomised(host.pipe, r=4, lora_alpha=4)
    named = {}
    for part, state in state_dicts(host.pipe).items():
        # the converter hangs the prefix on whatever transformers calls the layer; kohya's trainers say text_model
        for key, value in state.items():
            inner = "text_model." if key.startswith("encoder.") else ""
            named[f"{part}.{inner}{key}"] = value
    path = tmp_path / "kohya.safetensors"
    file = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(named).items()}
    assert any(key.startswith("lora_te2_text_model_encoder_layers_0") for key in file)
    save_file(file, path)
    assert_read_as(path, wanted)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.unet.", "unet."])
def test_peft_state_dict_of_a_unet(host, tmp_path, prefix):
    wanted = {key: delta for key, delta in randomised(host.pipe, r=4, lora_alpha=4).items() if "_unet_" in key}
    state = state_dicts(host.pipe)["unet"]
    if not prefix:  # only layers inside a block can be told without a prefix
        state = {name: value for name, value in state.items() if "_block" in name.split(".")[0]}
        wanted = {
            key: delta for key, delta in wanted.items() if "block" in key and not key.endswith("input_blocks_0_0")
        }
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, tmp_path / "peft.safetensors")
    assert_read_as(tmp_path / "peft.safetensors", wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_save_lora_weights(host, tmp_path, rslora):
    wanted = randomised(
        host.pipe, r=4, lora_alpha=6, use_rslora=rslora, rank_pattern={"to_k": 2}, alpha_pattern={r"attn2\.to_k": 5}
    )
    states, settings = state_dicts(host.pipe), {}
    for part in PARTS:
        settings[f"{part}_lora_adapter_metadata"] = getattr(host.pipe, part).peft_config["default"].to_dict()
    host.pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        text_encoder_2_lora_layers=states["text_encoder_2"],
        **settings,
    )
    lora = assert_read_as(tmp_path / "pytorch_lora_weights.safetensors", wanted)
    assert "lora_adapter_metadata" in lora.metadata
    assert lora.ranks == [2, 4]


def test_diffusers_save_lora_weights_without_settings_means_alpha_is_the_rank(host, tmp_path):
    wanted = randomised(host.pipe, r=4, lora_alpha=4)
    states = state_dicts(host.pipe)
    host.pipe.save_lora_weights(tmp_path, states["unet"], states["text_encoder"], states["text_encoder_2"])
    lora = assert_read_as(tmp_path / "pytorch_lora_weights.safetensors", wanted)
    assert "lora_adapter_metadata" not in lora.metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lycoris_locon(host, tmp_path, lycoris_network, dtype):
    network = lycoris_network(host.pipe, "locon", lora_dim=4, alpha=2, conv_lora_dim=3, conv_alpha=6)
    network.to(dtype)
    network.save_weights(str(tmp_path / "locon.safetensors"), dtype, {"ss_network_module": "lycoris.kohya"})
    network.float()
    wanted = {layer_key(lora.lora_name): lora.get_diff_weight(1.0)[0].detach() for lora in network.loras}
    lora = assert_read_as(tmp_path / "locon.safetensors", wanted)
    assert lora.ranks == [3, 4]
    assert {delta.shape[2:] for delta in wanted.values()} == {(), (1, 1), (3, 3)}


def test_lycoris_settings_reach_the_file(host, tmp_path, lycoris_network):
    """The check of the check: LyCORIS' files have alphas that are not the ranks."""
    from safetensors.torch import load_file

    network = lycoris_network(host.pipe, "locon", lora_dim=4, alpha=2, conv_lora_dim=3, conv_alpha=6)
    network.save_weights(str(tmp_path / "locon.safetensors"), torch.float32, {})
    alphas = {float(value) for name, value in load_file(tmp_path / "locon.safetensors").items() if "alpha" in name}
    assert alphas == {2.0, 6.0}


def test_peft_save_pretrained(host, tmp_path):
    """peft's own save_pretrained keeps alpha in adapter_config.json beside the weights."""
    peft = pytest.importorskip("peft")
    unet = peft.get_peft_model(host.pipe.unet, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    wanted = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            module.lora_B["default"].weight.data.normal_()
            wanted[layer_key(name)] = module.get_delta_weight("default").detach()
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert_read_as(tmp_path / "adapter_model.safetensors", wanted)
