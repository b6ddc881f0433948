"""What a merge did to its parents: layers done by hand, real merges on the miniature, and how it is shown."""

import csv
import io
import json
import math
import re
import shutil

import pytest
import torch
from loras import dense_deltas, kohya_name, write_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ziplora_lib import charts
from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.findings import Findings, Parent, summary
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.effect import Layers, distance, effect

A, B = ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_output_blocks_0_1_proj_in")


def delta(rows, scale=1.0):
    """A LowRankDelta whose ΔW is scale times this matrix."""
    weight = torch.tensor(rows, dtype=torch.float32)
    return LowRankDelta(torch.eye(len(weight)), weight, scale)


# --- one layer, by hand ---------------------------------------------------------------------------------------

C, S = delta([[3.0, 0.0], [0.0, 1.0]]), delta([[3.0, 0.0], [4.0, 0.0]])


def test_a_merge_that_is_the_plain_sum_has_no_effect():
    one = effect([C, S], [True, True], Stack.of([C, S]))
    assert one.alone == pytest.approx((math.sqrt(10), 5))
    assert one.halves == pytest.approx(one.alone)
    # [[6, 0], [4, 1]]
    assert (one.plain, one.merged, one.moved) == pytest.approx((math.sqrt(53), math.sqrt(53), 0), abs=1e-6)
    # columns: (3, 0) against (3, 4), product 9 of lengths 15; (0, 1) against nothing
    assert one.before.interference == one.after.interference == pytest.approx(9 / 15)
    assert Layers((one,)).change == pytest.approx(0, abs=1e-7)


def test_coefficients_by_column():
    """m_c = (.5, 1), m_s = (0, 1) leaves [[1.5, 0], [0, 1]]: the style is gone, for its second column is zero."""
    after = Stack.of([C, S]).merged(torch.tensor([[0.5, 1.0], [0.0, 1.0]]))
    one = effect([C, S], [True, True], after)
    assert one.halves == pytest.approx((math.sqrt(3.25), 0))
    assert one.merged == pytest.approx(math.sqrt(3.25))
    assert one.moved == pytest.approx(math.hypot(4.5, 4))  # of [[6, 0], [4, 1]]
    assert (one.before.interference, one.after.interference) == pytest.approx((0.6, 0))
    whole = Layers((one,))
    assert (whole.kept(0), whole.kept(1)) == pytest.approx((math.sqrt(0.325), 0))
    assert whole.change == pytest.approx(math.hypot(4.5, 4) / math.sqrt(53))


def test_layers_add_up_as_squares_and_are_weighted_by_size():
    plain = effect([C, S], [True, True], Stack.of([C, S]))
    halved = effect([C, S], [True, True], Stack.of([C, S]).merged([0.5, 0.5]))
    both = Layers((plain, halved))
    assert both.plain == pytest.approx(math.sqrt(106))
    assert both.merged == pytest.approx(math.sqrt(53 + 53 / 4))
    assert both.change == pytest.approx(math.sqrt(53 / 4 / 106))
    assert both.kept(1) == pytest.approx(math.sqrt((25 + 25 / 4) / 50))
    assert both.before.interference == pytest.approx(0.6)
    assert both.before.crossed == pytest.approx(18)


def test_a_layer_of_one_lora_has_norms_but_no_overlap():
    one = effect([C, None], [True, True], Stack.of([C, None]).merged([2.0, 1.0]))
    assert (one.before, one.after) == (None, None)
    assert one.alone == pytest.approx((math.sqrt(10), 0))
    whole = Layers((one,))
    assert whole.change == pytest.approx(1)
    assert (whole.kept(0), whole.kept(1)) == (pytest.approx(2), None)
    assert [layer is None for layer in one.sparsities] == [False, True, False]


def test_without_a_parent_the_rest_is_known():
    one = effect([C, None], [True, False], Stack.of([C, S]))
    assert (one.plain, one.moved, one.before) == (None, None, None)
    assert one.alone == (pytest.approx(math.sqrt(10)), None)
    assert one.halves == pytest.approx((math.sqrt(10), 5))
    assert one.after.interference == pytest.approx(0.6)
    assert one.merged == pytest.approx(math.sqrt(53))


def test_parents_that_cancel_have_no_relative_change():
    one = effect([C, C.strength(-1)], [True, True], Stack.of([C, C.strength(-1)]).merged([1.0, 0.5]))
    assert one.plain == 0
    assert one.moved == pytest.approx(math.sqrt(10) / 2, rel=1e-6)
    assert Layers((one,)).change is None


@pytest.mark.parametrize("shape", [(9, 7), (4, 3, 3, 3)])
def test_the_distance_from_factors_is_that_of_the_dense_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        LowRankDelta(
            torch.randn(shape[0], r, generator=generator), torch.randn(r, *shape[1:], generator=generator), 0.7
        )
        for r in (3, 2)
    )
    assert distance(a, b) == pytest.approx(float((a.dense() - b.dense()).norm()), rel=1e-6)
    # nearly the same: what is left must not drown in the rounding of what cancels
    near = LowRankDelta(a.up * (1 + 1e-5), a.down, a.scale)
    assert distance(a, near) == pytest.approx(float((a.dense().double() - near.dense().double()).norm()), rel=1e-2)


# --- what is said -----------------------------------------------------------------------------------------------

PARENTS = [Parent("dog", "subject", 1.0, 1.0, "x"), Parent("ink", "style", 1.0, 1.0, "y")]


def found(**layers):
    return Findings("m", PARENTS, {{"a": A, "b": B}[key]: one for key, one in layers.items()}, [])


def layer(*m, c=C, s=S):
    return effect([c, s], [True, True], Stack.of([c, s]).merged(m))


def test_the_sentences_of_a_plain_sum():
    assert summary(found(a=layer(1.0, 1.0))) == (
        "The merge is the plain sum of its LoRAs, but for rounding. In size, the subject dog is 1.00 times and the style ink "
        "is 1.00 times what went in. The two LoRAs get in each other's way mostly in “in 4” (100% of all their overlap); "
        "their overlap stayed at 0.60, and in size it is 1.00 times what it was."
    )


def test_the_sentences_of_a_merge():
    # 4 times as much overlap in the first, none of the second's changed
    text = summary(found(a=layer(1.0, 1.0, c=C.strength(4)), b=layer(0.5, 0.5)))
    assert "changed “out 0” most: there it is 0.50 times the plain sum's size away from it" in text
    assert "mostly in “in 4” (80% of all their overlap)" in text
    # (36 + 9 / 4) of 45
    assert "stayed at 0.60, and in size it is 0.85 times what it was" in text


def test_the_sentences_of_an_overlap_that_falls_and_of_one_that_rises():
    # column 1 meets wholly, column 0 by .6
    c, s = delta([[3.0, 1.0], [0.0, 0.0]]), delta([[3.0, 1.0], [4.0, 0.0]])

    def said(m):
        after = Stack.of([c, s]).merged(torch.tensor(m))
        return summary(found(a=effect([c, s], [True, True], after)))

    # of products 9 and 1, lengths 15 and 1: (9 + .25) / (15 + .25), and 2.5 / 4.75
    assert "fell from 0.62 to 0.61, and in size it is 0.93 times what it was." in said([[1.0, 0.5], [1.0, 0.5]])
    rose = said([[0.5, 1.0], [0.5, 1.0]])
    assert (
        "rose from 0.62 to 0.68, and in size it is 0.33 times what it was: what the merge took away lay mostly" in rose
    )


def test_the_sentences_of_loras_that_do_not_meet():
    apart = effect([C, None], [True, True], Stack.of([C, None]))
    assert "share no layer" in summary(found(a=apart))
    across = layer(1.0, 1.0, c=delta([[1.0, 0.0], [0.0, 0.0]]), s=delta([[0.0, 0.0], [0.0, 1.0]]))
    assert "do not get in each other's way at all" in summary(found(a=across))


def test_layers_next_to_nothing_are_not_the_ones_that_changed_most():
    found_ = found(a=layer(0.9, 0.9), b=layer(0.1, 0.1, c=C.strength(1e-6), s=S.strength(1e-6)))
    assert found_.most_changed() == [A]
    assert "changed “in 4” most" in summary(found_)


# --- real merges --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Merges that were made already: what was asked -> the file."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def merge(host, pair_files, tmp_path, made):
    """merge(strengths, **recipe): the pair, put into the host's folder, and "merged" made of it."""
    from ziplora_lib.job import run
    from ziplora_lib.recipe import parse

    def make(strengths=(1.0, 1.0), **fields):
        for file in pair_files:
            shutil.copy(file, tmp_path)
        asked = json.dumps([strengths, fields])
        if asked not in made:
            roles = zip(("subject", "style"), strengths)
            run(
                parse({
                    "parents": [{"lora": r, "role": r, "prompt": "a cat", "strength": w} for r, w in roles],
                    "output": "merged", "method": "direct", "dtype": "fp32", "resolution": 64, "balance_points": 1,
                    "sampler_steps": 2, **fields,
                }),
                host,
            )  # fmt: skip
            kept = made["folder"] / f"{len(made)}.safetensors"
            made[asked] = shutil.copy(tmp_path / "merged.safetensors", kept)
        shutil.copy(made[asked], tmp_path / "merged.safetensors")

    return make


@pytest.fixture
def look(host):
    from ziplora_lib.why import look

    return lambda name="merged", callback=lambda _: None: look(name, host, callback)


def test_a_direct_merge_changes_nothing(merge, look, tmp_path):
    merge((0.5, 0.8))
    seen = look()
    c, s = (
        {layer_key(key): d for key, d in dense_deltas(tmp_path / f"{name}.safetensors").items()}
        for name in ("subject", "style")
    )
    assert set(seen.layers) == set(c) | set(s)
    assert seen.warnings == []
    for key, one in seen.layers.items():
        wanted = 0.5 * c.get(key, 0) + 0.8 * s.get(key, 0)
        assert one.plain == pytest.approx(float(wanted.norm()), rel=1e-4)
        assert one.moved <= 1e-5 * one.plain
        assert one.halves == pytest.approx(one.alone, rel=1e-4)
        assert (one.before is None) == (one.after is None) == (key not in c or key not in s)
        if one.before:
            assert one.after.interference == pytest.approx(one.before.interference, rel=1e-4)
    assert seen.all.alone(1) == pytest.approx(0.8 * math.sqrt(sum(float(d.norm()) ** 2 for d in s.values())), rel=1e-4)
    assert summary(seen).startswith("The merge is the plain sum of its LoRAs, but for rounding.")


def test_a_merge_at_other_strengths_has_changed_by_as_much(merge, look, host):
    from ziplora_lib.job import bake_balance

    merge()
    bake_balance(host, "merged", "softer", [0.6, 0.6])
    seen = look("softer")
    assert all(Layers((one,)).change == pytest.approx(0.4, rel=1e-4) for one in seen.layers.values())
    assert seen.all.kept(0) == pytest.approx(0.6, rel=1e-4)
    assert seen.all.after.crossed / seen.all.before.crossed == pytest.approx(0.36, rel=1e-4)
    assert [said for said in seen.warnings if "saved at other strengths after the merge (0.60 : 0.60)" in said]
    # one alone: what is in no other LoRA goes wholly or stays
    bake_balance(host, "merged", "style-only", [0.0, 1.0])
    seen = look("style-only")
    alone = [one for one in seen.layers.values() if one.before is None]
    assert {round(Layers((one,)).change, 4) for one in alone} == {0.0, 1.0}
    assert seen.all.kept(1) == pytest.approx(1, rel=1e-4)
    assert seen.all.kept(0) == pytest.approx(0, abs=1e-6)


def test_a_file_in_half_precision_is_the_plain_sum_but_for_rounding(merge, look):
    merge(dtype="fp16")
    seen = look()
    assert 0 < seen.all.change < 0.002
    assert summary(seen).startswith("The merge is the plain sum of its LoRAs, but for rounding.")


def test_a_learned_merge_has_kept_less_than_all(merge, look):
    merge(method="ziplora", steps=3, lr=0.05, start=0.5, pictures=1, samples=4, memory="fast", at_once=8)
    seen = look()
    assert seen.all.change > 0.05
    assert "The merge changed" in summary(seen)
    assert len(seen.most_changed()) == 10
    changes = [Layers((seen.layers[key],)).change for key in seen.most_changed()]
    assert changes == sorted(changes, reverse=True)
    # text encoders are summed
    assert seen.blocks["te1"].change == pytest.approx(0, abs=2e-3)
    # which the style does not have
    assert seen.values(seen.blocks["te1"])["norm of style style"] is None


def test_blocks_and_groups_hold_every_layer_once(merge, look):
    merge()
    seen = look()
    for summed in (seen.cells, seen.blocks, seen.groups):
        assert sum(len(layers.effects) for layers in summed.values()) == len(seen.layers)
    order = list(seen.blocks)
    assert order.index("in 4") < order.index("mid") < order.index("out 0") < order.index("out 5")


def test_a_parent_that_is_gone(merge, look, tmp_path):
    merge()
    (tmp_path / "style.safetensors").unlink()
    seen = look()
    assert "the style style is not listed any more" in seen.warnings
    assert [parent.problem for parent in seen.parents] == ["", "is not listed any more"]
    assert seen.all.change is None
    assert seen.all.before is None
    assert seen.all.kept(0) == pytest.approx(1, rel=1e-4)
    assert seen.all.kept(1) is None
    assert seen.all.after.interference > 0
    assert seen.all.sparsity(-1) is not None
    assert seen.all.sparsity(1) is None
    text = summary(seen)
    assert text.startswith("How far the merge is from the plain sum of its LoRAs is not known.")
    assert "their overlap in the merge is" in text
    assert json.loads(json.dumps(seen.public(), allow_nan=False))["all"]["change"] is None


def test_a_parent_that_was_changed(merge, look, tmp_path):
    merge()
    tensors = load_file(tmp_path / "subject.safetensors")
    save_file(
        {name: t * 2 if "lora_up" in name else t for name, t in tensors.items()}, tmp_path / "subject.safetensors"
    )
    seen = look()
    assert "the subject subject is another file than the one that was merged: it was changed or replaced since" in (
        seen.warnings
    )
    assert seen.all.alone(0) is None
    assert seen.all.half(0) > 0


def test_a_parent_that_cannot_be_read(merge, look, tmp_path):
    merge()
    (tmp_path / "style.safetensors").write_bytes(b"not a file")
    assert any(said.startswith("the style style cannot be read (style.safetensors") for said in look().warnings)


def test_a_parent_that_was_renamed_is_found_by_its_hash(merge, look, host, tmp_path):
    """As files of trainers, and of ours, say their own hash."""
    from ziplora_lib.job import run
    from ziplora_lib.recipe import parse

    merge()
    parents = [
        {"lora": "merged", "role": "subject", "prompt": "a cat"},
        {"lora": "style", "role": "style", "prompt": "a cat"},
    ]
    fields = {"method": "direct", "resolution": 64, "balance_points": 1, "sampler_steps": 2}
    run(parse({"parents": parents, "output": "again", **fields}), host)
    (tmp_path / "merged.safetensors").rename(tmp_path / "first.safetensors")
    seen = look("again")
    assert seen.warnings == ["the subject merged is called first now"]
    assert seen.all.change < 0.002


def test_what_is_no_merge_is_refused_in_plain_words(look, host, pair_files, tmp_path):
    from ziplora_lib.why import refuse

    shutil.copy(pair_files[0], tmp_path)
    for refused in (lambda: look("subject"), lambda: refuse("subject", host)):
        with pytest.raises(
            BadInput, match=r"subject.safetensors: was not made by ZipLoRA.*Pick a LoRA that ZipLoRA made"
        ):
            refused()


def test_a_merge_whose_layers_another_tool_changed_is_refused(merge, look, tmp_path):
    merge()
    path = tmp_path / "merged.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("attn1_to_q.lora_up.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, metadata)
    with pytest.raises(BadInput, match=r"merged.safetensors: key '.*attn1_to_q': has another shape.*merge again"):
        look()


def test_metadata_without_strengths_is_said(merge, look, tmp_path):
    merge()
    path = tmp_path / "merged.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "ziplora.recipe": "{}", "ziplora.strengths": "[NaN, 1]"})
    seen = look()
    assert seen.warnings == ["the file does not say at which strengths its LoRAs were merged; 1 is taken for each"]
    assert seen.all.change < 1e-4


def test_layers_that_need_the_model_are_counted_and_left_out(look, host, layers, tmp_path):
    """A DoRA: what its layers add depends on the model's weights."""
    from ziplora_lib.job import run
    from ziplora_lib.recipe import parse

    shapes = {kohya_name(p, n): s for (p, n), s in layers.items() if p == "unet" and "attn1.to_q" in n}
    write_lora(tmp_path / "plain.safetensors", shapes, seed=1)
    write_lora(tmp_path / "dora.safetensors", shapes, seed=2)
    tensors = load_file(tmp_path / "dora.safetensors")
    first = sorted(shapes)[0]
    save_file({**tensors, f"{first}.dora_scale": torch.ones(1, shapes[first][1])}, tmp_path / "dora.safetensors")
    parents = [
        {"lora": name, "role": role, "prompt": "a cat"} for name, role in (("plain", "subject"), ("dora", "style"))
    ]
    fields = {"method": "direct", "resolution": 64, "balance_points": 1, "sampler_steps": 2}
    run(parse({"parents": parents, "output": "merged", **fields}), host)
    seen = look()
    assert seen.warnings == [
        "layers of dora that need the model: 1 (DoRA of LoRA); what needs them is left out of the numbers"
    ]
    unknown = [key for key, one in seen.layers.items() if one.plain is None]
    assert len(unknown) == 1
    assert seen.layers[unknown[0]].alone[0] > 0
    assert seen.all.change < 0.002


def test_every_step_is_told_and_any_can_be_the_last(merge, look):
    from ziplora_lib.hosts.host import share

    merge()
    steps = []
    seen = look(callback=steps.append)
    assert len(steps) == 2 + len(seen.layers)
    shares = [share(step) for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9
    assert all(step["what"] for step in steps)
    for last in (0, 1, 2, len(steps) - 1):
        left = iter(range(last, -1, -1))
        with pytest.raises(Stopped):
            look(callback=lambda _, left=left: next(left) == 0)


def test_json_and_csv_say_the_same(merge, look):
    merge((1.0, 0.5))
    seen = look()
    view = json.loads(json.dumps(seen.public(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(seen.csv())))
    assert len(rows) == len(view["layers"]) == len(seen.layers)
    assert list(rows[0])[:4] == ["layer", "block", "group", "columns"]
    assert list(rows[0])[4:] == list(view["measures"])
    for row in rows:
        told = view["layers"][row["layer"]]
        assert (row["block"], row["group"], int(row["columns"])) == (told["block"], told["group"], told["columns"])
        for title in view["measures"]:
            assert (float(row[title]) if row[title] else None) == told[title]
    assert view["summary"] == summary(seen)
    assert [parent["strength"] for parent in view["parents"]] == [1.0, 0.5]
    cells = [cell for block in view["cells"].values() for cell in block.values()]
    assert math.fsum(cell["norm of merge"] ** 2 for cell in cells) == pytest.approx(
        view["all"]["norm of merge"] ** 2, rel=1e-4
    )


def test_parents_of_one_name_are_told_apart():
    twins = [
        Parent("x", "style", 1.0, 1.0, ""),
        Parent("x", "style", 1.0, 1.0, ""),
        Parent("y", "subject", 1.0, 1.0, ""),
    ]
    seen = Findings("m", twins, {}, [])
    assert seen.titles == ["style x (1)", "style x (2)", "subject y"]
    titles = [measure.title for measure in seen.measures]
    assert len(set(titles)) == len(titles)


# --- how it is shown ----------------------------------------------------------------------------------------------


def cells(text):
    """The heat map's cells: (heat, number), ("", "") for an empty one."""
    body = text.split("<tbody>")[1]
    found = re.findall(
        r"<td(?: class='(ziplora_heat_none)'| style='--ziplora-heat:([\d.]+)')[^>]*>(?:<span>(.*?)</span>)?", body
    )
    return [(heat, number) for _, heat, number in found]


def test_a_heat_map_has_a_cell_for_each_row_and_column():
    values = {("in 4", "attn1"): 0.5, ("in 4", "proj"): 2.0, ("mid", "ff"): 0.0}
    text = charts.heat_map("Change", ["in 4", "mid"], ["attn1", "ff", "proj"], values)
    assert cells(text) == [("0.250", "0.50"), ("", ""), ("1.000", "2.00"), ("", ""), ("0.000", "0.00"), ("", "")]
    assert "title='in 4, attn1: 0.50'" in text
    assert "title='mid, attn1: nothing'" in text
    assert re.findall(r"<th scope='(\w+)'>([^<]+)", text) == [
        ("col", "attn1"), ("col", "ff"), ("col", "proj"), ("row", "in 4"), ("row", "mid")
    ]  # fmt: skip
    assert re.search(r"legend'>0.00 .* 2.00</p>", text)


def test_a_heat_map_on_a_scale_that_is_given():
    values = {("a", "x"): 0.3, ("a", "y"): 9.0, ("b", "x"): -1.0, ("b", "y"): math.nan}
    text = charts.heat_map("Part", ["a", "b"], ["x", "y"], values, form=".0%", top=0.6)
    assert cells(text) == [("0.500", "30%"), ("1.000", "900%"), ("0.000", "-100%"), ("", "")]
    assert re.search(r"legend'>0% .* 60%</p>", text)


def test_a_heat_map_of_nothing_or_of_zeros():
    assert cells(charts.heat_map("t", ["a"], ["x"], {})) == [("", "")]
    assert cells(charts.heat_map("t", ["a"], ["x"], {("a", "x"): 0.0})) == [("0.000", "0.00")]
    assert cells(charts.heat_map("t", ["a"], ["x"], {("a", "x"): None})) == [("", "")]


def test_nothing_in_a_heat_map_is_taken_for_html():
    evil = "<img src=x onerror='alert(1)'>\""
    text = charts.heat_map(evil, [evil], [evil], {(evil, evil): 1.0}, unit=evil)
    assert "<img" not in text
    assert "onerror='" not in text
    assert "title='&lt;img src=x onerror=&#x27;alert(1)&#x27;&gt;&quot;" in text


# --- the section --------------------------------------------------------------------------------------------------


@pytest.fixture
def section(host):
    """(the section, its place), in a page of its own."""
    gr = pytest.importorskip("gradio")
    from ziplora_lib.tab import why
    from ziplora_lib.tab.place import Place
    from ziplora_lib.tab.running import Runner

    jobs = {}
    place = Place(host, jobs, Runner(host, jobs))
    with gr.Blocks(), gr.Tab("Why"):
        place.runner.area()
        built = why.build(place)
        place.runner.connect()
    return built, place


def looked(section, name="merged"):
    """Looks as the button does; -> (job, the section's updates)."""
    built, place = section
    job = built._prepare(name)
    place.jobs[job.id] = job
    job.run(place.host)
    shown = built.show(job)
    assert len(shown) == len(built.outputs) == len(built.show(None))
    return job, dict(zip(("said", "job", "result", "kind", "of", "map", "most", "blocks", "files"), shown))


def test_the_section_lists_merges_the_newest_first(merge, section, host):
    from ziplora_lib.job import bake_balance

    built, _ = section
    merge()
    bake_balance(host, "merged", "later", [0.5, 1.0])
    (update,) = built.updates("merged")
    assert update["choices"] == ["later", "merged"]
    assert update["value"] == "merged"
    assert "value" not in built.updates("no such LoRA")[0]


def test_a_look_shows_sentence_map_and_tables(merge, section):
    merge()
    job, shown = looked(section)
    assert (job.state, job.error) == ("done", None)
    assert "is the plain sum of its LoRAs" in shown["said"]
    assert shown["job"] == job.id
    assert shown["result"]["visible"]
    seen = job.result
    assert len(cells(shown["map"])) == len(seen.blocks) * len(seen.groups)
    filled = [number for _, number in cells(shown["map"]) if number]
    assert len(filled) == sum(layers.before is not None for layers in seen.cells.values()) > 5
    assert shown["most"].count("<tr>") == 1 + 10
    assert shown["blocks"].count("<tr>") == 1 + len(seen.blocks) + len(seen.groups) + 1
    assert json.loads(json.dumps(job.public()))["result"]["lora"] == "merged"


def test_the_files_are_named_after_the_lora_and_hold_what_was_found(merge, section):
    from pathlib import Path

    merge()
    job, shown = looked(section)
    table, everything = map(Path, shown["files"])
    assert (table.name, everything.name) == ("merged-why.csv", "merged-why.json")
    assert table.read_text(encoding="utf-8") == job.result.csv()
    assert json.loads(everything.read_text(encoding="utf-8")) == job.result.public()


def test_every_kind_of_number_has_a_map_of_its_own(merge, section):
    merge((1.0, 0.5))
    job, shown = looked(section)
    built, place = section
    maps = {}
    for label in shown["kind"]["choices"]:
        of, maps[label] = built._turn(job.id, label)
        assert of["visible"] == (label in ("Norm", "Kept", "Sparsity"))
        for whose in of["choices"]:
            maps[label, whose] = built._draw(job.id, label, whose)
    assert maps["Norm", "subject subject"] != maps["Norm", "style style"]
    # a merge that changed nothing: its parents overlap in it as before, on the same scale
    assert cells(maps["Overlap before"]) == cells(maps["Overlap after"])
    assert {number for _, number in cells(maps["Kept", "style style"]) if number} == {"1.00"}
    place.jobs.clear()
    assert "press Look again" in built._draw(job.id, "Change", None)


def test_a_look_that_cannot_be_is_refused_or_says_why(merge, section, tmp_path):
    built, _ = section
    merge()
    for name, said in ((None, "no LoRA is picked"), ("subject", "was not made by ZipLoRA"), ("nobody", "nobody")):
        with pytest.raises(BadInput, match=said):
            built._prepare(name)
    job = built._prepare("merged")
    (tmp_path / "merged.safetensors").write_bytes(b"<b>")
    job.run(section[1].host)
    said, _, result, *_ = built.show(job)
    assert "Cannot look" in said
    assert not result["visible"]


def test_a_look_that_was_stopped(merge, section):
    merge()
    built, place = section
    job = built._prepare("merged")
    job.run(place.host, callback=lambda info: info["phase"] == "measure" and info["step"] == 3)
    assert (job.state, job.result) == ("stopped", None)
    assert "Stopped" in built.show(job)[0]


def test_names_of_loras_are_not_taken_for_html(merge, section, host, tmp_path):
    merge()
    path = tmp_path / "merged.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    parents = json.loads(metadata["ziplora.parents"])
    parents[0]["name"] = "<script>alert(1)</script>"
    save_file(load_file(path), path, {**metadata, "ziplora.parents": json.dumps(parents)})
    _, shown = looked(section)
    assert "&lt;script&gt;" in shown["said"]
    assert not any(
        "<script>" in text for text in map(str, (shown["said"], shown["map"], shown["most"], shown["blocks"]))
    )
