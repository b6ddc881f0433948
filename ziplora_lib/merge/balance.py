"""The balance subject : style of a merge, one number for two strengths."""

from __future__ import annotations


def weights(balance: float) -> tuple[float, float]:
    """(w_c, w_s) for a balance from -1 (more subject) over 0 (as learned) to 1 (more style).

    Straight lines through (1.2, .75), (1, 1) and (.7, 1.15): along these a pair goes from one to the other, at a ratio
    that differs by pair, without the sum growing.
    """
    if balance <= 0:
        return 1 - 0.2 * balance, 1 + 0.25 * balance
    return 1 - 0.3 * balance, 1 + 0.15 * balance


def points(n: int) -> list[float]:
    """n balances from subject to style; one point is the middle."""
    return [0.0] if n == 1 else [round(-1 + 2 * i / (n - 1), 4) for i in range(n)]
