"""The tab without a WebUI: the same blocks, script and style on a page of their own, and the API beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import Body, FastAPI
from fastapi.responses import Response

from ziplora_lib import api, tab
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.host import share
from ziplora_lib.jobs import Job
from ziplora_lib.tab.running import JS

ROOT = Path(__file__).resolve().parents[1]
# loads the page's script, whose functions the tab's events name
_LOAD = "() => { const s = document.createElement('script'); s.src = 'ziplora.js'; document.head.append(s); }"


def serve(host: DiffusersHost, port: int | None = None, address: str = "127.0.0.1") -> None:
    """Serves the tab for a headless host until it is interrupted. Raises OSError for a port that is taken."""
    jobs: dict[str, Job] = {}
    style = (ROOT / "style.css").read_text("utf-8") + "footer { display: none !important; }"
    with gr.Blocks(title="ZipLoRA", css=style, analytics_enabled=False) as page:
        tab.build(host, jobs)
        page.load(None, None, None, **{JS: _LOAD})
    page.queue(concurrency_count=16)
    app, url, _ = page.launch(
        server_name=address,
        server_port=port,
        prevent_thread_lock=True,
        show_api=False,
        quiet=True,
        allowed_paths=[str(host.folder.resolve())],
    )
    add_page_routes(app, host, jobs)
    api.add_routes(app, host, jobs, None)
    print(f"the ZipLoRA tab is at {url}", flush=True)
    page.block_thread()


def add_page_routes(app: FastAPI, host: DiffusersHost, jobs: dict[str, Job]) -> None:
    """The page's script, and the WebUI's own route for progress bars, as far as the tab's jobs go."""

    @app.get("/ziplora.js")
    def script() -> Response:
        parts = (ROOT / "ziplora_lib/headless.js", ROOT / "javascript/ziplora.js")
        return Response("\n".join(part.read_text("utf-8") for part in parts), media_type="text/javascript")

    @app.post("/internal/progress")
    def progress(asked: dict[str, Any] = Body(...)) -> dict:  # noqa: B008
        job = next((job for job in jobs.values() if job.task == asked.get("id_task")), None)
        if job is None or job.ended:
            return {"active": False, "queued": False, "completed": job is not None}
        told = {"active": job.state == "running", "queued": job.state == "queued", "completed": False}
        if info := job.progress:
            text = f"{info.get('what') or info['phase']}: step {info.get('step', 0)}/{info.get('steps', 1)}"
            told |= {"progress": share(info), "eta": job.eta(), "textinfo": text}
        number, picture = host.live_preview()
        if picture is not None and number != asked.get("id_live_preview"):
            data = io.BytesIO()
            picture.save(data, "JPEG")
            encoded = base64.b64encode(data.getvalue()).decode()
            told |= {"live_preview": f"data:image/jpeg;base64,{encoded}", "id_live_preview": number}
        return told
