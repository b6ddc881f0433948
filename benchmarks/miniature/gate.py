"""The gate: does the miniature compose? Stated before it was trained, by evaluators trained apart.

A benchmark of merging is worth nothing where even the base cannot draw an unseen subject in an unseen style. So, on pictures
with guidance 3: all of the subject right in at least SUBJECT of them and all of the style in at least STYLE, (1) on
combinations of body, top and style that were held out of training, asked for in words; (2) after joint training of one LoRA
on an unseen subject and an unseen style.

python -m benchmarks.miniature.gate [PAIRS]     writes benchmarks/results/gate.json
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import sampling
from benchmarks.judge import verdicts
from benchmarks.quality.pairs import JOINT_STEPS, Pair, joint_file, pairs, weights_hash
from ziplora_lib.hosts import world
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import joint_prompt
from ziplora_lib.lora.reader import read
from ziplora_lib.opening import attached

SUBJECT, STYLE = 0.6, 0.8
GUIDANCE = 3.0
RESULT = Path(__file__).parents[1] / "results" / "gate.json"


def asked_in_words(host: DiffusersHost, seeds: Sequence[int]) -> dict[str, float]:
    """Every new subject in every fourth new style, by their words."""
    rows = []
    for i, subject in enumerate(world.NEW_SUBJECTS):
        for style in world.NEW_STYLES[i % 4 :: 4]:
            shown = sampling.pictures(host, f"{subject.words} in {style.words} style", seeds, GUIDANCE)
            rows.append(verdicts(shown, subject, style))
    return _shares(rows)


def jointly_trained(host: DiffusersHost, pairs: Sequence[Pair], seeds: Sequence[int]) -> dict[str, float]:
    """The benchmark's own upper bound: one LoRA trained on the pictures of both."""
    rows = []
    for pair in pairs:
        with attached(read(joint_file(pair, 0)), host):
            rows.append(verdicts(sampling.pictures(host, joint_prompt(pair.shown[0]), seeds, GUIDANCE), *pair.shown))
        print(pair.name, {k: round(float(v.float().mean()), 2) for k, v in rows[-1].items()}, flush=True)
    return _shares(rows)


def _shares(rows: list[dict]) -> dict[str, float]:
    both = [row["subject"] & row["style"] for row in rows]
    shares = {name: [float(row[name].float().mean()) for row in rows] for name in ("subject", "style")}
    shares["both"] = [float(row.float().mean()) for row in both]
    return {name: round(statistics.mean(values), 3) for name, values in shares.items()}


def passed(shares: dict[str, float]) -> bool:
    return shares["subject"] >= SUBJECT and shares["style"] >= STYLE


def main(count: int = 10) -> None:
    torch.set_num_threads(1)
    host = DiffusersHost("miniature", device="cpu")
    result = {"gate": {"subject": SUBJECT, "style": STYLE, "guidance": GUIDANCE}}
    result["in words"] = asked_in_words(host, range(4))
    print(result["in words"], flush=True)
    result["jointly trained"] = jointly_trained(host, pairs()[:count], range(16))
    result["measurable"] = passed(result["in words"]) and passed(result["jointly trained"])
    result |= {"pairs": count, "steps": JOINT_STEPS, "miniature": weights_hash()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
