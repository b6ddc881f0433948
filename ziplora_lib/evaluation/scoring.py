"""From the scores of single pictures to a table: joint success, harmonic mean, and intervals over pairs.

Either score alone rewards a copy: the style picture itself has the highest style CLIP-I, the subject without any style the
highest subject DINO. Joint success and the harmonic mean ask for both in one picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ziplora_lib.bootstrap import interval
from ziplora_lib.evaluation.pairs import PLAIN_SUM, STYLE_ALONE, SUBJECT_ALONE

MEASURES = {
    "style": "style CLIP-I",
    "subject": "subject DINO",
    "text": "text CLIP-T",
    "harmonic": "harmonic mean",
    "success": "joint success",
}
OWN_PROMPT = "own prompt"
LEVEL = 0.95


def harmonic_mean(subject: float, style: float) -> float:
    """Of two cosines of one picture; 0 where one is not positive. It is nearer to the smaller of the two."""
    return 2 * subject * style / (subject + style) if subject > 0 and style > 0 else 0.0


def threshold(without: float, alone: float, share: float) -> float | None:
    """What a picture's score must reach: that share of the way from what is scored without the LoRA to the LoRA alone.

    A share of the LoRA's own score alone would not do: CLIP's cosines are well above 0 for pictures that have nothing in
    common, so a picture without the style could pass. None where the LoRA alone scores no higher: nothing can be told there.
    """
    return without + share * (alone - without) if alone > without else None


def judged(rows: dict[str, list[dict]], own: Mapping[str, Sequence[float]], shares: Mapping[str, float]) -> dict:
    """The thresholds of one pair, {"subject", "style"}; every picture gets its "harmonic" and its "success" (1, 0, None).

    rows: pictures of the joint prompts with "subject" and "style" scores; own: each LoRA's scores on its own prompt;
    shares: of the way between, see `threshold`. What is scored without the subject LoRA is the style LoRA alone on the
    joint prompts, and the other way round: the words of a prompt can bring something of either by themselves.
    """
    others = {"subject": STYLE_ALONE, "style": SUBJECT_ALONE}
    thresholds = {
        role: threshold(_mean(rows[other], role), float(np.mean(own[role])), shares[role])
        for role, other in others.items()
    }
    told = None not in thresholds.values()
    for pictures in rows.values():
        for picture in pictures:
            picture["harmonic"] = harmonic_mean(picture["subject"], picture["style"])
            picture["success"] = int(all(picture[r] >= at for r, at in thresholds.items())) if told else None
    return thresholds


def summary(results: Sequence[Mapping]) -> dict:
    """{row: {measure: {"mean", "pairs", "difference", "interval"}}} over all pairs, each pair counting once.

    results: as `evaluated` returns them. difference: to the plain sum on the same pairs, with its bootstrap interval over
    pairs, [low, high]; None for the plain sum itself, the interval also with fewer than two pairs. The row "own prompt" has
    each LoRA alone on the prompt that it was trained with: about the most that a merge can reach.
    """
    own = {role: [np.mean([p[role] for p in r["own_prompt"][role]]) for r in results] for role in ("style", "subject")}
    table = {OWN_PROMPT: {role: _entry(values) for role, values in own.items()}}
    for row in results[0]["rows"]:
        table[row] = {}
        for measure in MEASURES:
            means = [(_mean(r["rows"][row], measure), _mean(r["rows"][PLAIN_SUM], measure)) for r in results]
            told = [both for both in means if None not in both]
            differences = None if row == PLAIN_SUM else [mine - plain for mine, plain in told]
            table[row][measure] = _entry([mine for mine, _ in told], differences)
    return table


def _entry(values: Sequence[float], differences: Sequence[float] | None = None) -> dict:
    return {
        "mean": float(np.mean(values)) if values else None,
        "pairs": len(values),
        "difference": float(np.mean(differences)) if differences else None,
        "interval": list(interval(differences, LEVEL)) if differences and len(differences) > 1 else None,
    }


def _mean(pictures: Sequence[Mapping], measure: str) -> float | None:
    values = [picture[measure] for picture in pictures]
    return None if None in values else float(np.mean(values))


def text(report: Mapping) -> str:
    """A report's summary as a table, a line a row, with what it means."""
    results, shares = report["pairs"], report["shares"]

    def cell(entry: Mapping | None) -> str:
        if not entry or entry["mean"] is None:
            return "-"
        low_high = entry["interval"]
        return f"{entry['mean']:.3f}" + ("" if low_high is None else " ({:+.3f}, {:+.3f})".format(*low_high))

    lines = [["", *MEASURES.values()]]
    lines += [
        [row, *(cell(entries.get(measure)) for measure in MEASURES)] for row, entries in report["summary"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines]
    pairs, untold = len(results), [r["name"] for r in results if None in r["thresholds"].values()]
    if pairs > 1:
        shown.append(
            f"In brackets: {LEVEL:.0%} bootstrap interval, over {pairs} pairs, of the difference to the plain sum"
            + (", too narrow with so few" if pairs < 10 else "")
        )
    else:
        shown.append("One pair: no interval")
    shown.append(
        f"Joint success: pictures at least {shares['subject']:.0%} (subject) and {shares['style']:.0%} (style) of the way "
        "from the other LoRA alone to the LoRA on its own prompt"
    )
    if untold:
        shown.append(
            f"Not in the joint success: {', '.join(untold)}, where a LoRA on its own prompt scores no higher than the other "
            "LoRA"
        )
    return "\n".join(shown)
