"""The table of merge methods, by name."""

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
