"""Requests that nobody means well with, for a server that runs: names, bodies, routes, and forged events of the page."""

import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SECRET = "the canary sings at 7f3c"
PREFIX = "/ziplora/v1"
BODIES = ("preflight", "merge", "bake", "split")
JSON = {"Content-Type": "application/json"}

# no LoRA is called so; as the name of a new one some are refused, the others are plain files of that name
NAMES = [
    "../canary", "../../canary", "../../../../../../etc/passwd", "..\\..\\canary", "..\\..\\windows\\win.ini",
    "....//canary", "..;/canary", "./canary", "canary/../canary", "/etc/passwd", "/etc/passwd\x00.safetensors",
    "//etc/passwd", "/proc/self/environ", "/proc/self/fd/0", "/dev/zero", "/dev/stdin", "/dev/null", "~/canary", "~root",
    "$HOME/canary", "%2e%2e%2fcanary", "%2e%2e/canary", "..%2fcanary", "%252e%252e%252fcanary", "..%c0%afcanary",
    "%00", "canary%00", "canary\x00", "\x00", "file:///etc/passwd", "http://127.0.0.1/canary", "//127.0.0.1/canary",
    "\\\\127.0.0.1\\share\\canary", "\\\\?\\C:\\canary", "\\\\.\\PhysicalDrive0", "C:\\Windows\\win.ini", "C:canary",
    "C:/canary", "canary.safetensors::$DATA", "CANARY~1", "con", "NUL", "aux.safetensors", "com1", "lpt9.txt", "PRN ",
    "none", "", " ", "\t", "\n", ".", "..", "...", ".hidden", "a.", "a ", " a", "a\nb", "a\r\nSet-Cookie: a=b", "a\x1b[2J",
    "\uff0e\uff0e\uff0fcanary", "\u2024\u2024/canary", "..\u2215canary", "..\u29f8canary", "\u202esrosnetefas.yranac",
    "ca\u200bnary", "e\u0301" * 20, "\U0001f600" * 50, "\ufeffcanary", "\ud800", "a\udfff", "x" * 201, "x" * 5000,
    "x" * 100_000, "../" * 5000 + "canary", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "<lora:a:1>",
    "javascript:alert(1)", "'\"><svg/onload=alert(1)>", "{subject}", "{subject.__class__}", "{0:>99999999}", "%s%n%x",
    "${jndi:ldap://127.0.0.1/a}", "$(id)", "`id`", "; id", "| id", "-rf", "--help", "' OR 1=1 --", "a,b", "a:b", "a*b",
]  # fmt: skip

NUMBERS = [
    "steps", "lr", "lam", "start", "loss_guidance", "ridge", "seed", "resolution", "dense_rank", "max_rank", "keep_energy",
    "keep_norm", "pictures", "samples", "empty_share", "sampler_steps", "guidance", "batch", "at_once", "balance_points",
    "preview_size",
]  # fmt: skip
OTHERS = [
    "parents", "output", "method", "objective", "dtype", "text_encoders", "equal_norms", "layer_names", "overwrite",
    "allow_same", "memory", "preview_prompt",
]  # fmt: skip


@dataclass
class Hostile:
    """A request, and the answers that are right for it."""

    method: str
    path: str
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    right: tuple = (422,)

    @property
    def title(self) -> str:
        return f"{self.method} {self.path[:80]} {self.body[:120]!r} {self.headers}"


def recipe(subject: str, style: str, **fields) -> dict:
    """One that could begin."""
    parents = [
        {"lora": subject, "role": "subject", "prompt": "a photo of sks fox"},
        {"lora": style, "role": "style", "prompt": "an engraving"},
    ]
    return {"parents": parents, "output": "never", "steps": 1, "resolution": 64, **fields}


def requests(subject: str, style: str, canary: Path) -> list[Hostile]:
    """All of them. subject, style: LoRAs that are there; canary: a LoRA outside of the folder, with a picture and a text."""
    here, found = recipe(subject, style), []

    def post(route: str, body, **given) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        found.append(Hostile("POST", f"{PREFIX}/{route}", data, **{"headers": JSON, **given}))

    names = [*NAMES, str(canary), str(canary.with_suffix("")), str(canary.with_suffix(".txt")), os.path.relpath(canary)]
    for name in names:
        post("preflight", recipe(name, style))
        post("merge", recipe(subject, name))
        post("bake", {"lora": name, "output": "never", "balance": 0})
        post("split", {"lora": name, "outputs": ["never-1", "never-2"]})
        # names of what would be made: looked at before there is a prompt to merge by, or a half to write
        bare = [{"lora": subject, "role": "subject"}, {"lora": style, "role": "style"}]
        post("merge", {**here, "output": name, "parents": bare})
        post("split", {"lora": subject, "outputs": [name, "never"]})
        referring = [{**here["parents"][0], "reference": [name]}, here["parents"][1]]
        post("preflight", {**here, "parents": referring})
        if name and "\ud800" not in name and "\udfff" not in name and len(name) < 6000:
            for method, end in (("GET", ""), ("POST", "/stop")):
                found.append(Hostile(method, f"{PREFIX}/jobs/{quote(name, safe='')}{end}", right=(404,)))
    for name in NUMBERS:
        for wrong in ({"a": 1}, [[1]], 10**399, -(10**399)):
            post("preflight", {**here, name: wrong})
        for wrong in (b"NaN", b"-Infinity", b"1e999", b"9" * 5000):
            post("merge", json.dumps({**here, name: 0.125}).encode().replace(b"0.125", wrong))
    for name in OTHERS:
        for wrong in ({"a": 1}, [[1]], 10**5000 if name != "preview_prompt" else None):
            if wrong is not None and not isinstance(wrong, int):
                post("merge", {**here, name: wrong})
    for wrong in (
        ["a", "b"],
        [{}, {}],
        [None, None],
        "dog",
        here["parents"] * 5,
        [here["parents"]],
        {"0": here["parents"]},
    ):
        post("merge", {**here, "parents": wrong})
    for name in ("lora", "role", "prompt", "strength", "reference", "file", "__class__", "../x"):
        post("merge", {**here, "parents": [{**here["parents"][0], name: {"a": 1}}, here["parents"][1]]})
    for name in (
        "__proto__",
        "constructor",
        "__class__",
        "host",
        "file",
        "path",
        "users",
        "\ud800",
        "a\nb",
        "x" * 100_000,
    ):
        post("merge", {**here, name: 1})
    for extreme in ({"steps": 1001}, {"steps": 0}, {"samples": 10**6}, {"pictures": 33}, {"batch": 17},
                    {"sampler_steps": 101}, {"resolution": 4096}, {"resolution": 65}, {"seed": -1}, {"seed": 2**31},
                    {"preview_prompt": "x" * 2001}, {"output": "x" * 10_000}, {"balance_points": 99},
                    {"steps": 1000, "batch": 16, "resolution": 2048, "samples": 1024}):  # fmt: skip
        post("merge", {**here, **extreme})
    deep = 100_000
    whole = json.dumps(here)
    twice = whole.replace('"steps": 1', '"steps": 1, "steps": 2').encode()
    for route in BODIES:
        for body in (
            b"", b" ", b"null", b"true", b"3", b'"x"', b"[]", b"{}", b"{", b"}", b"[[", b"nul", b"'x'", b"{'a': 1}",
            b"{\"a\": 1,}", b"{} {}", b"/* */{}", b"\xff\xfe{\x00}\x00", "{}".encode("utf-16"), b"\xef\xbb\xbf{}", b"\x00",
            b"\xc3\x28", b'{"output": "\xed\xa0\x80"}', b'{"lora": "\\ud800", "output": "x", "balance": 0}', b"NaN",
            b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep, b"9" * deep,
            b'{"lora": "a", "lora": "b", "output": "x", "balance": 0}', twice,
            whole.replace('"steps": 1', '"steps": NaN').encode(), b"a=b&c=d", b"<xml/>", b"\x80\x04K\x01.", b"x" * 900_000,
        ):  # fmt: skip
            post(route, body)
        for size in (1_000_001, 3_000_000):
            post(route, b'{"a": "' + b"x" * size + b'"}', right=(413,))
        for kind in (None, "", "text/plain", "text/plain; application/json", "application/x-www-form-urlencoded",
                     "multipart/form-data; boundary=x", "text/json", "application/xml", "application/jsonp", "*/*",
                     "application/octet-stream"):  # fmt: skip
            # all that a page of another site can send without asking first; a recipe that would begin
            post(route, here, headers={} if kind is None else {"Content-Type": kind}, right=(415,))
    for route, known in (("loras", "GET"), ("schema", "GET"), ("jobs", "GET"), *((route, "POST") for route in BODIES)):
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {known}:
            found.append(Hostile(method, f"{PREFIX}/{route}", json.dumps(here).encode(), JSON, (405,)))
    for path in ("", "/x", "/jobs/a/b", "/jobs/a/stop/b", "//jobs", "/loras/../../../etc/passwd", "/..%2f..%2fetc%2fpasswd",
                 "/%2e%2e/%2e%2e/etc/passwd", "/jobs/..%2f..%2fx", "/jobs/%2e%2e/x", "/loras%00", "/loras;x", "/LORAS",
                 "/merge%2fx", "/files/canary", "/admin"):  # fmt: skip
        found.append(Hostile("GET", f"{PREFIX}{path}", right=(404, 405)))
    for raw in ("%ff%fe", "%c0%ae%c0%ae", "%00", "%0d%0aX: y", "0x41", "-1", "1e9", "null", "x" * 8000, "%u002e"):
        found.append(Hostile("GET", f"{PREFIX}/jobs/{raw.replace(' ', '%20')}", right=(404,)))
    return found


# --- a server, and what lies around it ----------------------------------------------------------------------------


def ask(url: str, one: Hostile) -> tuple[int, bytes, dict]:
    """One request, as it is written: no client tidies up its path. -> (status, body, headers)"""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.putrequest(one.method, one.path, skip_accept_encoding=True)
        for name, value in one.headers.items():
            connection.putheader(name, value)
        if one.method != "GET" or one.body:
            connection.putheader("Content-Length", str(len(one.body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it answers before all was sent
            connection.send(one.body)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def wrong_about(one: Hostile, status: int, body: bytes) -> str:
    """What is wrong about the answer to a request, "" for nothing."""
    text = body.decode("utf-8", "replace")
    if status not in one.right:
        return f"{status}, not {one.right}: {one.title}: {text[:300]}"
    if SECRET in text or "Traceback" in text or 'File "' in text:
        return f"tells too much: {one.title}: {text[:300]}"
    told = json.loads(text)
    said = told.get("error", told.get("detail"))
    if status == 422 and (not isinstance(said, str) or "\n" in said or not 5 < len(said) < 1100):
        return f"is not one plain line: {one.title}: {text[:300]}"
    return ""


def tree(*folders: Path) -> dict[str, str]:
    """Every file below these folders, with what is in it."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def with_canaries(folder: Path, lora: Path) -> Path:
    """A LoRA that could be read, a picture and a text: outside of the folder, in the one that is returned with a LoRA."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    data = lora.read_bytes()
    (folder / "canary.safetensors").write_bytes(data)
    (folder / "canary.txt").write_text(SECRET)
    (folder / "canary.json").write_text(
        json.dumps({"activation text": SECRET, **recipe("a", "b", preview_prompt=SECRET)})
    )
    Image.new("RGB", (64, 64), "yellow").save(folder / "canary.png")
    return folder / "canary.safetensors"


@contextlib.contextmanager
def served(folder: Path, temporary: Path, *flags: str):
    """`python -m ziplora_lib tab` on the miniature, started elsewhere -> (its address, its log)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = temporary / "started-in"
    start.mkdir(parents=True)
    (start / "canary.txt").write_text(SECRET)
    log = temporary / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment["GRADIO_TEMP_DIR"] = str(temporary / "gradio")
    command = [sys.executable, "-m", "ziplora_lib", "tab", "--folder", str(folder), "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=start, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        began = time.monotonic()
        while "the ZipLoRA tab is at" not in (said := log.read_text("utf-8", "replace")):
            assert process.poll() is None, said
            assert time.monotonic() - began < 180, said
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(30)


# --- the page's events --------------------------------------------------------------------------------------------


def forged(config: dict, paths: list[str]) -> list[Hostile]:
    """Every event of the tab, with files, names and texts that no page sent. config: gradio's, of the page."""
    parts = {part["id"]: part for part in config["components"]}
    ours = {id_ for id_, part in parts.items() if str(part["props"].get("elem_id", "")).startswith("ziplora")}
    found = []
    for number, event in enumerate(config["dependencies"]):
        if not event["backend_fn"] or not {*event["targets"], *event["inputs"], *event["outputs"]} & ours:
            continue
        for path in paths:
            data = [_forged(parts[part], path) for part in event["inputs"]]
            told = {
                "fn_index": number,
                "data": data,
                "session_hash": "forged",
                "event_data": {"index": 0, "value": path},
            }
            body = json.dumps(told).encode()
            found.append(Hostile("POST", "/run/predict", body, JSON, (200, 422, 500)))
    return found


def _forged(part: dict, path: str):
    kind = part["type"]
    if kind in ("file", "upload", "gallery", "image"):
        one = {"name": path, "orig_name": path, "data": None, "is_file": True, "size": 1}
        return one if kind == "image" or part["props"].get("file_count") == "single" else [one]
    if kind == "dropdown" and part["props"].get("multiselect"):
        return [path]
    if kind == "slider":
        return part["props"]["value"]
    if kind in ("number", "checkbox"):
        return part["props"].get("value")
    return None if kind == "state" else path
