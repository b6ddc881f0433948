"""Every kind of LoRA that the README says is read, in files of the libraries that define it: ΔW as read is their own."""

from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch
from kinds import FILES, layer_parts

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.opening import opened

README = Path(__file__).resolve().parent.parent / "README.md"
# of these only the settings differ, not the tensors
ALIKE = {"locon-rs", "peft-rslora", "diffusers-lora", "peft-lora", "norms", "peft-biases", "peft-loha", "peft-lokr"}
EXACT = [name for name, file in FILES.items() if file.natural and name not in ALIKE]


def test_the_readme_has_the_table_of_kinds():
    text = README.read_text(encoding="utf-8")
    between = text.split("<!-- kinds -->")[1].split("<!-- /kinds -->")[0]
    assert between.strip() == kinds.rendered()


@pytest.fixture(scope="module")
def pipe():
    """The miniature that the libraries write for."""
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.miniature import build_miniature

    return build_miniature()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The headless host with another miniature of the same weights."""
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.diffusers import DiffusersHost

    return DiffusersHost("miniature", tmp_path_factory.mktemp("reader"), "cpu")


@pytest.fixture
def write(pipe, tmp_path):
    """write(name, dtype): a file of the table, written for the whole miniature."""
    pytest.importorskip("lycoris.kohya")
    pytest.importorskip("peft")
    return lambda name, dtype="fp32": kinds.write(FILES[name], pipe, tmp_path, dtype)


def as_factors(host, lora, rank=None):
    (result,) = opened([lora], host, rank, lambda info: None)
    assert not result.left_out
    assert not result.lora.dense
    return result


def close(given, wanted, weight, key):
    """Equal but for fp32: the sum is in another order, and ‖W‖ was added and taken away."""
    error = float((given.reshape(wanted.shape) - wanted).norm())
    assert error <= 2e-5 * float(wanted.norm()) + 3e-7 * weight, (key, error, float(wanted.norm()))


def types(keys, shapes):
    """Which types of layers are among these."""
    marks = {
        "attention": lambda key: "lora_unet_" in key and "attn" in key,
        "feed-forward": lambda key: "_ff_net_" in key,
        "time": lambda key: "time_embed" in key or "emb_layers" in key,
        "stride 2": lambda key: key.endswith("_op"),
        "up": lambda key: key.endswith("_conv"),
        "text 1": lambda key: key.startswith("lora_te1_"),
        "text 2": lambda key: key.startswith("lora_te2_"),
        "linear": lambda key: len(shapes[key]) == 2,
        "conv 1x1": lambda key: shapes[key][2:] == (1, 1),
        "conv 3x3": lambda key: shapes[key][2:] == (3, 3),
    }
    return {name for name, mark in marks.items() if any(map(mark, keys))}


ALL = {"attention", "feed-forward", "time", "stride 2", "up", "text 1", "text 2", "linear", "conv 1x1", "conv 3x3"}


# the first file of each kind in every dtype, the others in one
IN_EVERY_DTYPE = {row.files[0].name for row in kinds.TABLE if row.files}
GRID = [(name, dtype) for name in FILES for dtype in kinds.DTYPES if dtype == "fp16" or name in IN_EVERY_DTYPE]


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_what_is_read_is_what_its_library_merges(reader, write, name, dtype):
    """Kept whole, nothing is lost: on every layer, each tensor read in the dtype that it was saved in."""
    written = write(name, dtype)
    lora = reader.open(str(written.path))
    assert set(lora.kinds) == FILES[name].kinds
    assert lora.dtype == str(kinds.DTYPES[dtype]).removeprefix("torch.")
    result = as_factors(reader, lora)
    assert result.loss is None or result.loss.worst == 0
    assert result.lora.deltas.keys() == written.deltas.keys()
    assert len(written.deltas) > 150
    shapes = {key: tuple(delta.shape) for key, delta in written.deltas.items()}
    missing = {"up", "stride 2", "conv 3x3"} if name == "lora" else set()
    assert ALL - types(shapes, shapes) == missing | ({"text 1", "text 2"} if FILES[name].by == "peft" else set())
    for key, delta in written.deltas.items():
        assert float(delta.norm()) > 1e-3 * written.weights[key], "there is something to read"
        close(result.lora.deltas[key].dense(), delta, written.weights[key], key)
    assert lora.vectors.keys() == written.vectors.keys()
    for key, wanted in written.vectors.items():
        for given, values in zip((lora.vectors[key].weight, lora.vectors[key].bias), wanted):
            assert (given is None) == (values is None)
            if values is not None:
                torch.testing.assert_close(given[0].float(), values.reshape(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_exact_kinds_get_the_rank_that_they_have_by_nature(reader, write, name, monkeypatch):
    """Whatever rank is asked for the others; and but for GLoRA without a decomposition, which would round."""
    written = write(name)
    lora = reader.open(str(written.path))
    of_full_rank = {key for key, layer in lora.dense.items() if layer.exact_rank is None}
    assert all(lora.dense[key].kind == "LoKr" for key in of_full_rank)
    exact = {key: layer for key, layer in lora.dense.items() if key not in of_full_rank}
    if not exact:
        monkeypatch.setattr(torch.linalg, "svd", None)
    result = as_factors(reader, replace(lora, dense=exact), rank=1)
    assert result.loss is None or result.loss.worst < 1e-6
    assert result.warnings() == []
    natural = FILES[name].natural
    for key, parts in layer_parts(written.path).items():
        if key not in written.deltas:
            continue
        full = min(written.deltas[key].shape[0], written.deltas[key][0].numel())
        if key in of_full_rank:
            assert natural(parts) >= full, key
        else:
            assert result.lora.deltas[key].rank == min(natural(parts), full), key


@pytest.mark.parametrize("name", ["lokr-whole", "dora", "ia3", "oft", "boft", "full"])
def test_the_loss_that_is_told_is_the_true_one(reader, write, name):
    written = write(name)
    lora, rank = reader.open(str(written.path)), 5
    result = as_factors(reader, lora, rank)
    left, energies, lost = {}, {}, {}
    for key in lora.dense:
        wanted, given = written.deltas[key].flatten(1).double(), result.lora.deltas[key]
        assert given.rank <= rank
        energies[key] = float(wanted.square().sum())
        left[key] = float((wanted - given.dense().flatten(1)).square().sum())
        lost[key] = left[key] / energies[key]
        best = float(torch.linalg.svdvals(wanted)[rank:].square().sum())
        assert left[key] <= best + 1e-5 * energies[key], "no factors of this rank would be nearer"
    assert result.loss.layers == len(lora.dense)
    assert result.loss.share == pytest.approx(sum(left.values()) / sum(energies.values()), rel=1e-3, abs=1e-6)
    assert result.loss.worst == pytest.approx(max(lost.values()), rel=1e-3, abs=1e-6)
    assert lost[result.loss.worst_key] == pytest.approx(result.loss.worst, rel=1e-3, abs=1e-6)
    (said,) = result.warnings()
    assert f"bringing {len(lora.dense)} layers to factors lost {result.loss.share:.2%}" in said
    assert "dense_rank" in said


def test_a_zero_layer_loses_nothing(reader, write, tmp_path):
    """DoRA at its start: ΔW is nothing but rounding, of which no share can be lost."""
    from safetensors.torch import load_file, save_file

    written = write("full")
    save_file({n: torch.zeros_like(t) for n, t in load_file(written.path).items()}, tmp_path / "zero.safetensors")
    result = as_factors(reader, reader.open(str(tmp_path / "zero.safetensors")), rank=2)
    assert all(float(delta.norm()) == 0 for delta in result.lora.deltas.values())
    assert result.loss.share == result.loss.worst == 0
    assert result.warnings() == []


def test_opening_can_be_stopped(reader, write):
    seen = []
    with pytest.raises(Stopped):
        opened([reader.open(str(write("full").path))], reader, 4, lambda info: seen.append(info) or len(seen) == 3)
    assert [info["step"] for info in seen] == [1, 2, 3]
    assert seen[0]["steps"] > 150
    assert seen[0]["phase"] == "open"


def test_old_rotations_are_left_out_and_named(reader, write, tmp_path):
    """LyCORIS reads them no more: they are said to be left out, and the rest of the file goes in."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(write("oft").path)
    name = next(n for n in tensors if n.endswith("attn1_to_q.oft_blocks"))
    tensors[name.replace("oft_blocks", "oft_diag")] = tensors.pop(name)
    save_file(tensors, tmp_path / "old.safetensors")
    lora = reader.open(str(tmp_path / "old.safetensors"))
    (result,) = opened([lora], reader, 4, lambda info: None)
    (left_out,) = result.left_out
    assert len(result.lora.deltas) == len(lora.layers) - 1
    assert any(f"1 layer ({left_out}) that cannot be applied" in said for said in result.warnings())


def test_a_layer_of_another_shape_is_refused_with_file_and_key(reader, write, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(write("full").path)
    name = next(n for n in tensors if n.endswith("attn1_to_q.diff"))
    tensors[name] = torch.zeros(7, 9)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match=r"\[7, 9\]") as caught:
        as_factors(reader, reader.open(str(tmp_path / "odd.safetensors")))
    assert caught.value.file == "odd.safetensors"
    assert caught.value.key in reader.open(str(tmp_path / "odd.safetensors")).dense
    assert caught.value.remedy


def test_a_norms_difference_as_comfyui_writes_it(reader, write, tmp_path):
    """ComfyUI's extraction calls a norm's weight `diff`, as that of any layer."""
    from safetensors.torch import load_file, save_file

    written = write("norms")
    parts = {".w_norm": ".diff", ".b_norm": ".diff_b"}
    tensors = {}
    for name, tensor in load_file(written.path).items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    save_file(tensors, tmp_path / "comfy.safetensors")
    lora, wanted = (reader.open(str(path)) for path in (tmp_path / "comfy.safetensors", written.path))
    assert lora.vectors.keys() == wanted.vectors.keys()
    for key, vectors in wanted.vectors.items():
        assert torch.equal(lora.vectors[key].weight, vectors.weight)
        assert torch.equal(lora.vectors[key].bias, vectors.bias)
    assert lora.layers == wanted.layers
    assert lora.kinds == wanted.kinds
