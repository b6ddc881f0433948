"""The one file that the WebUI runs: registers the tab and the API, nothing else."""

from modules import call_queue, script_callbacks, shared

from ziplora_lib import api, tab
from ziplora_lib.hosts.webui import WebuiHost
from ziplora_lib.job import Job

HOST = WebuiHost()
JOBS: dict[str, Job] = {}


def add_tab():
    return [(tab.build(HOST, JOBS, call_queue.wrap_gradio_gpu_call, HOST.progress), "ZipLoRA", "ziplora")]


def add_api(_demo, app):
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        api.add_routes(app, HOST, JOBS, api.credentials(shared.cmd_opts.api_auth))


script_callbacks.on_ui_tabs(add_tab)
script_callbacks.on_app_started(add_api)
