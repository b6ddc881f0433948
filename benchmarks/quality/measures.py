"""What is asked of a merge, in pictures: everything that a table of the benchmark shows is a mean of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import sampling
from benchmarks.judge import verdicts
from benchmarks.quality.pairs import Pair
from ziplora_lib.hosts import world
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import joint_prompt, style_prompt, style_subjects, subject_prompt, subject_words
from ziplora_lib.merge import balance

# nine in ten pictures of a LoRA alone on its own prompt are right here; at 3 one style of the first four never was
GUIDANCE = 2.0
BALANCES = balance.points(5)
Choose = Callable[[float], None]  # sets the balance; what else is attached stays


def measured(
    host: DiffusersHost, pair: Pair, lora_seed: int, choose: Choose, seeds: int, balances: bool = True
) -> dict[str, str]:
    """Each measure: for every seed 1 or 0, as a string of digits.

    joint/B: subject and style, both prompts' words together, at balance B; subject/B, style/B: each of the two there;
    joint free, joint pushed: without guidance, and with more of it; own subject, own style: on each LoRA's own
    prompt, the style's with subjects that its pictures did not show;
    context: the subject in a style that the base model knows by name.
    """
    subject, style = pair.shown
    rows: dict[str, str] = {}

    def shown(prompt: str, n: int, guidance: float = GUIDANCE) -> Tensor:
        return sampling.pictures(host, prompt, range(n), guidance)

    for at in BALANCES if balances else [0.0]:
        choose(at)
        found = verdicts(shown(joint_prompt(subject), seeds), subject, style)
        rows |= {f"{what}/{at:g}": digits(row) for what, row in found.items()}
        rows[f"joint/{at:g}"] = digits(found["subject"] & found["style"])
    choose(0.0)
    for name, guidance in (("joint free", 1.0), ("joint pushed", 5.0)):
        found = verdicts(shown(joint_prompt(subject), seeds, guidance), subject, style)
        rows[name] = digits(found["subject"] & found["style"])
    few = max(4, seeds // 2)
    rows["own subject"] = digits(verdicts(shown(subject_prompt(subject), few), subject, None)["subject"])
    taught = style_subjects(lora_seed)
    others = [known for known in world.KNOWN_SUBJECTS if known not in taught][pair.style :: 10][:2]
    own = [verdicts(shown(style_prompt(other), few // 2), None, style)["style"] for other in others]
    rows["own style"] = digits(torch.cat(own))
    name, named = list(world.NAMED_STYLES.items())[pair.style % len(world.NAMED_STYLES)]
    context = verdicts(shown(f"{subject_words(subject)} in {name} style", few), subject, named)
    rows["context"] = digits(context["subject"] & context["style"])
    return rows


def digits(row: Tensor) -> str:
    return "".join(str(int(value)) for value in row)


def share(row: str) -> float:
    return sum(map(int, row)) / len(row)


def chosen(*rows: dict[str, str]) -> float:
    """Joint success at the balance that a user would choose: chosen on half the seeds, judged on the other, both ways.

    rows: measures of what the user is shown a strip of; the choice is among all their balances.
    """
    nearest = sorted(BALANCES, key=abs)  # of equals, the one that changes least
    at = [measures[f"joint/{b:g}"] for measures in rows for b in nearest if f"joint/{b:g}" in measures]
    n = min(map(len, at))
    halves = [(row[: n // 2], row[n // 2 : n]) for row in at]

    def judged(by: int) -> float:
        best = max(halves, key=lambda pair: share(pair[by]))
        return share(best[1 - by])

    return (judged(0) + judged(1)) / 2
