"""Every column of the saved file, from the files alone: some (m_c, m_s) times the parents' columns, and nothing else."""

import pytest
import torch
from loras import dense_deltas, write_lora

from ziplora_lib.job import run
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read

UNIT = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134), "fp32": (2.0**-24, 2.0**-150)}


def by_key(path):
    return {layer_key(name): delta for name, delta in dense_deltas(path).items()}


def fitted(merged, parents):
    """Least squares for the coefficients of every column, by itself: ((P, columns), residual norms)."""
    merged = merged.flatten(1).T  # (columns, out)
    basis = torch.stack([parent.reshape(parent.shape[0], -1).T for parent in parents], dim=2)
    m = torch.linalg.lstsq(basis, merged[:, :, None]).solution
    return m[:, :, 0].T, (merged - (basis @ m)[:, :, 0]).norm(dim=1)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_column_is_a_combination_of_the_parents_columns(host, pair_files, recipe_of, dtype):
    path = host.destination("merged")
    result = run(recipe_of(dtype=dtype, lr=0.02, steps=10, objective="paper"), host)
    subject, style, merged = by_key(pair_files[0]), by_key(pair_files[1]), by_key(path)
    assert merged.keys() == subject.keys() | style.keys()
    unit, least = UNIT[dtype]
    everything, saved = ([], []), read(path).deltas
    assert len(subject.keys() & style.keys()) > 20
    for key, delta in merged.items():
        # each factor was rounded once: no column is off by more than 2 u |up| |down|, summed over the ranks
        # (with alpha / rank, which readers multiply by)
        up, down = saved[key].up.double().abs() * saved[key].scale, saved[key].down.double().abs().flatten(1)
        bound = (
            (2.02 * unit + 40 * 2.0**-24) * (up @ down)
            + 2 * least * (up.sum(1)[:, None] + saved[key].scale * down.sum(0))
        ).norm(dim=0)
        had = [i for i, parent in enumerate((subject, style)) if key in parent]
        if key.startswith("lora_unet_"):
            m, residual = fitted(delta, [(subject, style)[i][key] for i in had])
            for i, row in zip(had, m):
                everything[i].append(row)
        else:  # a text encoder's: as it was
            residual = (delta - sum((subject, style)[i][key].reshape(delta.shape) for i in had)).flatten(1).norm(dim=0)
        assert (residual <= bound).all(), key
    own = [torch.cat(rows) for rows in everything]
    assert [float(m.mean()) for m in own] == pytest.approx(result.learned["mean"], abs=0.01)
    assert min(float(m.std()) for m in own) > 0.01, "they were learned"
    assert sum(m.numel() for m in own) == result.learned["coefficients"]


def test_strength_scales_the_coefficients_and_the_layers_that_keep_it(host, pair_files, recipe_of):
    recipe = recipe_of(dtype="fp32", method="direct")
    recipe.parents[0].strength, recipe.parents[1].strength = 0.5, 1.5
    run(recipe, host)
    subject, style, merged = by_key(pair_files[0]), by_key(pair_files[1]), by_key(host.destination("merged"))
    for key, delta in merged.items():
        wanted = 0.5 * subject.get(key, torch.zeros(1)).double() + 1.5 * style.get(key, torch.zeros(1)).double()
        torch.testing.assert_close(delta, wanted.reshape(delta.shape), rtol=1e-5, atol=1e-6)


def test_layers_that_the_model_lacks_are_kept_and_told(host, pair_files, recipe_of, layers, tmp_path):
    stranger = {
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q": (8, 12),
        "lora_te1_text_model_extra": (4, 4),
    }
    known = {"lora_unet_" + name.replace(".", "_"): shape for (_, name), shape in layers.items() if "attn1" in name}
    odd = write_lora(tmp_path / "odd.safetensors", {**known, **stranger}, rank=2, seed=7)
    result = run(recipe_of(subject=odd, dtype="fp32"), host)
    merged = by_key(host.destination("merged"))
    for name, delta in dense_deltas(odd).items():
        if name in stranger:
            torch.testing.assert_close(merged[name], delta, rtol=1e-5, atol=1e-7)
    assert any("odd has 2 layers (" in warning and "this model does not have" in warning for warning in result.warnings)
