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
        first, second = 1 - 0.2 * balance, 1 + 0.25 * balance
    else:
        first, second = 1 - 0.3 * balance, 1 + 0.15 * balance
    return [first if of_first else second for of_first in first_side(roles)]


def points(n: int) -> list[float]:
    """n balances from subject to style; one point is the middle."""
    return [0.0] if n == 1 else [round(-1 + 2 * i / (n - 1), 4) for i in range(n)]


def side(balance: float, roles: Sequence[str], names: Sequence[str]) -> str:
    """What a balance other than 0 gives more of: subject or style, or the LoRAs by name where all have one role."""
    members = [i for i, of_first in enumerate(first_side(roles)) if of_first == (balance < 0)]
    return roles[members[0]] if len(set(roles)) > 1 else " and ".join(names[i] for i in members)


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
