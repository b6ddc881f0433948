"""Whether a merge paid, in plain words: from its errors beside the plain sum's."""

from __future__ import annotations

from collections.abc import Sequence

# The plain sum's relative error on the style tells lightly trained pairs from strong ones; the subject's says less. Of the
# benchmark's 64 pairs nine in ten light ones were below .1 and all strong ones above .25, measured without guidance; under it
# .3 and .24: there a few fall on the wrong side.
LIGHT_STYLE, LIGHT_STYLE_GUIDED = 0.2, 0.27
# an error this much smaller than the plain sum's counts as closer
CLOSER = 0.95


def is_light(summed: Sequence[float], roles: Sequence[str], guided: bool) -> bool | None:
    """Whether the LoRAs get along well as they are; None where that is not known: no errors, or not a role each.

    summed: each LoRA's error in the plain sum, under guidance or not.
    """
    styles = [error for error, role in zip(summed, roles) if role == "style"]
    if not styles or len(styles) == len(roles):
        return None
    return max(styles) < (LIGHT_STYLE_GUIDED if guided else LIGHT_STYLE)


def verdict(merged: Sequence[float], summed: Sequence[float], parents: Sequence[dict], guided: bool) -> str:
    """In words. merged, summed: each LoRA's error in the merge and in the plain sum, both empty where nothing was learned;
    parents: name, title and role of each."""
    if not merged or not summed:
        return "The LoRAs were added as they are; nothing was learned."
    tags = " ".join(f"<lora:{parent['name']}:1>" for parent in parents)
    these, them = ("pair", "the two") if len(parents) == 2 else ("group", "them")
    roles = [parent["role"] for parent in parents]
    light = is_light(summed, roles, guided)
    if not any(now < CLOSER * was for now, was in zip(merged, summed)):
        text = f"Zipping did not pay for this {these}: plainly adding {them}, {tags}, is as close to each."
    else:
        parts = []
        for parent, now, was in zip(parents, merged, summed):
            if now < CLOSER * was:
                parts.append(f"{short(was / max(now, 1e-9))} times smaller on the {parent['title']}")
            else:
                parts.append(f"{'larger' if now > was / CLOSER else 'as large'} on the {parent['title']}")
        text = f"Compared with plainly adding {them}, the error is {' and '.join(parts)}."
        if light:
            text += (
                f" But this {these} gets along well anyway: plainly adding {them}, {tags}, may look as good. Compare."
            )
        elif light is False:
            text += f" Plainly added they clash: it is such a {these} that zipping is for."
    return text


def short(value: float) -> str:
    """Two digits behind the point, none from ten on."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
