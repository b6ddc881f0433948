"""How much later the WebUI starts with the extension in it, by the WebUI's own clock.

Starts the WebUI of $WEBUI_DIR (else ~/stable-diffusion-webui, with its venv inside) in turn without and with the extension,
as somebody has it: in its extensions folder, from the second start on with Python's compiled files. No model is loaded.

python -m benchmarks.startup [STARTS]        writes benchmarks/results/startup.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "startup.json"
WEBUI = Path(os.environ.get("WEBUI_DIR") or "~/stable-diffusion-webui").expanduser()
PARTS = ("install.py", "scripts", "ziplora_lib", "javascript", "style.css", "pyproject.toml")
FLAGS = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--use-cpu", "all", "--no-half", "--ui-debug-mode"]
PORT = 7993
# steps of the WebUI before any extension is loaded: what differs in them is noise
BEFORE = (
    "launcher",
    "prepare environment",
    "import torch",
    "import gradio",
    "setup paths",
    "initialize shared",
    "other imports",
)


def started(data: Path, with_extension: bool) -> dict:
    """One start: the WebUI's own record of it, {"total": seconds, "records": {step: seconds}}."""
    extension, away = data / "extensions/ziplora", data / "away"
    if away.exists() and with_extension:
        away.rename(extension)
    elif extension.exists() and not with_extension:
        extension.rename(away)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COMMANDLINE_ARGS"))}
    environment = keep | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    command = [str(WEBUI / "venv/bin/python"), "launch.py", *FLAGS, "--data-dir", str(data), "--port", str(PORT)]
    log = (data / "webui.log").open("ab")
    process = subprocess.Popen(
        command, cwd=WEBUI, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return record(process)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record(process: subprocess.Popen) -> dict:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        time.sleep(0.5)
        try:
            with opener.open(f"http://127.0.0.1:{PORT}/internal/profile-startup", timeout=5) as answer:
                if told := json.load(answer):
                    return told
        except OSError:
            continue
    raise SystemExit("the WebUI ended before it had started")


def main() -> None:
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            (data / "extensions/ziplora").mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, data / "extensions/ziplora" / part)
        started(data, True)  # compiles
        runs: dict[bool, list[dict]] = {False: [], True: []}
        for _ in range(starts):
            for with_extension in runs:
                runs[with_extension].append(started(data, with_extension))
                print("with" if with_extension else "without", runs[with_extension][-1]["total"], flush=True)
    told = {name: summary(runs[value]) for name, value in (("without", False), ("with", True))}
    differences = {
        step: round(seconds - told["without"]["steps"].get(step, 0), 3)
        for step, seconds in told["with"]["steps"].items()
    }
    result = {
        "machine": machine(),
        "starts of each": starts,
        "seconds until started": {
            name: {k: v for k, v in one.items() if k not in ("steps", "after")} for name, one in told.items()
        },
        "later by": round(told["with"]["after"] - told["without"]["after"], 3),
        "later by, whole start": round(told["with"]["median"] - told["without"]["median"], 3),
        "by step, medians": {step: d for step, d in differences.items() if abs(d) >= 0.01},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def summary(runs: list[dict]) -> dict:
    totals = [run["total"] for run in runs]
    steps = {step for run in runs for step in run["records"]}
    medians = {step: statistics.median(run["records"].get(step, 0) for run in runs) for step in sorted(steps)}
    return {
        "median": round(statistics.median(totals), 3),
        "least": round(min(totals), 3),
        "most": round(max(totals), 3),
        # from the first script on
        "after": statistics.median(run["total"] - sum(run["records"].get(s, 0) for s in BEFORE) for run in runs),
        "steps": medians,
    }


if __name__ == "__main__":
    main()
