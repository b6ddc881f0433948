"""The benchmark: its pairs, its judge, its way to choose, and that what is written of it is what it found."""

import importlib
import json
from collections import Counter

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks.judge import HEADS, judge, truth, verdicts
from benchmarks.quality import report
from benchmarks.quality.measures import BALANCES, chosen
from benchmarks.quality.pairs import pairs, validation_pairs, weights_hash
from ziplora_lib.hosts import world


def test_validation_shares_nothing_with_what_is_reported():
    tested, validated = pairs(), validation_pairs()
    assert len(set(tested)) == 20
    assert set(Counter(pair.subject for pair in tested).values()) == {2}
    assert set(Counter(pair.style for pair in tested).values()) == {2}
    assert not {pair.subject for pair in tested} & {pair.subject for pair in validated}
    assert not {pair.style for pair in tested} & {pair.style for pair in validated}


@pytest.fixture(scope="module")
def drawn():
    """Drawings of what the base never saw, and what is on them."""
    subjects = [subject for subject in world.NEW_SUBJECTS for _ in range(8)]
    styles = [*world.NEW_STYLES, None] * 4
    styles = styles[: len(subjects)]
    return world.draw(subjects, styles, torch.Generator().manual_seed(11)), subjects, styles


def test_the_judge_is_right_about_what_the_base_never_saw(drawn):
    pictures, subjects, styles = drawn
    right = truth(subjects, styles)
    with torch.no_grad():
        found = judge()(pictures)
    for head in HEADS:
        assert (found[head].argmax(1) == right[head]).float().mean() > 0.97, head


def test_a_verdict_takes_every_attribute(drawn):
    pictures, subjects, styles = drawn
    of = next(k for k, style in enumerate(styles) if style is not None)
    subject, style = subjects[of], styles[of]
    other = world.Subject(subject.body, (subject.top + 1) % len(world.TOPS))
    changed = world.Style(**{**vars(style), "outline": (style.outline + 1) % len(world.OUTLINES)})
    for asked, right in (((subject, style), (1, 1)), ((other, style), (0, 1)), ((subject, changed), (1, 0))):
        found = verdicts(pictures[of : of + 1], *asked)
        assert (int(found["subject"]), int(found["style"])) == right


def test_the_chosen_balance_is_judged_on_seeds_that_did_not_choose_it():
    rows = {f"joint/{b:g}": "0000" for b in BALANCES}
    rows["joint/0"], rows["joint/0.5"] = "1100", "0011"
    assert chosen(rows) == 0.0, "each half's best is the other half's worst"
    worse, better = ({f"joint/{b:g}": row for b in BALANCES} for row in ("0000", "1101"))
    assert chosen(worse, better) == 0.75, "among the balances of both"
    rows["joint/0"], rows["joint/0.5"], rows["joint/-1"] = "1000", "0010", "1111"
    assert chosen(rows) == 1.0
    rows["joint/0"] = "1110"
    assert chosen(rows) == 0.75, "of equals on the first half the one that changes least, which is worse on the other"


def test_a_table_shows_means_and_the_intervals_of_differences():
    summary = {
        "sum": {"title": "plain sum", "joint": {"mean": 0.5}},
        "zip": {"title": "ZipLoRA", "joint": {"mean": 0.75, "difference": 0.25, "interval": [0.1, 0.4]}},
    }
    assert report.markdown(summary, ["joint", "seconds"]).splitlines()[2:] == [
        "| plain sum | .50 |  |",
        "| ZipLoRA | .75 (+.10, +.40) |  |",
    ]


def test_numbers_from_ten_on_keep_their_digits():
    summary = {"zip": {"title": "ZipLoRA", "seconds": {"mean": 20.25, "interval": [-0.5, 10.5]}}}
    assert report.markdown(summary, ["seconds"]).splitlines()[2:] == ["| ZipLoRA | 20.25 (-.50, +10.50) |"]


def test_only_the_same_loras_and_noise_are_compared(monkeypatch):
    """A row with two LoRA seeds beside a plain sum with one: the second seed counts for the mean alone."""

    def cell(seed, digits):
        return {
            "regime": "strong",
            "lora seed": seed,
            "measures": {"joint/0": digits, "joint free": digits},
            "facts": {},
        }

    pair, other = pairs()[:2]
    found = {
        "sum": {pair: [cell(0, "0000")], other: [cell(0, "1100")]},
        "ziplora": {pair: [cell(0, "1111"), cell(1, "0000")], other: [cell(0, "1111"), cell(1, "11110000")]},
    }
    monkeypatch.setattr(report, "cells", lambda *_: found)
    joint = report.results("main", "strong", 4)["ziplora"]["joint"]
    assert joint["mean"] == pytest.approx((0.5 + 0.75) / 2)
    assert joint["difference"] == pytest.approx((1.0 + 0.5) / 2)


@pytest.mark.parametrize("table", report.PLACES)
def test_the_readme_says_what_the_results_say(table):
    results, (file, columns) = report.RESULTS / f"quality-{table}.json", report.PLACES[table]
    said = report.readme_tables(json.loads(results.read_text()), columns) if results.exists() else report.NOT_RUN
    assert report.in_readme(file) == said


def test_the_gate_was_passed_by_the_miniature_that_ships():
    gate = json.loads((report.RESULTS / "gate.json").read_text())
    assert gate["miniature"] == weights_hash()
    bounds = gate["gate"]
    measured = [gate["in words"], gate["jointly trained"]]
    assert gate["measurable"] == all(m[k] >= bounds[k] for m in measured for k in ("subject", "style"))


@pytest.fixture(scope="module")
def pair_on_model(samples):
    """The two samples on the miniature, as the harness has them."""
    from benchmarks.quality import rows
    from benchmarks.quality.pairs import Pair
    from ziplora_lib.hosts.diffusers import DiffusersHost

    host = DiffusersHost("miniature", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "files", lambda *_: samples)
        with rows.opened(host, Pair(3, 3), "light", 0) as on:
            yield on


def test_in_the_weights_is_as_attached_and_leaves_no_trace(pair_on_model):
    from benchmarks.quality import rows

    on = pair_on_model
    text = {key for key in on.pairing.stacks if key.startswith("lora_te")}
    stacks = {key: stack for key, stack in on.pairing.stacks.items() if key not in text}
    sample = on.held_out[0]

    def predicted():
        with torch.no_grad():
            return on.host.predict(sample.x, sample.t, [sample.cond])

    on.router.bare()
    bare = predicted()
    on.router.merged(weights=[0.7, 1.15])
    attached = predicted()
    with rows.in_weights(on, rows.by_parent(stacks)) as choose:
        choose([0.7, 1.15])
        torch.testing.assert_close(predicted(), attached, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(attached, bare, atol=1e-2)
    assert torch.equal(predicted(), bare)


def test_a_lora_alone_has_no_error_of_its_own(pair_on_model):
    from benchmarks.quality import rows

    for parent in (0, 1):
        with rows.alone(pair_on_model, parent):
            errors = pair_on_model.errors()
            assert errors[parent] < 0.02
            assert errors[1 - parent] > 0.1


@pytest.mark.parametrize("name", ["costs", "reliability"])
def test_the_readmes_tables_are_what_was_measured(name):
    made = importlib.import_module(f"benchmarks.{name}")
    text = (made.README).read_text(encoding="utf-8")
    assert text.split(made.BEGIN)[1].split(made.END)[0] == made.table()
