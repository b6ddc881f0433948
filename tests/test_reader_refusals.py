"""What is no readable LoRA is refused in words: which file, which key, and what to do."""

import json
import random
import struct

import pytest
import torch
from loras import lora_tensors, write_lora
from safetensors.torch import save_file

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.reader import UNREAD_KINDS, peek, read

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OTHER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"


@pytest.fixture
def good(tmp_path):
    """A good file's bytes, in a file of its own."""
    path = write_lora(tmp_path / "good.safetensors", {LAYER: (6, 8), OTHER: (6, 8)})
    assert len(read(path).deltas) == 2
    return path.read_bytes()


def refusal(path, *, key=None, word=""):
    """The one refusal of a file; asserts that it is complete."""
    with pytest.raises(BadInput) as caught:
        read(path)
    error = caught.value
    assert error.file
    assert path.name in error.file
    assert path.name in str(error)
    assert error.remedy
    assert error.remedy in str(error)
    assert "\n" not in str(error)
    assert word.lower() in str(error).lower()
    if key:
        assert error.key is not None
        assert key in error.key
        assert error.key in str(error)
    return error


def refused_bytes(tmp_path, content, word=""):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refusal(path, word=word)
    with pytest.raises(BadInput):
        peek(path)


def test_a_missing_file(tmp_path):
    refusal(tmp_path / "nowhere.safetensors", word="no such file")


def test_a_folder(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / "folder.safetensors")


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ""])
def test_a_pickle_is_never_opened(tmp_path, ending):
    path = tmp_path / f"lora{ending}"

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save(Trap(), path)
    refusal(path, word="safetensors")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"this is a text file, renamed", b"<html>404</html>" * 100, b"PK\x03\x04" * 50, b"\xff" * 64],
    ids=["empty", "one byte", "text", "html", "zip", "ones"],
)
def test_other_things_under_the_right_name(tmp_path, content):
    refused_bytes(tmp_path, content)


def test_a_pickle_under_the_right_name(tmp_path):
    torch.save({f"{LAYER}.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "p.safetensors")
    refusal(tmp_path / "p.safetensors")


def test_every_truncation(tmp_path, good):
    assert len(good) > 300
    for length in [*range(12), *range(12, len(good), 37), len(good) - 1]:
        refused_bytes(tmp_path, good[:length])


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path, good, length):
    refused_bytes(tmp_path, struct.pack("<Q", length) + good[8:])


def reheadered(content, change):
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@pytest.mark.parametrize("offsets", [[0, 10**9], [0, 1], [-4, 4], [192, 0], [8, 200], ["a", "b"], [0]])
def test_offsets_that_lie(tmp_path, good, offsets):
    name = f"{LAYER}.lora_down.weight"
    refused_bytes(tmp_path, reheadered(good, lambda header: header[name].update(data_offsets=offsets)))


@pytest.mark.parametrize("change", [{"shape": [400, 800]}, {"shape": [-1, 8]}, {"dtype": "F13"}, {"dtype": "F16"}])
def test_shapes_and_formats_that_lie(tmp_path, good, change):
    name = f"{LAYER}.lora_down.weight"
    refused_bytes(tmp_path, reheadered(good, lambda header: header[name].update(change)))


def test_trailing_bytes(tmp_path, good):
    refused_bytes(tmp_path, good + b"more")


def test_flipped_bits_are_read_or_refused_but_never_crash(tmp_path, good):
    """Most flips in the body are other numbers; whatever it is, it is a Lora or a BadInput."""
    chance, path, refused = random.Random(0), tmp_path / "flipped.safetensors", []
    for _ in range(300):
        content = bytearray(good)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            read(path)
        except BadInput as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(path.name in words for words in refused)


def save(tmp_path, change, **options):
    tensors = lora_tensors({LAYER: (6, 8), OTHER: (6, 8)}, alpha=2.0, **options)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_that_are_not_finite(tmp_path, part, value, dtype):
    def spoil(tensors):
        name = f"{LAYER}.{part}"
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    refusal(save(tmp_path, spoil), key=LAYER, word="not finite")


@pytest.mark.parametrize("part", ["up", "down"])
def test_half_a_layer(tmp_path, part):
    refusal(save(tmp_path, lambda t: t.pop(f"{LAYER}.lora_{part}.weight")), key=LAYER, word=f"no {part}")


def test_an_alpha_without_a_layer(tmp_path):
    refusal(save(tmp_path, lambda t: t.update({"lora_unet_out_2.alpha": torch.tensor(1.0)})), key="lora_unet_out_2")


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("lora_down.weight", torch.zeros(5, 8)),
        ("lora_up.weight", torch.zeros(6, 3)),
        ("lora_up.weight", torch.zeros(6)),
        ("lora_up.weight", torch.zeros(6, 4, 1)),
        ("lora_up.weight", torch.zeros(6, 4, 3, 3)),
        ("lora_down.weight", torch.zeros(())),
        ("lora_down.weight", torch.zeros(4, 0)),
        ("lora_down.weight", torch.zeros(4, 8, dtype=torch.int64)),
        ("lora_up.weight", torch.zeros(6, 4, dtype=torch.int8)),
        ("lora_up.weight", torch.zeros(6, 4, dtype=torch.bool)),
        ("alpha", torch.ones(2)),
        ("alpha", torch.ones(0)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{list(value.shape)}-{value.dtype}".replace("torch.", ""),
)
def test_factors_that_do_not_fit(tmp_path, part, tensor):
    refusal(save(tmp_path, lambda t: t.update({f"{LAYER}.{part}": tensor})), key=LAYER)


def test_a_rank_of_zero(tmp_path):
    def spoil(tensors):
        tensors[f"{LAYER}.lora_up.weight"] = torch.zeros(6, 0)
        tensors[f"{LAYER}.lora_down.weight"] = torch.zeros(0, 8)

    refusal(save(tmp_path, spoil), key=LAYER)


def test_a_layer_in_two_spellings(tmp_path):
    twin = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    refusal(save(tmp_path, lambda t: t.update({twin: torch.zeros(4, 8)})), word="twice")


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors", word="no LoRA layer")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.4.1.proj_in.weight",
        "first_stage_model.decoder.conv_in.weight",
        "emb_params",
        "clip_g",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_Q.weight",
        "lora_prior_unet_blocks_0.lora_down.weight",
    ],
)
def test_files_of_other_kinds_and_models(tmp_path, name):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors", key=name)


@pytest.mark.parametrize("mark", UNREAD_KINDS)
def test_every_kind_that_is_not_read_is_named(tmp_path, mark):
    name = f"{LAYER}{mark}" + ("" if mark.endswith("weight") else "x.weight" if mark.endswith(("_", "w", ".")) else "")
    kind = UNREAD_KINDS[mark]
    refusal(save(tmp_path, lambda t: t.update({name: torch.zeros(4, 4)})), key=name, word=kind)


@pytest.mark.parametrize(
    ("config", "word"),
    [("OFTConfig", "PEFT's OFT"), ("IA3Config", "PEFT's (IA)³"), ("VeraConfig", "VeRA"), ("BOFTConfig", "PEFT's BOFT")],
)
def test_kinds_of_peft_that_are_not_read(host, tmp_path, config, word):
    peft = pytest.importorskip("peft")
    options = {
        "IA3Config": {"feedforward_modules": []},
        "OFTConfig": {"r": 8, "oft_block_size": 0},
        "VeraConfig": {"r": 8},
    }.get(config, {})
    host.pipe.unet.requires_grad_(False)
    targets = r"down_blocks\.1\..*to_q"
    model = peft.get_peft_model(host.pipe.unet, getattr(peft, config)(target_modules=targets, **options))
    model.save_pretrained(tmp_path)
    error = refusal(tmp_path / "adapter_model.safetensors", key="base_model.", word=word)
    assert "not supported" in str(error)


def test_t_lora_of_lycoris(tmp_path):
    module = pytest.importorskip("lycoris.modules.tlora").TLoraModule("layer", torch.nn.Linear(8, 6), lora_dim=2)
    tensors = {f"{LAYER}.{name}": tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, tmp_path / "tlora.safetensors")
    refusal(tmp_path / "tlora.safetensors", key=LAYER, word="T-LoRA")


@pytest.mark.parametrize(
    ("parts", "lacking"),
    [
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2)}, "hada_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2)}, "lokr_w2_b"),
        ({"lokr_w2": (3, 4)}, "lokr_w1_a"),
        ({"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (6, 2)}, "b2"),
        ({"oft_blocks": (2, 3, 3), "lora_up.weight": (6, 4)}, "down"),
        ({"dora_scale": (6, 1), "lora_up.weight": (6, 4)}, "down"),
        ({"rescale": (6, 1)}, "oft_diag"),
    ],
)
def test_half_a_layer_of_other_kinds(tmp_path, parts, lacking):
    save_file({f"{LAYER}.{part}": torch.ones(shape) for part, shape in parts.items()}, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors", key=LAYER, word=f"no {lacking} part")


@pytest.mark.parametrize(
    "parts",
    [
        {"hada_w1_a": (6, 2), "hada_w1_b": (3, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (5, 2), "hada_w2_b": (2, 8)},
        {"hada_w1_a": (6,), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (1, 4)},
        {"lokr_w1": (4,), "lokr_w2": (3, 2)},
        {"lora_up.weight": (6, 2), "lora_down.weight": (2, 8, 1, 1), "lora_mid.weight": (3, 5, 3, 3)},
    ],
)
def test_parts_that_do_not_fit_each_other(tmp_path, parts):
    save_file({f"{LAYER}.{part}": torch.ones(shape) for part, shape in parts.items()}, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors", key=LAYER, word="fit each other")


def test_a_part_that_no_kind_has(tmp_path):
    refusal(save(tmp_path, lambda t: t.update({f"{LAYER}.lora_right.weight": torch.ones(4, 4)})), key="lora_right")


def test_a_dora_scale_alone(tmp_path):
    save_file({f"{LAYER}.dora_scale": torch.ones(6, 1)}, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors", key=LAYER)


def test_what_was_read_stays_when_the_file_is_overwritten_or_cut_short(good, tmp_path):
    """A mapped file would change its values, and end the program."""
    path = tmp_path / "good.safetensors"
    lora = read(path)
    before = {key: delta.dense().clone() for key, delta in lora.deltas.items()}
    with path.open("r+b") as file:
        file.seek(len(good) - 200)
        file.write(b"\0" * 200)
    assert all(torch.equal(delta.dense(), before[key]) for key, delta in lora.deltas.items())
    with path.open("r+b") as file:
        file.truncate(16)
    assert all(torch.equal(delta.dense(), before[key]) for key, delta in lora.deltas.items())
