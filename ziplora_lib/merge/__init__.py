"""The maths: torch and nothing else. METHODS is the table of merge methods: one file a method, one line here."""

from ziplora_lib.merge.average import average
from ziplora_lib.merge.closed_form import closed_form
from ziplora_lib.merge.direct import direct
from ziplora_lib.merge.method import Method
from ziplora_lib.merge.np_lora import np_lora
from ziplora_lib.merge.rank_masks import rank_masks
from ziplora_lib.merge.regmean import regmean
from ziplora_lib.merge.ssr import ssr
from ziplora_lib.merge.ziplora import ziplora

METHODS: dict[str, Method] = {
    "ziplora": ziplora,
    "direct": direct,
    "average": average,
    "closed-form": closed_form,
    "regmean": regmean,
    "ssr": ssr,
    "np-lora": np_lora,
    "rank-masks": rank_masks,
}

# these use calibration samples; the others need no model
NEEDS_MODEL = {"ziplora", "closed-form", "regmean", "ssr", "rank-masks"}

# what each is, in a few words
SAID = {
    "ziplora": "learns a coefficient for every input column",
    "direct": "the plain sum",
    "average": "the plain sum, divided by the number of LoRAs",
    "closed-form": "ziplora's coefficients by least squares, layer by layer, without gradients",
    "regmean": "the least squares over all matrices, layer by layer",
    "ssr": "the least squares among the ranks, layer by layer",
    "np-lora": "takes out of the subject part of what overlaps with the style",
    "rank-masks": "learns a coefficient for every rank",
}
