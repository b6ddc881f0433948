"""What headers tell at once: LoRAs in a glance, a catalogue of many, the preflight without values, what a merge will take."""

import math
import os

import kinds
import pytest
import torch
from kinds import FILES

from ziplora_lib import charts, effort
from ziplora_lib.errors import BadInput
from ziplora_lib.job import run
from ziplora_lib.lora.reader import glance, read


@pytest.fixture(scope="module")
def pipe():
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.miniature import build_miniature

    return build_miniature()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_glance_says_what_reading_says(name, pipe, tmp_path):
    pytest.importorskip("lycoris.kohya")
    pytest.importorskip("peft")
    path = kinds.write(FILES[name], pipe, tmp_path, "fp16").path
    seen, known = glance(path), read(path)
    for told in ("layers", "kinds", "ranks", "base", "dtype", "metadata", "sidecar"):
        assert getattr(seen, told) == getattr(known, told), told
    assert {key: delta.shape for key, delta in seen.deltas.items()} == {k: d.shape for k, d in known.deltas.items()}
    # no values were read
    assert all(delta.down.is_meta for delta in seen.deltas.values())
    assert not seen.deltas or math.isnan(seen.norm())


def test_a_few_layers_tell_base_and_kind(pair_files):
    for path in pair_files:
        few, known = glance(path, whole=False), read(path)
        assert (few.base, few.ranks) == (known.base, known.ranks)
        assert few.kinds.keys() <= known.kinds.keys()
        assert len(few.layers) < len(known.layers)


@pytest.mark.parametrize("content", [b"", b"no LoRA at all", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_glance_at_a_damaged_file_names_it(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"damaged\.safetensors"):
        glance(path)


def test_the_catalogue_follows_the_folder(host, tmp_path, pair_files):
    from ziplora_lib.catalogue import Catalogue

    catalogue = Catalogue(host)
    assert catalogue.look() == []
    (tmp_path / "below").mkdir()
    path = tmp_path / "below/subject.safetensors"
    path.write_bytes(pair_files[0].read_bytes())
    (tmp_path / "below/subject.png").write_bytes(b"picture")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    found = {entry.name: (entry, facts) for entry, facts in catalogue.look()}
    entry, facts = found["subject"]
    assert (entry.folder, facts.base, facts.rank, facts.recipe) == ("below", "SDXL", "3", {})
    assert entry.preview.endswith("subject.png")
    assert "broken.safetensors" in found["broken"][1].problem
    # another file under the same name
    path.write_bytes(pair_files[1].read_bytes())
    os.utime(path, (1, 1))
    assert catalogue.facts(entry).rank == "5"


def test_a_preflight_of_headers_refuses_what_headers_tell(host, recipe_of):
    from ziplora_lib.job import preflight

    recipe = recipe_of()
    quick, full = preflight(recipe, host, values=False).report, preflight(recipe, host).report
    unknown = {"norm"}
    for one, other in zip(quick["parents"], full["parents"]):
        assert {k: v for k, v in one.items() if k not in unknown} == {
            k: v for k, v in other.items() if k not in unknown
        }
        assert one["norm"] is None
    assert (quick["learned_layers"], quick["bytes"]) == (full["learned_layers"], full["bytes"])
    same = recipe.copy(update={"parents": [recipe.parents[0], recipe.parents[0].copy(update={"role": "style"})]})
    with pytest.raises(BadInput, match="same LoRA"):
        preflight(same, host, values=False)


def test_without_a_model_the_loras_are_held_against_each_other(host, recipe_of, monkeypatch, tmp_path):
    from loras import write_lora

    from ziplora_lib.job import preflight

    monkeypatch.setattr(host, "model_at_hand", lambda: None)
    report = preflight(recipe_of(), host, values=False).report
    assert report["model"] is None
    assert report["learned_layers"] > 0
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    old = write_lora(tmp_path / "old.safetensors", {name: (320, 768)}, rank=2, seed=1)
    with pytest.raises(BadInput, match="is a LoRA for SD 1"):
        preflight(recipe_of(style=old), host, values=False)


def test_what_a_merge_takes_grows_with_what_it_does(recipe_of):
    plain = effort.passes(recipe_of())
    assert effort.passes(recipe_of(steps=8)) > plain
    assert effort.passes(recipe_of(pictures=2)) > plain
    assert effort.passes(recipe_of(method="direct")) < plain
    assert effort.expected(recipe_of(), []) is None
    assert effort.expected(recipe_of(), [(recipe_of(), 10.0)]) == 10.0
    assert effort.expected(recipe_of(resolution=128), [(recipe_of(), 10.0)]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"steps": 10, "samples": 5, "batch": 2}, {"method": "ssr"}, {"objective": "paper"}, {"loss_guidance": 1.0},
        {"memory": "checkpointing", "pictures": 2, "balance_points": 3},
    ],
)  # fmt: skip
def test_what_a_merge_takes_is_what_it_does(host, recipe_of, fields):
    """Rows through the UNet, those with gradients twice, for their backward, but for the one that is only counted."""
    recipe, seen = recipe_of(**{"steps": 5, **fields}), []

    def count(_module, args, kwargs):
        seen.append((len(args[0]), torch.is_grad_enabled()))

    handle = host.pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        run(recipe, host)
    finally:
        handle.remove()
    recomputed = recipe.memory == "checkpointing"  # the blocks, which is no pass of the UNet's own
    rows = sum(n * (1 + grad * (2 if recomputed else 1)) for n, grad in seen)
    counted = next((n for n, grad in seen if grad), 0) * (3 if recomputed else 2) if recipe.at_once is None else 0
    assert rows - counted == effort.passes(recipe)


def test_curves_end_where_their_values_end():
    drawn = charts.curves("Loss <b>", {"one": [2.0, 1.0, 0.5], "two": [1.0, 1.0, 4.0], "too short": [1.0]})
    assert drawn.count("<polyline") == 2
    assert "Loss &lt;b&gt;" in drawn
    assert "<b>0.500</b>" in drawn
    assert "too short" not in drawn
    # the highest value of all is at the top
    top = f",{charts.TOP:.1f}"
    assert top in drawn.split("<polyline")[2]
    assert top not in drawn.split("<polyline")[1]
    assert charts.curves("x", {"one": [1.0]}) == ""
    steps = [{"loss": 2.0, "errors": [1.0, 1.0], "mean_m": [1.0, 1.0], "penalty": 9.0}] * 2
    assert "overlap" not in charts.learning(steps, ["subject", "style"], penalised=False)
    assert "overlap" in charts.learning(steps, ["subject", "style"], penalised=True)
