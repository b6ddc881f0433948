"""NP-LoRA (arXiv 2511.11051), soft null-space projection: the subjects lose part of what lies in the styles' input space.

A_c ← A_c − μ/(1+μ) · A_c Q Qᵀ, with Q an orthonormal basis of the rows of A_s. Needs no model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing

MU = 0.5  # the paper's


def np_lora(
    pairing: Pairing, calibration: Calibration | None, settings: Settings, callback: Callback, mu: float = MU
) -> Merged:
    """`down` of every subject, projected against those of all styles together; `up` and the styles stay as they are.

    LoRAs of one role: the first is projected against all others. Several subjects are not projected against each other, nor
    several styles. mu: 0 is the plain sum; without bound, nothing in the styles' input space is left.
    """
    removed = mu / (1 + mu)
    stacks = dict(pairing.stacks)
    for key in pairing.learned:
        stack = stacks[key]
        ours = sum(stack.ranks[: pairing.first])
        down = stack.down.flatten(1)
        basis = row_space(down[ours:])
        projected = down[:ours] - removed * (down[:ours] @ basis) @ basis.T
        stacks[key] = replace(stack, down=torch.cat([projected, down[ours:]]).reshape(stack.down.shape))
    return Merged(stacks, summary={"method": "np-lora"})


def row_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of what the rows span: (r, columns) -> (columns, q).

    By SVD rather than by QR: zero or repeated rows give no direction of their own.
    """
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[sizes > 1e-5 * sizes.amax(0, keepdim=True)].T if len(rows) else rows.T
