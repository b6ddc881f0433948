"""Methods that the benchmark compares and that showed no gain over those offered to users; of the same signature."""

from benchmarks.methods.average import average
from benchmarks.methods.closed_form import closed_form
from benchmarks.methods.np_lora import np_lora
from benchmarks.methods.rank_masks import rank_masks
from ziplora_lib.merge import NEEDS_MODEL
from ziplora_lib.merge.method import Method
from ziplora_lib.merge.methods import METHODS

COMPARED: dict[str, Method] = {
    **METHODS,
    "average": average,
    "closed-form": closed_form,
    "np-lora": np_lora,
    "rank-masks": rank_masks,
}
NEEDS_SAMPLES = NEEDS_MODEL | {"closed-form", "rank-masks"}
