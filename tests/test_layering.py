"""Imports run downwards only, and the core needs nothing that the WebUI does not have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ziplora_lib

PACKAGE = Path(ziplora_lib.__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
)
CORE = [name for name in MODULES if name.startswith(("lora.", "merge.")) or name in ("errors", "recipe", "bootstrap")]


def imports(name):
    """Every module that a module's code imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "later":
            found.add(node.args[0].value)
    return found


def inside(found, *parts):
    return {name for name in found for part in parts if name == part or name.startswith(f"{part}.")}


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_no_face_no_host_and_no_framework(name):
    strangers = (
        "gradio",
        "fastapi",
        "modules",
        "diffusers",
        "transformers",
        "peft",
        "networks",
        "sgm",
        "ldm",
        "lycoris",
    )
    parts = (
        "tab",
        "api",
        "job",
        "jobs",
        "hosts",
        "__main__",
        "calibration",
        "charts",
        "evaluation",
        "commands",
        "server",
    )
    faces = [f"ziplora_lib.{part}" for part in parts]
    assert inside(imports(name), *strangers, *faces) == set()
    if name.startswith("lora."):
        assert inside(imports(name), "ziplora_lib.merge") == set()


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if name.startswith("hosts.") or name in ("job", "drawing", "comparison", "calibration")],
)
def test_jobs_and_hosts_know_no_face(name):
    faces = [f"ziplora_lib.{part}" for part in ("tab", "api", "__main__", "evaluation", "commands", "server")]
    assert inside(imports(name), "gradio", *faces) == set()


@pytest.mark.parametrize(
    "name",
    ["job", "drawing", "comparison", "calibration", *(name for name in MODULES if name.startswith("evaluation."))],
)
def test_a_job_and_its_evaluation_know_no_particular_host(name):
    assert (
        inside(imports(name), "ziplora_lib.hosts.webui", "ziplora_lib.hosts.diffusers", "diffusers", "modules") == set()
    )


def test_the_core_loads_with_torch_safetensors_and_pydantic_alone():
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"diffusers", "transformers", "peft", "gradio", "fastapi", "modules", "PIL", "lycoris"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import importlib
for name in {CORE!r}:
    importlib.import_module("ziplora_lib." + name.removesuffix(".__init__"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_is_loaded_later_is_there_when_it_is_used():
    names = {
        node.args[0].value
        for name in MODULES
        for node in ast.walk(ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "later"
    }
    assert names
    assert {name.removeprefix("ziplora_lib.") for name in names} <= set(MODULES)


def test_the_tab_is_loaded_without_what_only_work_needs():
    pytest.importorskip("gradio")
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from ziplora_lib import api, tab
work = ("job", "calibration", "comparison", "drawing", "many", "why")
print(*(name for name in work if f"ziplora_lib.{{name}}" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
