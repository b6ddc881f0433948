"""The tab without a WebUI: the same blocks, script and style on a page of their own, and the API beside it."""

from __future__ import annotations

import base64
import io
import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from ziplora_lib import access, api, tab
from ziplora_lib.errors import BadInput
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
    host.paths = False
    overwriting = not access.is_open(not _is_own(address), None)
    style = (ROOT / "style.css").read_text("utf-8") + "footer { display: none !important; }"
    with gr.Blocks(title="ZipLoRA", css=style, analytics_enabled=False) as page:
        tab.build(host, jobs, overwriting)
        page.load(None, None, None, **{JS: _LOAD})
    page.queue(concurrency_count=16)
    app, url, _ = page.launch(
        server_name=address,
        server_port=port,
        prevent_thread_lock=True,
        show_api=False,
        quiet=True,
    )
    close(app, host.folder)
    add_page_routes(app, host, jobs)
    api.add_routes(app, host, jobs, None, overwriting)
    print(f"the ZipLoRA tab is at {url}", flush=True)
    page.block_thread()


def close(app: FastAPI, folder: Path) -> None:
    """Takes back what gradio opens: the folder that it was started in to the page, and all of it to every other page."""
    app.cwd = str(folder.resolve())  # what it serves files from
    app.user_middleware = [known for known in app.user_middleware if known.cls.__name__ != "CORSMiddleware"]
    app.middleware_stack = None  # made anew with the next request
    app.add_middleware(OwnPage)


class OwnPage:
    """Answers this server's own page, and programs, but no page of another site that the same browser has open."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin")
        if origin is None or urlsplit(origin).netloc == headers.get(b"host"):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await JSONResponse({"error": "a page of another site asks"}, 403)(scope, receive, send)


def _is_own(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def add_page_routes(app: FastAPI, host: DiffusersHost, jobs: dict[str, Job]) -> None:
    """The page's script, and the WebUI's own route for progress bars, as far as the tab's jobs go."""

    @app.get("/ziplora.js")
    def script() -> Response:
        parts = (ROOT / "ziplora_lib/headless.js", ROOT / "javascript/ziplora.js")
        return Response("\n".join(part.read_text("utf-8") for part in parts), media_type="text/javascript")

    def progress(asked: Any) -> dict:
        if not isinstance(asked, dict):
            raise BadInput("the body is no JSON object")
        job = next((job for job in list(jobs.values()) if job.task == asked.get("id_task")), None)
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

    app.add_api_route("/internal/progress", api.answering(progress, reads=True), methods=["POST"])
