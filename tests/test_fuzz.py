"""The fuzzer: a slice of its inputs, proof that it sees faults, and what it found, by name. See fuzz.py."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("resource")  # not on Windows

import fuzz

from ziplora_lib import history, inspection
from ziplora_lib.__main__ import main
from ziplora_lib.errors import BadInput, one_line
from ziplora_lib.lora import bake, reader
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.vectors import Vectors

ROOT = Path(__file__).resolve().parent.parent
LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
PEFT = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NORM = "lora_unet_input_blocks_4_1_norm"
SLICE = 2000


def test_a_slice_of_inputs(tmp_path):
    """In a process of its own, as the long run is; what that came to is in benchmarks/results/fuzz.json."""
    report = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(SLICE), "--seed", "7", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["inputs"] == SLICE == sum(found["counts"].values())
    assert (found["counts"]["failed"], found["faults"]) == (0, [])
    # neither all refused nor all read, and results were compared
    assert min(found["counts"]["read"], found["counts"]["refused"]) > SLICE / 10
    assert found["checks"]["ΔW compared"] > SLICE / 2
    assert found["checks"]["split"] > SLICE / 50


def test_an_input_is_its_seed_and_number():
    for number in range(60):
        one, other = fuzz.made(3, number), fuzz.made(3, number)
        assert (one.bytes, one.beside, one.name, one.done) == (other.bytes, other.beside, other.name, other.done)
    assert fuzz.made(3, 1).bytes != fuzz.made(4, 1).bytes


# --- planted faults -------------------------------------------------------------------------------------------------


def right_input() -> int:
    """The number of an input that is right and not changed, with a layer that is surely read as factors."""
    found = ((n, fuzz.made(0, n)) for n in range(200))
    return next(n for n, one in found if one.done == ["right"] and one.deltas.keys() - one.dense)


def kinds_of_faults(room, number=None):
    found = fuzz.one(0, right_input() if number is None else number, room)
    return {(fault["kind"], fault["check"]) for fault in found["faults"]}


def planted(monkeypatch, instead, where=reader, name="read"):
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *given, **more: instead(real, *given, **more))


def test_nothing_planted(tmp_path):
    assert kinds_of_faults(tmp_path) == set()


def test_another_exception_is_seen(monkeypatch, tmp_path):
    planted(monkeypatch, lambda real, path: {}["alpha"])
    assert ("exception", "read") in kinds_of_faults(tmp_path)


def test_nan_is_seen(monkeypatch, tmp_path):
    def broken(real, path):
        lora = real(path)
        for delta in lora.deltas.values():
            delta.up.fill_(float("nan"))
        return lora

    planted(monkeypatch, broken)
    assert {("wrong", "delta"), ("exception", "compare json")} <= kinds_of_faults(tmp_path)


def test_a_wrong_alpha_is_seen(monkeypatch, tmp_path):
    def broken(real, path):
        lora = real(path)
        for key, delta in lora.deltas.items():
            lora.deltas[key] = delta.strength(1.001)
        return lora

    planted(monkeypatch, broken)
    assert ("wrong", "delta") in kinds_of_faults(tmp_path)


@pytest.mark.parametrize("limit", ["SECONDS", "WAIT"])
def test_a_hang_is_seen(monkeypatch, tmp_path, limit):
    def endless(real, path):
        while True:
            time.sleep(60 if limit == "WAIT" else 0)

    monkeypatch.setattr(fuzz, limit, 0.5)
    planted(monkeypatch, endless)
    assert ("hang", "read") in kinds_of_faults(tmp_path)


def test_an_absurd_allocation_is_seen(monkeypatch, tmp_path):
    planted(monkeypatch, lambda real, path: torch.zeros(1 << 30))
    assert ("memory", "read") in kinds_of_faults(tmp_path)


def test_a_pickle_that_is_opened_is_seen(monkeypatch, tmp_path):
    pickled = next(n for n in range(5000) if fuzz.made(0, n).special == "pickle")
    assert kinds_of_faults(tmp_path, pickled) == set()

    def broken(real, path):
        pickle.loads(path.read_bytes())
        return real(path)

    planted(monkeypatch, broken)
    assert ("unpickled", "all") in kinds_of_faults(tmp_path, pickled)


@pytest.mark.parametrize(
    ("refusal", "word"),
    [
        (BadInput("is odd", file="a"), "remedy"),
        (BadInput("is odd", remedy="Do it again"), "neither file nor key"),
    ],
)
def test_a_poor_refusal_is_seen(monkeypatch, tmp_path, refusal, word):
    def refuse(real, path):
        raise refusal

    planted(monkeypatch, refuse)
    assert ("refusal", "read") in kinds_of_faults(tmp_path)
    assert word in fuzz.refusal_faults(refusal)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31m", "\u202e", "\ud800", "long " * 300])
def test_a_refusal_that_is_not_one_line_is_seen(text):
    error = BadInput("is odd", file="a", remedy="Do it again")
    error.args = (f"a: {text}. Do it again.",)
    assert fuzz.refusal_faults(error)


def test_a_right_file_that_is_refused_is_seen(monkeypatch, tmp_path):
    def refuse(real, path):
        raise BadInput("is odd", file=path.name, remedy="Do it again")

    planted(monkeypatch, refuse)
    assert ("wrong", "recipe") in kinds_of_faults(tmp_path)


def test_a_crash_is_seen_and_the_run_goes_on(monkeypatch):
    odd = right_input()

    def broken(real, path, number):
        if number == odd:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(fuzz, "judged", lambda found, folder, number: broken(None, None, number) or ("read", [], {}))
    found = fuzz.run(odd + 3)
    assert found["inputs"] == odd + 3
    assert found["failed_by_kind"] == {"crash": 1}
    assert found["faults"][0]["number"] == odd


def test_a_half_that_is_split_wrong_is_seen(monkeypatch, tmp_path):
    merge = next(n for n in range(100) if fuzz.made(0, n).done == ["merged"])
    assert kinds_of_faults(tmp_path, merge) == set()
    real = bake.stacks
    monkeypatch.setattr(
        bake, "stacks", lambda lora: {k: type(s)(s.up.flip(1), s.down.flip(0), s.ranks) for k, s in real(lora).items()}
    )
    assert any(kind == "wrong" for kind, _ in kinds_of_faults(tmp_path, merge))


# --- what was found -------------------------------------------------------------------------------------------------


def factors(layer=LAYER, value=0.5, **more):
    tensors = {
        f"{layer}.lora_up.weight": torch.full((6, 2), value),
        f"{layer}.lora_down.weight": torch.full((2, 8), value),
    }
    return tensors | {f"{layer}.{part}": tensor for part, tensor in more.items()}


def saved(tmp_path, tensors=None, name="lora.safetensors", **told):
    metadata = {field.replace("__", "."): text for field, text in told.items()}
    save_file(factors() if tensors is None else tensors, tmp_path / name, metadata or None)
    return tmp_path / name


def refused(path, word="", look=reader.read):
    with pytest.raises(BadInput) as caught:
        look(path)
    assert fuzz.refusal_faults(caught.value) == ""
    assert word in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202egpj", "\u2028", "x" * 5000])
def test_odd_names_are_told_in_one_line(tmp_path, name):
    path = saved(tmp_path, factors(f"{name}lora"))
    for look in (reader.read, reader.glance):
        refused(path, one_line(name[:50]), look)


def test_one_line_keeps_what_can_be_read():
    assert one_line("犬 – ünï 🐶") == "犬 – ünï 🐶"
    assert one_line("a\tb\x00\ud83d") == "a\\tb\\x00\\ud83d"
    assert len(one_line("ab" * 10**6, 100)) <= 100
    assert one_line("begin" + "x" * 999 + "end", 100).startswith("begin")
    assert one_line("begin" + "x" * 999 + "end", 100).endswith("end")


@pytest.mark.parametrize(
    "layer",
    [f"lora_unet_down_blocks_{'9' * 5000}_attentions_0_x", f"lora_unet_input_blocks_{'7' * 5000}_0_op",
     "lora_unet_input_blocks_٣_1_x"],
)  # fmt: skip
def test_a_block_whose_number_is_none(tmp_path, layer):
    assert layer_key(layer) is None
    refused(saved(tmp_path, factors(layer)), "not Stable Diffusion")


@pytest.mark.parametrize("name", ["x" * 300, "nul\0x", "\udcff"])
def test_a_name_that_no_file_can_have(tmp_path, name):
    for look in (reader.peek, reader.glance, reader.read, history.recipe_from):
        refused(tmp_path / f"{name}.safetensors", "no such file", look)
    refused(tmp_path / f"{name}.json", look=history.recipe_from)


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    for name in ("pipe.safetensors", "pipe.json", "adapter_config.json", "lora.json"):
        os.mkfifo(tmp_path / name)
    refused(tmp_path / "pipe.safetensors", "not a file")
    refused(tmp_path / "pipe.json", "no file", history.recipe_from)
    assert reader.read(saved(tmp_path)).sidecar == {}
    refused(saved(tmp_path, name="adapter_model.safetensors"), "adapter_config.json")


def test_peft_settings_that_cannot_be_read(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    refused(saved(tmp_path, name="adapter_model.safetensors"), "adapter_config.json")


def test_a_card_of_gigabytes_is_left_alone(tmp_path):
    with open(tmp_path / "lora.json", "wb") as file:
        file.truncate(1 << 34)  # takes no room
    assert reader.peek(saved(tmp_path)).sidecar == {}


@pytest.mark.parametrize(
    "tensors",
    [
        factors(value=1e30), factors(value=1e12), factors(alpha=torch.tensor(1e30)), factors(alpha=torch.tensor(-3e38)),
        {f"{LAYER}.diff": torch.full((6, 8), 1e30)}, {f"{NORM}.w_norm": torch.full((6,), 1e30)},
        {f"{LAYER}.hada_w{n}_{part}": torch.full((8, 8), 1e6) for n in (1, 2) for part in "ab"},
    ],
)  # fmt: skip
def test_values_that_no_model_can_hold(tmp_path, tensors):
    refused(saved(tmp_path, tensors), "beyond what any model can hold")


@pytest.mark.parametrize(("value", "alpha"), [(1e7, 2.0), (1e-30, 2.0), (1e-42, 1e-42), (0.5, 0.0), (0.5, -1.0)])
def test_extreme_values_are_compared_in_valid_json(tmp_path, capsys, value, alpha):
    path = saved(tmp_path, factors(value=value, alpha=torch.tensor(alpha)))
    for command in (["inspect", "--json", path], ["compare", "--json", path, path]):
        assert main([str(argument) for argument in command]) == 0
        json.loads(capsys.readouterr().out, parse_constant=lambda token: pytest.fail(token))


@pytest.mark.parametrize(
    "settings",
    [
        '{"lora_alpha": 1e300}',
        '{"lora_alpha": 4, "r": -4, "use_rslora": true}',
        '{"alpha": 1e999}',
        '{"lora_alpha": NaN}',
    ],
)
def test_peft_settings_that_lie(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(settings)
    tensors = {f"{PEFT}.lokr_w1": torch.ones(2, 2), f"{PEFT}.lokr_w2": torch.ones(3, 4)}
    refused(saved(tmp_path, tensors, "adapter_model.safetensors"))


def test_a_glance_at_a_lokr_with_a_factor_of_one_number(tmp_path):
    tensors = {f"{LAYER}.lokr_w1": torch.ones(1, 1), f"{LAYER}.lokr_w2_a": torch.ones(6, 1),
               f"{LAYER}.lokr_w2_b": torch.ones(1, 8), f"{LAYER}.alpha": torch.tensor(1.0)}  # fmt: skip
    path = saved(tmp_path, tensors)
    assert reader.glance(path).ranks == reader.read(path).ranks == [1]


@pytest.mark.parametrize(
    "parts",
    [
        {"diff": ()}, {"diff": (2, 2, 2)}, {"ziplora_up": (2, 2, 2), "ziplora_down": (2, 8)},
        {"ziplora_up": (2,), "ziplora_down": (2, 8)}, {"ziplora_up": (6, 2)},
        {"hada_w1_a": (6, 2, 1), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
        {"lokr_w1": (2, 2, 1), "lokr_w2": (3, 4)},
        {"lora_up.weight": (6, 2), "lora_down.weight": (2, 8), "lora_mid.weight": (2, 2)},
        {"w_norm": (6,), "b_norm": (7,)}, {"ziplora_weight": (2, 6), "ziplora_bias": (2, 7)},
    ],
)  # fmt: skip
def test_parts_of_another_number_of_dimensions(tmp_path, parts):
    path = saved(tmp_path, {f"{LAYER}.{part}": torch.ones(shape) for part, shape in parts.items()})
    for look in (reader.read, reader.glance):
        refused(path, look=look)


def test_an_alpha_that_is_complex(tmp_path):
    try:
        path = saved(tmp_path, factors(alpha=torch.tensor(1 + 1j)))
    except KeyError:
        pytest.skip("older versions of safetensors write none")
    refused(path, "complex64")


@pytest.mark.parametrize("shape", [[0, 2**62, 8], [0, 2**63], [2**32, 2**32]])
def test_a_shape_beyond_all_numbers(tmp_path, shape):
    tensors = {f"{LAYER}.lora_up.weight": fuzz.Tensor("F32", shape, b"")}
    path = tmp_path / "lora.safetensors"
    path.write_bytes(fuzz.written(tensors, {}))
    for look in (reader.read, reader.glance):
        refused(path, look=look)


def test_a_kernel_that_no_layer_has(tmp_path):
    """10.8 million columns out of 20 kB, which would be sorted for seconds."""
    shapes = {"t{}": (1, 1, 30, 60), "w{}_a": (1, 8), "w{}_b": (1, 3000)}
    tensors = {f"{LAYER}.hada_{part.format(n)}": torch.ones(s) for n in (1, 2) for part, s in shapes.items()}
    refused(saved(tmp_path, tensors), "larger than any model's")


def test_a_file_cannot_ask_for_more_than_its_size_can_mean(tmp_path):
    """130 million values out of 24 thousand, in a layer that is no larger than a model's."""
    shapes = {"lokr_w1_a": (90, 89), "lokr_w1_b": (89, 90), "lokr_w2": (90, 90)}
    tensors = {f"{LAYER}.{part}": torch.ones(shape, dtype=torch.float16) for part, shape in shapes.items()}
    for look in (reader.glance, reader.read):
        refused(saved(tmp_path, tensors), "far more memory", look)


@pytest.mark.parametrize(
    "said", ["NaN", "[1e999]", '{"a": -Infinity}', "[" * 60 + "]" * 60, "[" * 900 + "]" * 900, "1" * 5000]
)
def test_what_is_recorded_is_told_in_valid_json(tmp_path, capsys, said):
    assert main(["inspect", "--json", str(saved(tmp_path, ziplora__coefficients=said))]) == 0
    (view,) = json.loads(capsys.readouterr().out, parse_constant=lambda token: pytest.fail(token))
    assert view["ziplora"]["coefficients"] == said


def test_metadata_cannot_steer_a_terminal(tmp_path):
    path = saved(
        tmp_path, modelspec__trigger_phrase="\x1b[2Jsks\ndog", ss_base_model_version="x\x07", ss_epoch="9" * 100_000
    )
    lines = inspection.inspected_text({"file": str(path), **inspection.inspected(reader.read(path))}).splitlines()
    assert any("\\x1b[2Jsks\\ndog" in line for line in lines)
    assert max(map(len, lines)) < 2000
    assert not any(map(fuzz.unprintable, "".join(lines)))


def ours(tmp_path, tensors=None, **told):
    """A merge of two, each with a rank."""
    parents = [{"name": "a", "role": "subject"}, {"name": "b", "role": "style"}]
    usual = {"ziplora__parents": json.dumps(parents), "ziplora__ranks": '{"*": [1, 1]}', "ziplora__version": "1"}
    return saved(tmp_path, tensors, **{**usual, **told})


def test_a_strength_beyond_all_numbers_is_not_told(tmp_path):
    recipe = json.dumps({"parents": [{"strength": 10**400}, {}], "method": "ziplora"})
    path = ours(tmp_path, ziplora__recipe=recipe, ziplora__coefficients="{}")
    assert "merged from" not in inspection.inspected_text({"file": "x", **inspection.inspected(reader.read(path))})


@pytest.mark.parametrize("said", ["[NaN, 1]", "[1e999, 1]", "[1, 1, 1]", "[" * 100_000, '["1e999", 1]'])
def test_strengths_that_are_no_numbers_count_as_ones(tmp_path, said):
    out = tmp_path / "baked.safetensors"
    bake.bake(ours(tmp_path, ziplora__strengths=said), out, [0.5, 2.0])
    assert json.loads(reader.read(out).metadata["ziplora.strengths"]) == [0.5, 2.0]


def test_a_parents_name_that_is_a_list_of_lists(tmp_path):
    parents = '[{"name": ' + "[" * 900 + "]" * 900 + ', "role": []}, {"name": 2}]'
    origins = bake.origins(reader.read(ours(tmp_path, ziplora__parents=parents)))
    assert [(parent["name"], parent["role"]) for parent in origins] == [("", "subject"), ("2", "style")]


def test_norms_of_different_sizes_are_not_added_up():
    with pytest.raises(BadInput, match="different sizes"):
        Vectors.of([Vectors(torch.ones(1, 6)), Vectors(torch.ones(1, 7))], [1.0, 1.0])


def test_an_embedding_of_eight_bits_is_carried_over(tmp_path):
    words = {"bundle_emb.word.clip_l": torch.ones(1, 4).to(torch.float8_e4m3fn)}
    out = tmp_path / "baked.safetensors"
    bake.bake(ours(tmp_path, {**factors(), **words}), out, [1.0, 1.0])
    assert reader.read(out).embeddings["word"]["clip_l"].float().sum() == 4


def test_layers_that_no_merge_has_are_not_left_out_of_what_is_baked(tmp_path):
    """A file that says that it is ours, of another kind: once, a LoRA without a layer was written."""
    path = ours(tmp_path, {f"{LAYER}.diff": torch.ones(6, 8)})
    out = tmp_path / "out.safetensors"
    refused(path, "does not write", lambda path: bake.bake(path, out, [1.0, 1.0]))
    refused(path, "does not write", lambda path: bake.split(path, [out, tmp_path / "other.safetensors"]))
    assert not out.exists()


def test_megabytes_that_are_recorded_are_told_as_text(tmp_path):
    said = json.dumps([[1]] * 300_000)
    view = inspection.inspected(reader.read(saved(tmp_path, ziplora__recipe=said)))
    assert view["ziplora"]["recipe"] == said
