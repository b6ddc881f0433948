"""The balance subject : style of a merge, one number for the strengths of all its LoRAs.

Where all have one role, the balance is that of the first LoRA and the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from ziplora_lib.errors import BadInput


def weights(balance: float, roles: Sequence[str]) -> list[float]:
    """A strength for each LoRA, for a balance from -1 (more subject) over 0 (as learned) to 1 (more style).

    Straight lines through (1.2, .75), (1, 1) and (.7, 1.15) for (subject, style): along these a pair goes from one to the
    other, at a ratio that differs by pair, without the sum growing. Raises BadInput for a balance that is none.
    """
    if not -1 <= balance <= 1:
        raise BadInput(
            f"the balance {balance} is not between -1 and 1", remedy="-1 is more subject, 0 as learned, 1 more style"
        )
    if balance <= 0:
        return spread(1 - 0.2 * balance, 1 + 0.25 * balance, roles)
    return spread(1 - 0.3 * balance, 1 + 0.15 * balance, roles)


def spread(first: float, second: float, roles: Sequence[str]) -> list[float]:
    """A strength for each LoRA, from one for each of the balance's two sides."""
    return [first if of_first else second for of_first in first_side(roles)]


def points(n: int) -> list[float]:
    """n balances from subject to style; one point is the middle."""
    return [0.0] if n == 1 else [round(-1 + 2 * i / (n - 1), 4) for i in range(n)]


def side(balance: float, roles: Sequence[str], names: Sequence[str]) -> str:
    """What a balance other than 0 gives more of."""
    return sides(roles, names)[0 if balance < 0 else 1]


def sides(roles: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """What the balance's two sides are called: subject and style, or the LoRAs by name where all have one role."""
    if len(set(roles)) > 1:
        return "subject", "style"
    return names[0], " and ".join(names[1:])


def caption(balance: float, roles: Sequence[str], names: Sequence[str]) -> str:
    """A balance in words, with the strengths that it stands for."""
    if balance == 0:
        return "as learned"
    strengths = " : ".join(f"{weight:.2f}" for weight in weights(balance, roles))
    return f"more {side(balance, roles, names)} ({strengths})"


def first_side(roles: Sequence[str]) -> list[bool]:
    """Which LoRAs are on the balance's first side."""
    if len(set(roles)) == 1:
        return [i == 0 for i in range(len(roles))]
    return [role == "subject" for role in roles]
