"""A model in half precision: what its numbers cannot hold is done once again in fp32, and it is as before afterwards."""

import contextlib

import pytest
import torch
from test_host_untouched import changes, everything, picture

from ziplora_lib.errors import MergeFailed
from ziplora_lib.hosts.precision import full_precision
from ziplora_lib.job import run
from ziplora_lib.lora.reader import read


@pytest.fixture
def half(tmp_path):
    """The miniature in fp16, on the CPU."""
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.diffusers import DiffusersHost

    host = DiffusersHost("miniature", tmp_path, "cpu")
    host.pipe.to(torch.float16)
    return host


def too_large(host):
    """Values in an attention that no fp16 holds and fp32 does, with the same output."""
    block = next(m for m in host.pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    to_out = block.attn1.to_out[0]
    with torch.no_grad():
        block.attn1.to_v.weight.mul_(2**16)
        to_out.weight.mul_(2**-16)
    return host


def test_full_precision_comes_and_goes_to_the_bit():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)).half()
    model[2].float()
    parameters, before = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    with contextlib.suppress(ZeroDivisionError), full_precision([model]):
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_a_merge_in_fp16_learns_what_one_in_fp32_does(half, host, recipe_of):
    """The bound: ΔW is off by less than a tenth of its norm, and the errors against each LoRA alone by less than 5 %.

    Single columns differ more: Adam moves one whose gradient is nothing but rounding as far as any other.
    """
    merged, errors = [], []
    for name, on in (("half", half), ("whole", host)):
        result = run(recipe_of(output=name, objective="paper", steps=20, lr=0.02, samples=20, dtype="fp32"), on)
        assert not any("float" in warning for warning in result.warnings)
        errors.append(result.learned["error"])
        merged.append({key: delta.dense() for key, delta in read(on.destination(name)).deltas.items()})
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert max(errors[1]) < max(result.learned["error_plain_sum"]) / 2

    def norm(of):
        return float(torch.stack([t.norm() for t in of]).norm())

    assert norm(merged[0][key] - merged[1][key] for key in merged[1]) < 0.1 * norm(merged[1].values())


@pytest.mark.parametrize("method", ["ziplora", "ssr"])
def test_what_fp16_cannot_hold_is_begun_again_in_fp32_and_says_so(half, recipe_of, method):
    host = too_large(half)
    picture(host)  # what libraries install with the first use is not ours
    before = everything(host)
    told = []
    result = run(recipe_of(method=method, steps=2), host, told.append)
    assert result.warnings[0] == "the model gave no finite values in float16: begun again in float32"
    assert [info["what"] for info in told if info.get("again")] == result.warnings[:1]
    assert all(error < 10 for error in result.learned["error"])
    assert changes(before, everything(host)) == []
    assert host.model().dtype == "float16"


def test_what_fp32_cannot_hold_either_fails_plainly_and_once(half, recipe_of):
    host = half
    with torch.no_grad():
        host.pipe.unet.conv_out.bias.fill_(torch.inf)
    told = []
    with pytest.raises(MergeFailed, match="finite"):
        run(recipe_of(steps=2), host, told.append)
    assert sum(bool(info.get("again")) for info in told) == 1
    assert not host.destination("merged").exists()
