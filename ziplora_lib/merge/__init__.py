"""The maths: torch and nothing else. METHODS is the table of merge methods: one file a method, one line here."""

from ziplora_lib.merge.direct import direct
from ziplora_lib.merge.method import Method
from ziplora_lib.merge.regmean import regmean
from ziplora_lib.merge.ssr import ssr
from ziplora_lib.merge.ziplora import ziplora

METHODS: dict[str, Method] = {
    "ziplora": ziplora,
    "direct": direct,
    "regmean": regmean,
    "ssr": ssr,
}

# these use calibration samples; the others need no model
NEEDS_MODEL = {"ziplora", "regmean", "ssr"}

# what each is, in a few words
SAID = {
    "ziplora": "learns a coefficient for every input column",
    "direct": "the plain sum",
    "regmean": "the least squares over all matrices, layer by layer",
    "ssr": "the least squares among the ranks, layer by layer",
}
