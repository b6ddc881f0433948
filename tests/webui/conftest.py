"""A real WebUI, started for these tests with the miniature checkpoint, and a browser in front of it.

    @pytest.mark.parametrize("webui", [["--api-auth", "user:pass"]], indirect=True)   # extra flags
    def test_something(webui): ...

The WebUI is looked for in $WEBUI_DIR, else in ~/stable-diffusion-webui, with its own venv inside. It stays as
it is: models, extensions, settings and pictures live in a temporary --data-dir.
"""

import base64
import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # for sgm_miniature, whatever import mode pytest runs in

START_TIMEOUT = 180
NO_WEBUI = "REAL WEBUI NOT FOUND"
NO_BROWSER = "BROWSER NOT FOUND"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")

FLAGS = [
    "--skip-prepare-environment",
    "--skip-torch-cuda-test",
    "--skip-version-check",
    "--use-cpu",
    "all",
    "--no-half",
    "--no-half-vae",
    "--api",
    "--do-not-download-clip",
    "--no-download-sd-model",
    "--disable-console-progressbars",
]


# --- skipping, loudly -------------------------------------------------------------------------------


def find_webui() -> tuple[Path | None, Path | None, str]:
    """Folder and Python of the WebUI, or why there is none."""
    folder = Path(os.environ.get("WEBUI_DIR") or "~/stable-diffusion-webui").expanduser()
    if not (folder / "launch.py").is_file():
        return None, None, f"no launch.py in {folder}"
    choices = [folder / "venv/bin/python", folder / "venv/Scripts/python.exe"]
    if os.environ.get("WEBUI_PYTHON"):
        choices.insert(0, Path(os.environ["WEBUI_PYTHON"]).expanduser())
    for python in choices:
        if python.is_file():
            return folder, python, ""
    return None, None, f"no venv in {folder}"


WEBUI_DIR, WEBUI_PYTHON, WHY_NOT = find_webui()


def pytest_collection_modifyitems(items):
    if WEBUI_DIR:
        return
    for item in items:
        alone = getattr(item, "callspec", None) and item.callspec.params.get("site") == "headless"
        # this hook is handed every test of the session, not only those beside this file
        if HERE in item.path.parents and not alone:
            item.add_marker(pytest.mark.skip(reason=f"{NO_WEBUI} ({WHY_NOT}); set WEBUI_DIR"))


def pytest_terminal_summary(terminalreporter):
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for label, advice in (
        (NO_WEBUI, "set WEBUI_DIR"),
        (NO_BROWSER, "install chromium and playwright, or set CHROMIUM"),
    ):
        count = sum(label in reason for reason in skipped)
        if count:
            terminalreporter.write_line(f"{label}: {count} tests not run; {advice}", red=True, bold=True)


# --- the WebUI --------------------------------------------------------------------------------------

# Lets a test look at the live process (flags, hooks, weights), which no route of the WebUI would show; and ends the
# WebUI when the pytest that started it is gone, however that ended.
PROBE = """
import os
import threading
import time

from modules import script_callbacks


def follow_parent():
    while os.getppid() == PARENT:
        time.sleep(1)
    os._exit(1)


def add_route(_, app):
    @app.post("/probe/TOKEN")
    def probe(request: dict):
        names = {"data": request["data"], "result": None}
        exec(request["code"], names)
        return names["result"]


threading.Thread(target=follow_parent, daemon=True).start()
script_callbacks.on_app_started(add_route)
"""


@dataclass
class WebUI:
    """A running WebUI; `flags` are those beyond FLAGS."""

    url: str
    data_dir: Path
    log_file: Path
    process: subprocess.Popen
    flags: list[str]
    probe: str
    start_seconds: float = 0.0
    auth: tuple[str, str] | None = None
    session: requests.Session = field(default_factory=requests.Session)

    @property
    def lora_dir(self) -> Path:
        return self.data_dir / "models/Lora"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def request(self, method: str, path: str, timeout: float = 300, **kw) -> requests.Response:
        """One request, with the --api-auth credentials unless `auth` is given (None: without)."""
        kw.setdefault("auth", self.auth)
        return self.session.request(method, self.url + path, timeout=timeout, **kw)

    def get(self, path: str, **kw) -> requests.Response:
        return self.request("GET", path, **kw)

    def post(self, path: str, json=None, **kw) -> requests.Response:
        return self.request("POST", path, json=json, **kw)

    def txt2img(self, prompt: str, seed: int = 1, steps: int = 4, **kw) -> np.ndarray:
        """The picture as (height, width, 3) uint8; `kw` are further fields of /sdapi/v1/txt2img.

        Keep prompts below about 75 letters: the miniature spells words it does not know, and the WebUI fails when
        its two text encoders come to different numbers of 75-token chunks.
        """
        body = {"prompt": prompt, "seed": seed, "steps": steps, "width": 256, "height": 256, **kw}
        answer = self.post("/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 200, f"{answer.text}\n{self.log[-3000:]}"
        picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
        return np.asarray(picture.convert("RGB"))

    def run(self, code: str, **data):
        """Run Python inside the WebUI's process, in a handler's thread; returns what it put in `result` (JSON)."""
        answer = self.post(self.probe, json={"code": code, "data": data})
        assert answer.status_code == 200, f"{answer.text}\n{self.log[-3000:]}"
        return answer.json()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(data_dir: Path) -> dict[str, str]:
    # what belongs to the Python that runs pytest must not reach the WebUI's
    drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COMMANDLINE_ARGS"}
    return {
        **{k: v for k, v in os.environ.items() if k not in drop},
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # eight times faster on a busy small machine
        "PYTHONUNBUFFERED": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(data_dir / "gradio"),
    }


def _prepare(data_dir: Path, checkpoint: Path, options: dict, token: str) -> None:
    (data_dir / "models/Lora").mkdir(parents=True)
    (data_dir / "extensions/probe/scripts").mkdir(parents=True)
    extension = data_dir / "extensions/ziplora"
    extension.mkdir()
    for entry in ROOT.iterdir():
        # links to what a user gets; without .git, where the WebUI logs a traceback if it finds no remote
        if not entry.name.startswith(".") and entry.name != "tests":
            (extension / entry.name).symlink_to(entry)
    probe = data_dir / "extensions/probe/scripts/probe.py"
    text = PROBE.replace("TOKEN", token).replace("PARENT", str(os.getpid()))
    probe.write_text(text, encoding="utf-8")
    # the default preview, "Approx NN", downloads a file for the first picture
    settings = {"show_progress_type": "Approx cheap", "sd_model_checkpoint": checkpoint.name, **options}
    (data_dir / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def _run_installer(data_dir: Path, env: dict[str, str], log) -> None:
    """As the WebUI does at every launch, which --skip-prepare-environment leaves out."""
    installer = data_dir / "extensions/ziplora/install.py"
    if installer.is_file():
        command = [str(WEBUI_PYTHON), str(installer)]
        env = {**env, "PYTHONPATH": str(WEBUI_DIR)}
        subprocess.run(command, cwd=WEBUI_DIR, env=env, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=60)


def _wait(webui: WebUI, base: str) -> None:
    began = time.monotonic()
    while True:
        if webui.process.poll() is not None:
            raise RuntimeError(f"the WebUI ended with {webui.process.returncode}:\n{webui.log[-5000:]}")
        if time.monotonic() - began > START_TIMEOUT:
            raise RuntimeError(f"the WebUI did not answer within {START_TIMEOUT} s:\n{webui.log[-5000:]}")
        # the port answers earlier, but then some extensions' routes are still missing
        if "Startup time:" in webui.log:
            break
        time.sleep(0.3)
    # the checkpoint loads in a thread of its own; asking for the model waits for it
    loaded = webui.run(f"from modules import shared\nresult = getattr(shared.sd_model, 'is_{base}', None)")
    assert loaded is True, f"the miniature did not load as {base}:\n{webui.log[-5000:]}"
    webui.start_seconds = time.monotonic() - began


def _stop(process: subprocess.Popen) -> None:
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it


@contextlib.contextmanager
def running_webui(
    data_dir: Path, checkpoint: Path, flags=(), options=None, base: str = "sdxl", before=lambda data_dir: None
):
    """A WebUI in `data_dir` (made here) with a checkpoint of that base, for as long as the block lasts.

    before(data_dir): what is to be done there first.
    """
    token, port, flags = secrets.token_hex(8), _free_port(), [str(flag) for flag in flags]
    _prepare(data_dir, checkpoint, options or {}, token)
    before(data_dir)
    auth = None
    if "--api-auth" in flags:
        user, _, password = flags[flags.index("--api-auth") + 1].split(",")[0].partition(":")
        auth = (user, password)
    command = [str(WEBUI_PYTHON), "launch.py", *FLAGS, "--data-dir", str(data_dir), "--port", str(port)]
    command += ["--ckpt-dir", str(checkpoint.parent), *flags]
    log_file, env = data_dir / "webui.log", _environment(data_dir)
    with log_file.open("wb") as log:
        _run_installer(data_dir, env, log)
        process = subprocess.Popen(
            command,
            cwd=WEBUI_DIR,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    webui = WebUI(f"http://127.0.0.1:{port}", data_dir, log_file, process, flags, f"/probe/{token}", auth=auth)
    webui.session.trust_env = False  # no proxy between a test and its own machine
    try:
        _wait(webui, base)
        yield webui
    finally:
        webui.session.close()
        _stop(process)


@pytest.fixture(scope="session")
def sgm_checkpoint(tmp_path_factory) -> Path:
    """The miniature as a WebUI checkpoint, made once for all WebUIs of the session."""
    from sgm_miniature import write_sgm_miniature

    return write_sgm_miniature(tmp_path_factory.mktemp("checkpoint"), WEBUI_DIR)


@pytest.fixture(scope="session")
def start_webui(tmp_path_factory, sgm_checkpoint):
    """For tests that need one of their own: `with start_webui(flags=[...], options={...}) as webui:`."""

    def start(flags=(), options=None, before=lambda data_dir: None):
        return running_webui(tmp_path_factory.mktemp("webui"), sgm_checkpoint, flags, options, before=before)

    return start


@pytest.fixture(scope="session")
def ldm_checkpoint(tmp_path_factory, sgm_checkpoint) -> Path:
    """The miniature SD 1.5 as a WebUI checkpoint; in its folder also: as a v-prediction model, an SD 2.x, and the SDXL."""
    from ldm_miniature import write_ldm_miniature, write_sd2_miniature

    folder = tmp_path_factory.mktemp("ldm-checkpoint")
    path = write_ldm_miniature(folder)
    write_sd2_miniature(folder)
    v, v_config = path.with_name("ziplora-miniature-v.safetensors"), path.with_name("ziplora-miniature-v.yaml")
    v.symlink_to(path)
    v_config.write_text(path.with_suffix(".yaml").read_text().replace('"eps"', '"v"'))
    for kind in (".safetensors", ".yaml"):
        (folder / f"{sgm_checkpoint.stem}{kind}").symlink_to(sgm_checkpoint.with_suffix(kind))
    return path


@pytest.fixture(scope="session")
def webui_sd1(tmp_path_factory, ldm_checkpoint):
    """As `webui`, but with SD 1.5 loaded; `ldm_checkpoint` says what else is in its folder."""
    with running_webui(tmp_path_factory.mktemp("webui-sd1"), ldm_checkpoint, base="sd1") as running:
        yield running


@pytest.fixture(scope="session")
def webui(request, start_webui):
    """One WebUI for all tests of the session with the same extra flags (the fixture's parameter)."""
    with start_webui(flags=getattr(request, "param", ())) as running:
        yield running


# --- the browser ------------------------------------------------------------------------------------

BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    executable = shutil.which(CHROMIUM)
    if not executable:
        pytest.skip(f"{NO_BROWSER} (no {CHROMIUM})")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(f"{NO_BROWSER} (playwright is not installed)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()


# --- the tab, in a WebUI and without one ---------------------------------------------------------------


@dataclass
class Site:
    """A page with the tab. side: of the pictures that its miniature is asked for, in pixels."""

    kind: str
    url: str
    folder: Path
    side: int
    webui: WebUI | None = None


@pytest.fixture(scope="session")
def headless(tmp_path_factory) -> Site:
    """`python -m ziplora_lib tab`, on the miniature."""
    pytest.importorskip("gradio")
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("headless")
    log = (folder.parent / "headless.log").open("wb")
    command = [sys.executable, "-m", "ziplora_lib", "tab", "--folder", str(folder), "--port", str(_free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        began = time.monotonic()
        while "the ZipLoRA tab is at" not in (said := Path(log.name).read_text("utf-8", "replace")):
            assert process.poll() is None, said
            assert time.monotonic() - began < START_TIMEOUT, said
            time.sleep(0.2)
        yield Site("headless", said.rpartition("the ZipLoRA tab is at ")[2].split()[0].rstrip("/"), folder, 64)
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture(scope="session", params=["headless", "webui"])
def site(request) -> Site:
    """Both places where the tab is; the WebUI one only where a WebUI is found."""
    if request.param == "headless":
        return request.getfixturevalue("headless")
    webui = request.getfixturevalue("webui")
    return Site("webui", webui.url, webui.lora_dir, 256, webui)


def opened(browser, url: str, **options):
    """A page of a browser context of its own; `page.problems` gathers its JavaScript errors."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options})
    origin = url.partition("/?")[0]
    # fonts and the like from elsewhere: not there on a machine without a network, so never
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith(origin) else route.abort())
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(error.stack or str(error)))
    page.goto(url)
    page.wait_for_selector("#ziplora_zip, #txt2img_prompt textarea", state="attached", timeout=60_000)
    return page


@pytest.fixture
def page(browser, webui):
    """The WebUI's own page, loaded."""
    page = opened(browser, webui.url)
    page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
    yield page
    page.context.close()


@pytest.fixture
def tab(browser, site, loras):
    """The tab in a page of its own, on each site."""
    from pages import Tab

    page = opened(browser, site.url)
    yield Tab(page)
    for job in requests.get(f"{site.url}/ziplora/v1/jobs", timeout=30).json():  # of a test that failed
        requests.post(f"{site.url}/ziplora/v1/jobs/{job['job']}/stop", timeout=30)
    problems = page.problems
    page.context.close()
    assert problems == []


MARKUP = "<img src=x onerror='window.hacked = 1'>"
TRIGGER, TAG = "a photo of sks fox", "an engraving"


@pytest.fixture(scope="session")
def loras(site) -> Path:
    """A subject whose card names its trigger, a style whose training tags do, one that says nothing, and one of SD 1.5."""
    from kohya_files import write_lora

    from ziplora_lib.hosts.miniature import build_miniature, build_miniature_sd1

    pipe, folder = build_miniature(), site.folder
    (folder / "of others").mkdir(exist_ok=True)
    tags = json.dumps({"1_engraving": {TAG: 9, "ink": 2}})
    write_lora(folder / "tab-subject.safetensors", pipe, seed=11, rank=8, alpha=8.0, only="attn")
    write_lora(folder / "tab-style.safetensors", pipe, seed=12, rank=4, alpha=8.0, only="unet", ss_tag_frequency=tags)
    write_lora(folder / "of others/tab-silent.safetensors", pipe, seed=13, rank=2, alpha=2.0, only="attn")
    write_lora(folder / "tab-old.safetensors", build_miniature_sd1(), seed=15, rank=2, alpha=2.0, only="attn")
    evil = json.dumps({"1": {MARKUP: 1}})
    write_lora(folder / "tab-evil.safetensors", pipe, seed=14, rank=2, alpha=2.0, only="attn", ss_tag_frequency=evil)
    (folder / "tab-broken.safetensors").write_bytes(b"not a LoRA")
    (folder / "tab-subject.json").write_text(json.dumps({"activation text": TRIGGER}), encoding="utf-8")
    Image.new("RGB", (64, 64), "orange").save(folder / "tab-subject.png")
    return folder


@pytest.fixture(scope="session")
def screenshots(site) -> Path:
    """Where pages are kept as pictures, to be looked at."""
    folder = ROOT / "tests/screenshots" / site.kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder
