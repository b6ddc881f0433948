"""The command line: exit status, what it prints, what it writes and what it leaves alone."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loras import write_lora

from ziplora_lib.lora.reader import read

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--steps", "3", "--resolution", "64", "--pictures", "1", "--samples", "4", "--sampler-steps", "2",
         "--balance-points", "1", "--at-once", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def zipping(pair_files, tmp_path):
    """zipping(*more, **changed): the arguments of a small `zip`."""

    def arguments(*more, subject=pair_files[0], style=pair_files[1], out=tmp_path / "merged.safetensors"):
        return ["zip", "--subject", subject, "--style", style, "--subject-prompt", "a photo of sks cat",
                "--style-prompt", "a house in szn style", "--out", out, *SMALL, *more]  # fmt: skip

    return arguments


def start(arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "ziplora_lib", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd="/")


def test_the_same_command_twice_gives_the_same_bytes(zipping, tmp_path):
    files = []
    for i, seed in enumerate(("1", "2")):
        (tmp_path / str(i)).mkdir()
        out = tmp_path / str(i) / "merged.safetensors"
        process = start(zipping(out=out), PYTHONHASHSEED=seed)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert (tmp_path / "0/merged.png").read_bytes() == (tmp_path / "1/merged.png").read_bytes()


def test_the_seed_decides(cli, zipping, tmp_path):
    saved = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.safetensors"
        assert cli(*zipping("--seed", seed, out=out))[0] == 0
        saved.append(read(out).hash)
    assert saved[0] != saved[1]


def test_zip_prints_what_it_did_and_writes_the_report(cli, zipping, tmp_path):
    report = tmp_path / "report.json"
    status, out, _ = cli(*zipping("--report", report, "--dtype", "bf16"))
    assert status == 0
    assert str(tmp_path / "merged.safetensors") in out
    assert "<lora:merged:1>" in out
    assert re.search(r"subject: error against this LoRA alone [\d.]+ \(plain sum [\d.]+\); mean coefficient", out)
    assert "warning: " in out
    told = json.loads(report.read_text())
    assert told["saved"]["sha256"] == read(tmp_path / "merged.safetensors").hash
    assert [h["step"] for h in told["history"]] == [1, 2, 3]
    assert told["learned"]["error"]
    for warning in told["warnings"]:
        assert warning in out
    assert read(tmp_path / "merged.safetensors").dtype == "bfloat16"
    assert {"merged.safetensors", "merged.json", "merged.png"} <= {f.name for f in tmp_path.iterdir()}


def refused(cli, tmp_path, arguments, word):
    """Exit status 2, one line on stderr that has the word, nothing written."""
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    status, out, err = cli(*arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2, (out, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("ziplora: ")
    assert word in lines[0]
    assert out == ""
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before


def test_bad_files_are_refused_in_one_line(cli, zipping, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("not a LoRA")
    refused(cli, tmp_path, zipping(subject=tmp_path / "no.safetensors"), "no.safetensors")
    refused(cli, tmp_path, zipping(subject=text), "text.safetensors")
    refused(cli, tmp_path, zipping(style=text), "text.safetensors")
    refused(cli, tmp_path, zipping(style=tmp_path / "x.pt"), "never opened")
    sd1 = write_lora(
        tmp_path / "sd1.safetensors", {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 768)}
    )
    refused(cli, tmp_path, zipping(style=sd1), "SD 1.5")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--steps", "0"], "steps"),
        (["--lr", "nan"], "lr"),
        (["--resolution", "100"], "resolution"),
        (["--subject-strength", "0"], "strength"),
        (["--subject-prompt", ""], "prompt"),
        (["--reference-style", "/nowhere.png"], "nowhere.png"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--device", "tpu9"], "tpu9"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--report", "/nowhere/report.json"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_settings_are_refused_in_one_line(cli, zipping, tmp_path, more, word):
    refused(cli, tmp_path, zipping(*more), word)


@pytest.mark.parametrize(
    "out", ["merged", "merged.ckpt", "a..b.safetensors", "con.safetensors", "a,b.safetensors", "no/such/x.safetensors"]
)
def test_bad_outputs_are_refused_in_one_line(cli, zipping, tmp_path, out):
    refused(cli, tmp_path, zipping(out=tmp_path / out), "")


def test_a_report_cannot_take_the_place_of_a_lora_or_its_card(cli, zipping, tmp_path):
    refused(cli, tmp_path, zipping("--report", tmp_path / "merged.json"), "card")
    refused(cli, tmp_path, zipping("--report", tmp_path / "merged.safetensors"), "not a .json")


def test_a_taken_name_is_refused_and_overwrite_replaces(cli, zipping, tmp_path):
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"precious")
    refused(cli, tmp_path, zipping(), "already there")
    assert cli(*zipping("--overwrite"))[0] == 0
    assert len(read(out).deltas) > 20


def test_the_same_lora_twice_is_refused_unless_allowed(cli, zipping, tmp_path, pair_files):
    refused(cli, tmp_path, zipping(style=pair_files[0]), "same LoRA")
    assert cli(*zipping("--allow-same", "--method", "direct", style=pair_files[0]))[0] == 0


@pytest.fixture
def several(pair_files, third_file, tmp_path):
    """several(*more): the arguments of a small `zip` of two subjects and a style."""

    def arguments(*more):
        return ["zip", "--subject", pair_files[0], "--subject-prompt", "sks cat", "--subject", third_file,
                "--subject-prompt", "sks dog", "--style", pair_files[1], "--style-prompt", "szn style",
                "--out", tmp_path / "merged.safetensors", *SMALL, *more]  # fmt: skip

    return arguments


def test_flags_belong_to_the_nth_lora_of_their_role(pair_files, tmp_path):
    from ziplora_lib.__main__ import _parser, _recipe

    def parents(*arguments):
        return _recipe(_parser().parse_args(["zip", "--out", "x.safetensors", *arguments])).parents

    first, second, ink = parents(
        *["--style", "ink", "--subject", "dog", "--subject", "cat", "--subject-prompt", "p", "--subject-prompt", "q"],
        *[
            "--subject-strength",
            "0.5",
            "--subject-strength",
            "1.5",
            "--reference-subject",
            "",
            "--reference-subject",
            "r",
        ],
        *["--reference-style", "a", "--reference-style", "b"],
    )
    assert [(p.lora, p.role, p.prompt, p.strength, p.reference) for p in (first, second, ink)] == [
        ("dog", "subject", "p", 0.5, []), ("cat", "subject", "q", 1.5, ["r"]), ("ink", "style", "", 1.0, ["a", "b"])
    ]  # fmt: skip
    assert [p.role for p in parents("--style", "ink", "--style", "oil")] == ["style", "style"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--subject-prompt", "third"], "--subject-prompt: 3 given for 2 LoRAs"),
        (["--style-prompt", "second"], "--style-prompt: 2 given for 1"),
        (["--subject-strength", "0.5"], "--subject-strength: 1 given for 2"),
        (["--reference-subject", "a.png"], "--reference-subject: 1 given for 2"),
        (["--subject", "no.safetensors"], "--subject-prompt: 2 given for 3"),
        (["--style", "no.safetensors", "--style-prompt", "x"], "no.safetensors"),
        (["--style", "x", "--style-prompt", "x"] * 6, "at most 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_does_not_fit_several_loras_is_refused_in_one_line(cli, several, tmp_path, more, word):
    refused(cli, tmp_path, several(*more), word)


def test_one_lora_is_too_few(cli, tmp_path, pair_files):
    out = ["--out", tmp_path / "merged.safetensors"]
    refused(cli, tmp_path, ["zip", *out], "two LoRAs or more")
    refused(cli, tmp_path, ["zip", "--style", pair_files[1], *out], "two LoRAs or more")
    refused(
        cli, tmp_path, ["zip", "--style", pair_files[1], "--subject-prompt", "x", *out], "--subject-prompt: 1 given"
    )


def test_two_subjects_and_a_style_are_zipped_baked_and_split(cli, several, tmp_path):
    status, out, err = cli(*several("--balance-points", "3"))
    assert status == 0, err
    for title in ("subject subject: error", "subject third: error", "\nstyle: error"):
        assert title in out
    merged, baked = tmp_path / "merged.safetensors", tmp_path / "baked.safetensors"
    assert (tmp_path / "merged.balance.png").exists()

    def bake(*more):
        return ["bake", merged, "--out", baked, "--overwrite", *more]

    def strengths():
        return json.loads(read(baked).metadata["ziplora.strengths"])

    for more, wanted in (
        (["--balance", "-1"], [1.2, 1.2, 0.75]),
        (["--balance", "1"], [0.7, 0.7, 1.15]),
        (["--subject", "0.5", "--style", "2"], [0.5, 0.5, 2]),
        (["--subject", "0.5", "--subject", "1.5"], [0.5, 1.5, 1]),
        (["--style", "-1"], [1, 1, -1]),
    ):
        assert cli(*bake(*more))[0] == 0
        assert strengths() == wanted
    for more, word in (
        ([], "either --balance"),
        (["--balance", "0", "--style", "1"], "either --balance"),
        (["--balance", "2"], "between -1 and 1"),
        (["--balance", "nan"], "between -1 and 1"),
        (["--subject", "1", "--subject", "2", "--subject", "3"], "has 2 subjects (subject, third), but 3"),
        (["--style", "1", "--style", "2"], "has 1 style (style), but 2"),
        (["--style", "5"], "between -4 and 4"),
        (["--style", "nan"], "between -4 and 4"),
    ):
        refused(cli, tmp_path, bake(*more), word)

    first, second, style = (tmp_path / f"{name}-half.safetensors" for name in ("first", "second", "style"))
    outs = [("--out-subject", first), ("--out-subject", second), ("--out-style", style)]

    def split(*given):
        return ["split", merged, *(word for pair in given for word in pair)]

    for given, word in (
        ([], "has 2 subjects (subject, third), but 0"),
        (outs[:2], "has 1 style (style), but 0"),
        (outs[1:], "has 2 subjects (subject, third), but 1"),
        ([*outs, ("--out-style", tmp_path / "x.safetensors")], "has 1 style (style), but 2"),
        ([*outs[:2], ("--out-style", first)], "same name"),
        ([*outs[:2], ("--out-style", merged)], "same name"),
        ([*outs[:2], ("--out-style", "x.ckpt")], "--out-style x.ckpt"),
        ([*outs[:2], ("--out-style", baked)], "already there"),
    ):
        refused(cli, tmp_path, split(*given), word)
    status, out, err = cli(*split(*outs))
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith("prompt")] == [
        f"prompt with <lora:{name}-half:1>" for name in ("first", "second", "style")
    ]
    assert [read(path).ranks for path in (first, second, style)] == [[3], [2], [5]]


def test_bake_and_split_refuse_what_is_not_ours(cli, tmp_path, pair_files):
    for command in (
        ["bake", pair_files[0], "--balance", "0", "--out", tmp_path / "x.safetensors"],
        [
            "split",
            pair_files[0],
            "--out-subject",
            tmp_path / "x.safetensors",
            "--out-style",
            tmp_path / "y.safetensors",
        ],
    ):
        refused(cli, tmp_path, command, "not made by ZipLoRA")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["zip"], ["zip", "--steps", "many"], ["inspect"], ["evaluate"], ["strip"]], ids=str
)
def test_wrong_usage_is_status_2(cli, arguments):
    status, out, err = cli(*arguments)
    assert status == 2
    assert "usage" in err
    assert out == ""


@pytest.mark.parametrize("command", [[], ["zip"], ["inspect"], ["bake"], ["split"], ["evaluate"], ["strip"]], ids=str)
def test_help(cli, command):
    status, out, _ = cli(*command, "--help")
    assert status == 0
    assert "usage" in out


def test_every_field_of_the_recipe_has_a_flag_with_its_default(pair_files):
    from ziplora_lib.__main__ import _parser, _recipe
    from ziplora_lib.recipe import Recipe, parse

    arguments = ["zip", "--subject", "a", "--style", "b", "--out", "x.safetensors"]
    plain = parse({"parents": [{"lora": "a", "role": "subject"}, {"lora": "b", "role": "style"}], "output": "x"})
    assert _recipe(_parser().parse_args(arguments)) == plain
    other = {"method": "direct", "objective": "paper", "steps": 7, "lr": 0.5, "lam": 2.0, "start": 0.25, "seed": 3,
             "resolution": 512, "dtype": "bf16", "overwrite": True, "allow_same": True, "pictures": 2, "samples": 8,
             "empty_share": 0.5, "sampler_steps": 3, "guidance": 2.0, "batch": 2, "at_once": 2, "memory": "fast",
             "balance_points": 3, "preview_size": 128,
             "preview_prompt": "x", "text_encoders": "learn", "equal_norms": True, "dense_rank": 8,
             "max_rank": 12, "ridge": 0.2, "keep_energy": 0.9, "keep_norm": 0.95,
             "layer_names": "peft", "loss_guidance": 4.0}  # fmt: skip
    assert other.keys() == Recipe.__fields__.keys() - {"parents", "output"}
    for field, value in other.items():
        flag = "--" + field.replace("_", "-")
        more = [flag, str(value)] if not isinstance(value, bool) else [flag if value else flag.replace("--", "--no-")]
        changed = _recipe(_parser().parse_args([*arguments, *more]))
        assert getattr(changed, field) == value


def test_inspect(cli, zipping, tmp_path, pair_files):
    assert cli(*zipping())[0] == 0
    merged = tmp_path / "merged.safetensors"
    status, out, err = cli("inspect", "--json", pair_files[0], merged)
    assert (status, err) == (0, "")
    subject, both = json.loads(out)
    assert subject["file"] == str(pair_files[0])
    assert (subject["kind"], subject["base"], subject["ranks"]) == ("LoCon", "SDXL", [3])
    assert (
        subject["layers"] == subject["unet_layers"] + subject["text_encoder_layers"] == len(read(pair_files[0]).deltas)
    )
    assert both["ranks"] == [3, 5, 8]
    assert both["sha256"] == read(merged).hash
    assert {"recipe", "parents", "ranks", "coefficients", "version"} <= both["ziplora"].keys()
    status, out, _ = cli("inspect", pair_files[0], merged)
    assert status == 0
    assert str(merged) in out
    assert "LoCon" in out
    assert "subject + style" in out


def test_inspect_of_a_bad_file_is_status_2_and_names_it(cli, tmp_path, pair_files):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    for more in ([], ["--json"]):
        status, out, err = cli("inspect", *more, bad, pair_files[0])
        assert status == 2
        assert "bad.safetensors" in out + err
        assert "Traceback" not in out + err


def interrupted(arguments, phase):
    """Ctrl-C as soon as that phase is shown: (status, stdout, stderr)."""
    process = start(arguments)
    seen = ""
    while phase not in seen:
        letter = process.stderr.read(1)
        assert letter, f"ended with {process.wait()} before {phase}: {seen}"
        seen += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    return process.returncode, out, seen + err


def test_an_interrupt_in_the_merge_keeps_the_best(zipping, tmp_path):
    status, out, err = interrupted(zipping("--steps", "1000"), "merge 2/1000")
    assert status == 130, err
    assert "Traceback" not in err
    assert re.search(r"stopped at step \d+ of 1000; the best coefficients so far", out)
    assert len(read(tmp_path / "merged.safetensors").deltas) > 20


def test_an_interrupt_in_the_calibration_saves_nothing(zipping, tmp_path):
    status, _, err = interrupted(zipping("--samples", "1000"), "calibrate 2/")
    assert status == 130, err
    assert "Traceback" not in err
    assert "nothing was saved" in err
    assert [f for f in tmp_path.iterdir() if f.is_file()] == []
