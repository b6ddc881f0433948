"""The maths: torch and nothing else. METHODS is the table of merge methods: one file a method, one line here."""

from ziplora_lib.merge.direct import direct
from ziplora_lib.merge.method import Method
from ziplora_lib.merge.ziplora import ziplora

METHODS: dict[str, Method] = {
    "ziplora": ziplora,
    "direct": direct,
}

# these learn from calibration samples; the others need no model
NEEDS_MODEL = {"ziplora"}
