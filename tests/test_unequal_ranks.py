"""Layers of unequal rank: a merge of LoRAs with other layer sets, as everybody else's loader reads it."""

import pytest
import torch


def test_diffusers_reads_every_layer_at_its_strength(host, recipe_of, tmp_path):
    """diffusers mixes up alphas that differ by layer, so a merged file has one."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file
    from test_loader_agreement import peft_deltas

    from ziplora_lib.job import run
    from ziplora_lib.lora.reader import read
    from ziplora_lib.recipe import Parent

    recipe = recipe_of(dtype="fp32", method="direct")
    for parent, keep in zip(recipe.parents, (lambda i: i < 60, lambda i: i >= 20)):
        tensors = load_file(parent.lora)
        layers = sorted({name.split(".")[0] for name in tensors if name.startswith("lora_unet")})
        kept = {layer for i, layer in enumerate(layers) if keep(i)}
        path = tmp_path / f"{parent.role}-part.safetensors"
        save_file({n: t for n, t in tensors.items() if n.split(".")[0] in kept}, path)
        parent.lora = str(path)
    assert all(isinstance(parent, Parent) for parent in recipe.parents)
    run(recipe, host)
    path = host.destination(recipe.output)
    lora = read(path)
    assert len({delta.rank for delta in lora.deltas.values()}) > 1
    given = peft_deltas(host.pipe, path)
    assert given.keys() == lora.deltas.keys()
    for key, delta in lora.deltas.items():
        wanted = delta.dense()
        torch.testing.assert_close(given[key].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-6)
