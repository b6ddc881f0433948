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

# what each is, in a few words, and when to take it, by the rows of benchmarks/results/quality-main.json
SAID = {
    "ziplora": "begins as ssr, and learns a coefficient for every input column; for lightly and for strongly trained LoRAs",
    "direct": "the plain sum; as good for lightly trained LoRAs at ordinary guidance",
    "ssr": "least squares among the ranks, layer by layer: faster; for some strong LoRAs, not for light ones",
    "regmean": "least squares over all matrices, layer by layer; likewise",
}
