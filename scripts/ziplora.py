"""The one file that the WebUI runs: registers the tab, its settings and the API, nothing else."""

import gradio as gr
from modules import errors, script_callbacks, shared

from ziplora_lib import api, tab
from ziplora_lib.hosts.webui import WebuiHost
from ziplora_lib.jobs import Job
from ziplora_lib.options import OPTIONS

HOST = WebuiHost()
JOBS: dict[str, Job] = {}


class Tab:
    """What the WebUI renders as a tab: made right in its page.

    Blocks of our own would be copied into the page, and have a server app made for them before: a third of what the tab
    adds to the WebUI's start.
    """

    # what ui-config.json would keep as each control's default; ours are in the settings page
    children = ()

    def render(self):
        try:
            tab.build(HOST, JOBS)
        except Exception:  # the WebUI starts without us
            errors.report("ZipLoRA could not make its tab", exc_info=True)


def add_tab():
    return [(Tab(), "ZipLoRA", "ziplora")]


def add_settings():
    for name, option in OPTIONS.items():
        component, details = None, {}
        if option.choices:
            component, details = gr.Radio, {"choices": list(option.choices)}
        elif option.bounds:
            component, details = gr.Slider, dict(zip(("minimum", "maximum", "step"), option.bounds))
        info = shared.OptionInfo(option.default, option.label, component, details, section=("ziplora", "ZipLoRA"))
        info = info.info(option.hint)
        shared.opts.add_option(f"ziplora_{name}", info.needs_reload_ui() if option.at_start else info)


def add_api(_demo, app):
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        api.add_routes(app, HOST, JOBS, api.credentials(shared.cmd_opts.api_auth))


def on(event, callback):
    """Registers a callback. Left to find out who calls, the WebUI looks through the whole stack, 30 ms each time."""
    try:
        callbacks = script_callbacks.callback_map[f"callbacks_{event}"]
        script_callbacks.add_callback(callbacks, callback, category=event, filename=__file__)
    except (AttributeError, KeyError, TypeError):  # another version
        getattr(script_callbacks, f"on_{event}")(callback)


on("ui_tabs", add_tab)
on("ui_settings", add_settings)
on("app_started", add_api)
