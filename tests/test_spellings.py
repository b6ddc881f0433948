"""A file saved in each spelling, in somebody else's hands: diffusers' and PEFT's loaders find the ΔW that was meant."""

import json

import pytest
import torch
from architectures import text_name
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import LAYER_NAMES, layer_key, spelled
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack

BASES = ("sdxl", "sd1")
RANKS = {"equal ranks": [4], "different ranks": [3, 1, 5, 3, 2]}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


@pytest.fixture
def pipe(base):
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.miniature import MINIATURES

    return MINIATURES["miniature" if base == "sdxl" else "miniature-sd1"]()


def parts_of(pipe):
    return {part: getattr(pipe, part) for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, part)}


def key_of(base, part, name):
    return layer_key(f"{part}.{name if part == 'unet' else text_name(name)}", base)


def random_stacks(pipe, base, ranks):
    """Two LoRAs stacked on every Linear and Conv2d of the pipeline."""
    generator, stacks = torch.Generator().manual_seed(0), {}
    for part, root in parts_of(pipe).items():
        for name, module in root.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            shape, rank = module.weight.shape, ranks[len(stacks) % len(ranks)]
            deltas = [
                LowRankDelta(
                    torch.randn(shape[0], r, generator=generator), torch.randn(r, *shape[1:], generator=generator), 0.5
                )
                for r in (rank, 1)
            ]
            stacks[key_of(base, part, name)] = Stack.of(deltas)
    assert len(stacks) > 200
    return stacks


def assert_same(given, stacks):
    assert given.keys() == stacks.keys()
    for key, stack in stacks.items():
        wanted = stack.total().dense()
        torch.testing.assert_close(given[key].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4, msg=f"{key} differs")


def adapted(pipe, base, adapter):
    """ΔW as peft applies it, by layer key."""
    return {
        key_of(base, part, name): module.get_delta_weight(adapter).detach()
        for part, root in parts_of(pipe).items()
        for name, module in root.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


def save(path, pipe, base, names, ranks=(4,), dtype="fp32", **options):
    stacks = random_stacks(pipe, base, ranks)
    saved = writer.write(path, stacks, dtype, {"ss_output_name": path.stem}, False, names=names, base=base, **options)
    assert saved["largest_error"] < (1e-6 if dtype == "fp32" else 1e-2)
    return stacks


@pytest.fixture
def path(tmp_path):
    return tmp_path / "merged.safetensors"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("names", LAYER_NAMES)
def test_our_own_reader(path, pipe, base, names, ranks):
    stacks = save(path, pipe, base, names, RANKS[ranks])
    lora = read(path)
    assert lora.base == base
    assert_same({key: delta.dense() for key, delta in lora.deltas.items()}, stacks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_pipelines(path, pipe, base, names, ranks):
    pytest.importorskip("peft")
    stacks = save(path, pipe, base, names, RANKS[ranks])
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="merged")
    assert_same(adapted(pipe, base, "merged"), stacks)


def test_diffusers_names_need_settings_only_where_ranks_differ(tmp_path, pipe, base):
    for ranks in RANKS:
        path = tmp_path / f"{ranks}.safetensors"
        stacks = save(path, pipe, base, "diffusers", RANKS[ranks])
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        assert ("lora_adapter_metadata" in metadata) == (ranks == "different ranks")
        assert not any("alpha" in name for name in load_file(path))
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert sum(len(settings[f"{part}.target_modules"]) for part in parts_of(pipe)) == len(stacks)
    assert settings["unet.alpha_pattern"] == settings["unet.rank_pattern"]


def test_diffusers_names_without_the_settings(path, pipe, base):
    """As tools that drop the metadata pass the file on: the same ΔW, from the tensors alone."""
    pytest.importorskip("peft")
    # a projection's rank is looked for in the settings alone
    stacks = save(path, pipe, base, "diffusers", RANKS["different ranks"])
    tensors = {name: value for name, value in load_file(path).items() if "text_projection" not in name}
    pipe.load_lora_weights(tensors, adapter_name="merged")
    stacks.pop("lora_te2_text_projection", None)
    assert_same(adapted(pipe, base, "merged"), stacks)


@pytest.mark.parametrize("ranks", RANKS)
def test_peft_on_the_modules(path, pipe, base, ranks):
    peft = pytest.importorskip("peft")
    stacks = save(path, pipe, base, "peft", RANKS[ranks])
    tensors = load_file(path)
    for part, root in parts_of(pipe).items():
        own = {
            name.removeprefix(f"base_model.model.{part}."): value
            for name, value in tensors.items()
            if name.startswith(f"base_model.model.{part}.")
            or (part == "unet" and not name.startswith("base_model.model.text_"))
        }
        if part != "unet" and not hasattr(root, "text_model"):  # newer transformers
            own = {name.removeprefix("text_model."): value for name, value in own.items()}
        bare = {
            name.removeprefix("base_model.model.").split(".lora_")[0]: v for name, v in own.items() if "lora_A" in name
        }
        each = {f"^{name}": value.shape[0] for name, value in bare.items()}
        config = peft.LoraConfig(
            r=1, lora_alpha=1, rank_pattern=each, alpha_pattern=each, target_modules=list(bare), init_lora_weights=False
        )
        wrapped = peft.get_peft_model(root, config)
        own = {name if name.startswith("base_") else f"base_model.model.{name}": value for name, value in own.items()}
        result = peft.set_peft_model_state_dict(wrapped, own)
        assert result.unexpected_keys == []
        assert not [name for name in result.missing_keys if "lora_" in name]
    assert_same(adapted(pipe, base, "default"), stacks)


def test_kohyas_names_of_sd1_are_those_of_kohyas_tools(path, pipe, base):
    save(path, pipe, base, "kohya")
    starts = {name.split("_blocks")[0].split("_block")[0] for name in load_file(path) if "block" in name}
    assert starts == ({"lora_unet_input", "lora_unet_middle", "lora_unet_output"} if base == "sdxl" else
                      {"lora_unet_down", "lora_unet_mid", "lora_unet_up"})  # fmt: skip


LINEAR = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
NORM = "lora_unet_input_blocks_4_1_norm"


def one_layer(rank=2):
    return {LINEAR: Stack.of([LowRankDelta(torch.ones(4, rank), torch.ones(rank, 6))])}


def write(path, names="kohya", extra=None, metadata=None, dtype="fp16", stacks=None):
    return writer.write(path, stacks or one_layer(), dtype, metadata or {}, True, names=names, extra=extra or {})


def test_settings_of_another_file_do_not_come_along(path):
    """diffusers refuses a kohya file with PEFT's settings in it."""
    for names in LAYER_NAMES:
        write(path, names, metadata={"lora_adapter_metadata": '{"unet.r": 7}', "kept": "yes"})
        assert "lora_adapter_metadata" not in read(path).metadata
        assert read(path).metadata["kept"] == "yes"


@pytest.mark.parametrize("names", ["diffusers", "peft"])
def test_a_layer_without_a_name_leaves_no_file(path, names):
    strange = {"lora_unet_input_blocks_77_1_proj_in": one_layer()[LINEAR]}
    with pytest.raises(BadInput, match="input_blocks_77_1"):
        write(path, names, stacks=strange)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("names", LAYER_NAMES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_what_else_is_to_be_saved(path, names, dtype):
    layer = spelled(NORM, "sdxl", names)
    extra = {
        f"{layer}.w_norm": torch.linspace(-1, 1, 7),
        f"{layer}.b_norm": torch.linspace(0, 3, 7, dtype=torch.float64),
        "bundle_emb.cat.clip_l": torch.randn(2, 8),
    }
    saved = write(path, names, extra, dtype=dtype)
    tensors = load_file(path)
    assert tensors.keys() > extra.keys()
    for name, value in extra.items():
        assert tensors[name].dtype == writer.DTYPES[dtype]
        torch.testing.assert_close(tensors[name], value.to(writer.DTYPES[dtype]), rtol=0, atol=0)
    assert (saved["largest_error"] < 1e-7) == (dtype == "fp32")


def test_what_else_is_to_be_saved_is_checked(path):
    with pytest.raises(BadInput, match="do not fit fp16") as caught:
        write(path, extra={f"{NORM}.w_norm": torch.tensor([1e6])})
    assert caught.value.key == f"{NORM}.w_norm"
    with pytest.raises(BadInput, match="do not fit fp32"):
        write(path, extra={f"{NORM}.w_norm": torch.tensor([float("nan")])}, dtype="fp32")
    with pytest.raises(BadInput, match="twice"):
        write(path, extra={f"{LINEAR}.alpha": torch.tensor(1.0)})
    assert list(path.parent.iterdir()) == []


def test_a_disk_that_gives_back_something_else_is_noticed_there_too(path, monkeypatch):
    original = writer.load_file
    monkeypatch.setattr(
        writer, "load_file", lambda name: {k: v + 1 if "norm" in k else v for k, v in original(name).items()}
    )
    with pytest.raises(OSError, match="read back"):
        write(path, extra={f"{NORM}.w_norm": torch.ones(3)})
    assert list(path.parent.iterdir()) == []
