"""The one file that the WebUI runs: registers the tab, its settings and the API, nothing else."""

import threading
from pathlib import Path

import gradio as gr
from modules import errors, initialize_util, script_callbacks, shared

from ziplora_lib import access, api, atomic, tab
from ziplora_lib.hosts.webui import WebuiHost
from ziplora_lib.jobs import Job
from ziplora_lib.options import OPTIONS

HOST = WebuiHost()
JOBS: dict[str, Job] = {}

# as for the WebUI's own extensions page: --share, --listen and the like, unless --enable-insecure-extension-access
REACHABLE = shared.cmd_opts.disable_extension_access
OPEN_TAB = access.is_open(REACHABLE, list(initialize_util.get_gradio_auth_creds()))
OPEN_API = access.is_open(REACHABLE, shared.cmd_opts.api_auth)
WITH_API = shared.cmd_opts.api or shared.cmd_opts.nowebui


class Tab:
    """What the WebUI renders as a tab: made right in its page.

    Blocks of our own would be copied into the page, and have a server app made for them before: a third of what the tab
    adds to the WebUI's start.
    """

    # what ui-config.json would keep as each control's default; ours are in the settings page
    children = ()

    def render(self):
        try:
            tab.build(HOST, JOBS, overwriting=not OPEN_TAB)
        except Exception:  # the WebUI starts without us
            errors.report("ZipLoRA could not make its tab", exc_info=True)


def add_tab():
    return [(Tab(), "ZipLoRA", "ziplora")]


def add_settings():
    fixed = shared.cmd_opts.hide_ui_dir_config or OPEN_TAB or (WITH_API and OPEN_API)
    for name, option in OPTIONS.items():
        component, details = None, {}
        if option.choices:
            component, details = gr.Radio, {"choices": list(option.choices)}
        elif option.bounds:
            component, details = gr.Slider, dict(zip(("minimum", "maximum", "step"), option.bounds))
        if name == "folder" and fixed:
            details = {"visible": False}  # by which the WebUI knows settings that are not to be changed from outside
        info = shared.OptionInfo(option.default, option.label, component, details, section=("ziplora", "ZipLoRA"))
        info = info.info(option.hint)
        shared.opts.add_option(f"ziplora_{name}", info.needs_reload_ui() if option.at_start else info)


def started(_demo, app):
    if WITH_API:
        api.add_routes(app, HOST, JOBS, api.credentials(shared.cmd_opts.api_auth), overwriting=not OPEN_API)
    # a run that was killed while it wrote has left half a file, under a name that nobody lists
    folder = Path(shared.cmd_opts.lora_dir)
    threading.Thread(target=atomic.remove_leftovers_below, args=[folder], daemon=True).start()


def on(event, callback):
    """Registers a callback. Left to find out who calls, the WebUI looks through the whole stack, 30 ms each time."""
    try:
        callbacks = script_callbacks.callback_map[f"callbacks_{event}"]
        script_callbacks.add_callback(callbacks, callback, category=event, filename=__file__)
    except (AttributeError, KeyError, TypeError):  # another version
        getattr(script_callbacks, f"on_{event}")(callback)


on("ui_tabs", add_tab)
on("ui_settings", add_settings)
on("app_started", started)
