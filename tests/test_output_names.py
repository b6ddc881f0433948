"""Names of new LoRAs: refused, or a plain file of that name in its folder which a prompt tag can call."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.writer import check_name


@pytest.mark.parametrize(
    "name", ["dog-watercolour", "dog watercolour v2", "犬の水彩", "a", "x.v1", "dog (1)", "x" * 200]
)
def test_plain_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "\t", "a/b", "/etc/passwd", "a\\b", "..", "../x", "a..b", ".", ".hidden", "a:b", "C:", "a>b", "a<b", "a|b",
     'a"b', "a?b", "a*b", "a,b", "a\nb", "a\x00b", "a\x7fb", " a", "a ", "a.", "con", "CON", "nul.v1", "Com1", "lpt9",
     "aux", "prn", "none", "None", "addams", "x" * 201, "é" * 101, "\ud800", "a\udfffb", "a\u202egnp", "a\u200bb", "\ufeffa",
     "a\u2066b", "a\u2028b", "a\x85b"],
)  # fmt: skip
def test_refused_names(name):
    with pytest.raises(BadInput) as caught:
        check_name(name)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(), min_size=1, max_size=30))
def test_every_accepted_name_is_one_file_and_one_tag(tmp_path_factory, name):
    try:
        check_name(name)
    except BadInput:
        return
    folder = tmp_path_factory.mktemp("names")
    path = folder / f"{name}.safetensors"
    path.write_bytes(b"")
    assert [entry.name for entry in folder.iterdir()] == [f"{name}.safetensors"]
    assert path.stem == name
    # as the WebUI reads a prompt (modules/extra_networks.py)
    found = re.findall(r"<(\w+):([^>]+)>", f"a <lora:{name}:1> b")
    assert [(kind, rest.split(":")) for kind, rest in found] == [("lora", [name, "1"])]
