"""Who gets into a WebUI with the extension, with what, and how far; and that nobody's text becomes a part of its page."""

import json
import shutil
import sys
import time
from pathlib import Path

import conftest
import pytest
import requests
from conftest import opened
from kohya_files import write_lora
from pages import Tab
from test_tab_zip import tiny

from ziplora_lib.hosts.miniature import build_miniature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hostile

ROUTES = [
    ("GET", "loras"), ("GET", "schema"), ("GET", "jobs"), ("GET", "jobs/x"), ("POST", "jobs/x/stop"), ("POST", "preflight"),
    ("POST", "merge"), ("POST", "bake"), ("POST", "split"),
]  # fmt: skip
OPEN = ["--listen"]
API, PAGE = ["--api-auth", "user:pass,other:word"], ["--gradio-auth", "visitor:door"]


@pytest.fixture(scope="module")
def lora_files(tmp_path_factory):
    """Two LoRAs for the miniature."""
    folder, pipe = tmp_path_factory.mktemp("access"), build_miniature()
    write_lora(folder / "access-subject.safetensors", pipe, seed=21, rank=2, alpha=2.0, only="attn")
    write_lora(folder / "access-style.safetensors", pipe, seed=22, rank=2, alpha=2.0, only="attn")
    return folder


def fill(webui, lora_files):
    for file in lora_files.iterdir():
        shutil.copy(file, webui.lora_dir)
    webui.run("import sys\nsys.modules['networks'].list_available_networks()")


RECIPE = hostile.recipe("access-subject", "access-style", resolution=256)


# --- credentials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [OPEN, OPEN + API, OPEN + PAGE, OPEN + API + PAGE], ids=["neither", "api-auth", "gradio-auth", "both"]
)
def test_the_same_credentials_as_the_webuis_own(start_webui, lora_files, flags):
    api_guarded, page_guarded = "--api-auth" in flags, "--gradio-auth" in flags
    with start_webui(flags=flags) as webui:
        fill(webui, lora_files)
        own = ("GET", "/sdapi/v1/options")
        ours = [(method, f"/ziplora/v1/{route}") for method, route in ROUTES]
        for auth in (None, ("user", "wrong"), ("nobody", "pass"), ("user", "word"), ("", ""), ("visitor", "door")):
            for method, path in (own, *ours):
                answer = webui.request(method, path, auth=auth, json={} if method == "POST" else None)
                assert (answer.status_code == 401) == api_guarded, (path, auth, answer.status_code)
        for auth in (("user", "pass"), ("other", "word")):
            for method, path in (own, *ours):
                answer = webui.request(method, path, auth=auth, json={} if method == "POST" else None)
                assert answer.status_code in (200, 404, 422), (path, auth)
        if api_guarded:  # before it is read
            large = b'{"a": "' + b"x" * 2_000_000 + b'"}'
            assert webui.request("POST", "/ziplora/v1/merge", auth=None, data=large).status_code == 401
        the_page_is_gradios(webui, page_guarded)
        what_anybody_may_not(webui, api_open=not api_guarded, page_open=not page_guarded)


def the_page_is_gradios(webui, guarded: bool):
    """The tab's events are reached by whoever is logged in."""
    visitor = requests.Session()
    event = {"fn_index": 0, "data": [], "session_hash": "x"}
    routes = [
        ("GET", "/config", None),
        ("POST", "/run/predict", event),
        ("POST", "/api/predict", event),
        ("GET", "/info", None),
    ]
    routes += [("GET", f"/file={webui.data_dir}/config.json", None), ("POST", "/upload", None)]
    for method, path, body in routes:
        for cookies in ({}, {"access-token": "x"}, {"access-token-unsecure": "x"}):
            answer = visitor.request(method, webui.url + path, json=body, cookies=cookies, timeout=60)
            assert (answer.status_code == 401) == guarded, (path, answer.status_code)
    # nor over the queue, which takes any token, and then asks with it
    assert over_the_queue(webui, {}) is (not guarded)
    assert over_the_queue(webui, {"Cookie": "access-token=x"}) is (not guarded)
    if guarded:
        assert (
            visitor.post(f"{webui.url}/login", data={"username": "visitor", "password": "x"}, timeout=60).status_code
            == 400
        )
        answer = visitor.post(f"{webui.url}/login", data={"username": "visitor", "password": "door"}, timeout=60)
        assert answer.status_code == 200
        assert visitor.get(f"{webui.url}/config", timeout=60).status_code == 200
        webui.session.cookies.update(visitor.cookies)
        assert over_the_queue(webui, {"Cookie": f"access-token={visitor.cookies['access-token-unsecure']}"})


def over_the_queue(webui, headers) -> bool:
    """Whether the tab's list of LoRAs comes over gradio's websocket."""
    from websockets.exceptions import ConnectionClosed, InvalidHandshake
    from websockets.sync.client import connect

    number = webui.run(FIND, part="ziplora_many_refresh")
    try:
        with connect(f"{webui.url.replace('http', 'ws')}/queue/join", additional_headers=headers) as socket:
            while True:
                told = json.loads(socket.recv(60))
                if told["msg"] == "send_hash":
                    socket.send(json.dumps({"session_hash": "s", "fn_index": number}))
                elif told["msg"] == "send_data":
                    socket.send(json.dumps({"session_hash": "s", "fn_index": number, "data": []}))
                elif told["msg"] == "process_completed":
                    return told["success"] and "access-subject" in json.dumps(told)
    except (ConnectionClosed, InvalidHandshake):
        return False


FIND = """
from modules import shared
config = shared.demo.config
ids = [c["id"] for c in config["components"] if c["props"].get("elem_id") == data["part"]]
result = next(i for i, d in enumerate(config["dependencies"]) if ids[0] in d["targets"])
"""


# --- what nobody may who comes without a password ---------------------------------------------------------------------


def what_anybody_may_not(webui, api_open: bool, page_open: bool):
    body = {**RECIPE, "overwrite": True}
    answer = webui.post("/ziplora/v1/preflight", json=body)
    assert answer.status_code == (422 if api_open else 200), answer.text
    assert ("overwriting is off" in answer.text) is api_open
    assert webui.post("/ziplora/v1/preflight", json=RECIPE).status_code == 200
    said = zip_pressed(webui, overwrite=True, output="access-new", prompts="")
    assert ("overwriting is off" in said) is page_open, said
    assert "has no prompt" in said or page_open
    boxes = {part["props"].get("elem_id"): part["props"] for part in webui.get("/config").json()["components"]}
    assert boxes["ziplora_overwrite"].get("interactive") is (False if page_open else None)
    assert ("overwrite" in str(boxes["ziplora_many_existing"]["choices"])) is not page_open
    assert boxes["setting_ziplora_folder"]["visible"] is not (api_open or page_open)
    webui.post("/sdapi/v1/options", json={"ziplora_folder": "elsewhere"})
    kept = webui.run("from modules import shared\nresult = shared.opts.data['ziplora_folder']")
    assert kept == ("" if api_open or page_open else "elsewhere")


def zip_pressed(webui, prompts: str, **fields) -> str:
    """What is said when the button Zip is pressed with these settings, by a request that no page sent."""
    config = webui.get("/config").json()
    parts = {part["id"]: part["props"] for part in config["components"]}
    number = webui.run(FIND, part="ziplora_zip")
    given = {
        "lora_1": "access-subject",
        "lora_2": "access-style",
        "prompt_1": prompts,
        "prompt_2": prompts,
        "resolution": 256,
    }
    given |= {"strength_1": 1, "strength_2": 1, **fields}
    data = []
    for part in config["dependencies"][number]["inputs"]:
        name = str(parts[part].get("elem_id")).removeprefix("ziplora_")
        data.append(given.get(name, parts[part].get("value")))
    answer = webui.post("/run/predict", json={"fn_index": number, "data": data, "session_hash": "s"})
    assert answer.status_code == 200, answer.text
    return " ".join(value for value in answer.json()["data"] if isinstance(value, str))


def test_at_home_all_is_on(webui, lora_files):
    fill(webui, lora_files)
    try:
        what_anybody_may_not(webui, api_open=False, page_open=False)
    finally:
        webui.post("/sdapi/v1/options", json={"ziplora_folder": ""})


def test_without_api_there_are_no_routes(start_webui, monkeypatch):
    monkeypatch.setitem(start_webui.__globals__, "FLAGS", [flag for flag in conftest.FLAGS if flag != "--api"])
    with start_webui() as webui:
        for method, route in ROUTES:
            for path in (f"/ziplora/v1/{route}", "/sdapi/v1/options"):
                answer = webui.request(method, path, json={} if method == "POST" else None)
                assert answer.status_code in (404, 405), (path, answer.status_code)


def test_the_api_alone_asks_for_the_same(start_webui, monkeypatch):
    def answers(webui, base):
        end = time.monotonic() + conftest.START_TIMEOUT
        while time.monotonic() < end:
            try:
                webui.get("/sdapi/v1/options", timeout=5)
                return
            except requests.RequestException:
                assert webui.process.poll() is None, webui.log[-3000:]
                time.sleep(0.5)

    flags = [flag for flag in conftest.FLAGS if flag != "--api"]
    monkeypatch.setitem(start_webui.__globals__, "FLAGS", flags)
    monkeypatch.setitem(start_webui.__globals__, "_wait", answers)
    with start_webui(flags=["--nowebui", *API]) as webui:
        for method, route in ROUTES:
            for path in (f"/ziplora/v1/{route}", "/sdapi/v1/txt2img"):
                body = {} if method == "POST" else None
                assert webui.request(method, path, auth=None, json=body).status_code in (401, 405), path
                if "ziplora" in path:
                    assert webui.request(method, path, json=body).status_code in (200, 404, 422), path


# --- hostile requests --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canary(tmp_path_factory, lora_files):
    return hostile.with_canaries(tmp_path_factory.mktemp("outside"), lora_files / "access-subject.safetensors")


def test_every_hostile_request_is_refused_and_nothing_is_touched(webui, lora_files, canary, capsys):
    fill(webui, lora_files)
    asked = hostile.requests("access-subject", "access-style", canary)
    jobs, began = webui.get("/ziplora/v1/jobs").json(), len(webui.log)
    before = hostile.tree(webui.lora_dir, canary.parent)
    wrong = [said for one in asked if (said := hostile.wrong_about(one, *hostile.ask(webui.url, one)[:2]))]
    assert wrong == [], f"{len(wrong)} of {len(asked)}:\n" + "\n".join(wrong[:40])
    assert hostile.tree(webui.lora_dir, canary.parent) == before
    assert webui.get("/ziplora/v1/jobs").json() == jobs
    assert "access-style" in webui.get("/ziplora/v1/loras").json()
    assert "Traceback" not in webui.log[began:]
    with capsys.disabled():
        print(f"\n{len(asked)} hostile requests to the API in a WebUI: all refused")


def test_forged_events_of_the_tab_read_and_write_nothing_else(webui, lora_files, canary, capsys):
    fill(webui, lora_files)
    jobs = webui.get("/ziplora/v1/jobs").json()
    paths = [canary, canary.with_suffix(".txt"), canary.with_suffix(".png"), canary.with_suffix(".json"), "/etc/passwd"]
    asked = hostile.forged(webui.get("/config").json(), [*map(str, paths), "../../canary", "\x00"])
    before = hostile.tree(webui.lora_dir, canary.parent)
    for one in asked:
        status, body, _ = hostile.ask(webui.url, one)
        assert status in one.right, one.title
        text = body.decode("utf-8", "replace")
        for secret in (hostile.SECRET, "Traceback", "root:x:"):
            assert secret not in text, one.title
    assert hostile.tree(webui.lora_dir, canary.parent) == before
    kept = set(hostile.tree(webui.data_dir / "gradio").values())
    assert kept.isdisjoint(hostile.tree(canary.parent).values())
    assert webui.get("/ziplora/v1/jobs").json() == jobs
    assert len(asked) > 100
    with capsys.disabled():
        print(f"\n{len(asked)} forged events of the tab in a WebUI: nothing read, nothing written")


def test_a_page_of_another_site_begins_nothing(webui, lora_files):
    """What a browser sends for a page without asking the WebUI first; and what it is answered when it asks."""
    fill(webui, lora_files)
    jobs = webui.get("/ziplora/v1/jobs").json()
    evil = {"Origin": "http://evil.example"}
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = webui.post("/ziplora/v1/merge", data=json.dumps(RECIPE), headers={**evil, **kind})
        assert answer.status_code == 415
        assert "access-control-allow-origin" not in {name.lower() for name in answer.headers}
    asking = {**evil, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for path in ("/ziplora/v1/merge", "/sdapi/v1/txt2img"):
        answer = webui.request("OPTIONS", path, headers=asking)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in {name.lower() for name in answer.headers}
    assert webui.get("/ziplora/v1/jobs").json() == jobs


# --- names and texts as markup -----------------------------------------------------------------------------------------

IMG, SVG = "<img src=x onerror=window.hacked=1>", "\"'><svg onload=window.hacked=2>"
# short: the miniature spells words that it does not know, and the WebUI fails where a prompt is long for one encoder alone
WORDS = "<script>hacked=3</script><img src=y onerror=hacked=3>"
FOUND = """() => [window.hacked, ...[...document.querySelectorAll('#ziplora_tab *, #ziplora_dialog *')].filter(e =>
    [...e.attributes].some(a => a.name.startsWith('on') || (/^(href|src)$/.test(a.name) && /^javascript:/i.test(a.value)))
    || e.tagName === 'SCRIPT' || (e.tagName === 'IMG' && /^[xy]$/.test(e.getAttribute('src')))).map(e => e.outerHTML)]"""


@pytest.fixture(scope="module")
def marked(site):
    """A subject and a style whose names, metadata and cards are full of markup."""
    pipe = build_miniature()
    told = {
        "ss_tag_frequency": json.dumps({f"1_{IMG}": {WORDS: 3, SVG: 2}}), "ss_sd_model_name": IMG, "ss_output_name": IMG,
        "modelspec.title": SVG, "modelspec.trigger_phrase": WORDS, "modelspec.description": SVG, "ss_training_comment": IMG,
        "modelspec.author": IMG, "modelspec.prediction_type": SVG, "ss_network_module": IMG,
    }  # fmt: skip
    for i, name in enumerate((IMG, SVG)):
        write_lora(site.folder / f"{name}.safetensors", pipe, seed=31 + i, rank=2, alpha=2.0, only="attn", **told)
        card = dict.fromkeys(("description", "notes", "activation text", "negative text", "sd version"), WORDS)
        (site.folder / f"{name}.json").write_text(json.dumps(card))
    (site.folder / f"{IMG}-broken.safetensors").write_bytes(b"no LoRA")
    yield
    for file in site.folder.iterdir():
        if file.name.startswith((IMG, SVG)):
            file.unlink()


def test_nobodys_text_becomes_a_part_of_the_page(browser, site, marked, tmp_path):
    page = opened(browser, site.url)
    tab = Tab(page)
    looked = []

    def clean(where):
        page.wait_for_timeout(300)
        looked.append(where)
        assert page.evaluate(FOUND) == [None], where

    def browse(card, name):
        tab(f"browse_{card}").click()
        page.wait_for_selector("#ziplora_dialog .ziplora_choice", timeout=30_000)
        tab.settle()
        clean(f"the list for card {card}")
        cards = "[...document.querySelectorAll('#ziplora_dialog .ziplora_choice')]"
        page.evaluate(f"name => {cards}.find(card => card.dataset.lora === name).click()", name)
        tab.settle()
        clean(f"card {card}")

    tab("refresh").click()
    tab.settle()
    browse(1, f"{IMG}-broken")
    browse(1, IMG)
    browse(2, SVG)
    assert "onerror" in tab.text("prompt_1").input_value()
    tab.set(**tiny(site, overwrite=True, preview_prompt="a fox"))
    tab.write("output", IMG)
    tab("check").click()
    assert "onerror" in tab.red()
    clean("a refusal")
    tab.write("output", "marked-out")
    tab.settle()
    assert "onerror" in tab("checked").inner_text()
    clean("the preflight")
    tab.zip()
    assert "Done" in tab.ended()
    clean("the result")
    tab.write("compare_prompt", WORDS)
    tab.number("compare_seeds").fill("1")
    tab.start("compare")
    tab.ended()
    clean("the comparison")
    for section in ("strengths", "why"):
        if section == "strengths":
            tab("to_strengths").click()
            tab.settle()
            tab.start("strengths_draw_balance")
        else:
            tab.section("Why")
            tab.choose("why_lora", "marked-out")
            tab.start("why_look")
        tab.ended()
        clean(section)
    tab.section("Many")
    for role, name in (("subjects", IMG), ("styles", SVG)):
        tab.text(f"many_{role}").fill(name[:12])
        page.locator(f"#ziplora_many_{role} ul li").first.click()
        tab.text(f"many_{role}").blur()
    tab.write("many_names", "{subject}")
    tab.write("many_prompts", WORDS)
    tab.settle()
    assert "onerror" in tab.red()
    clean("Many, a wrong prompt")
    tab.write("many_prompts", f"{IMG}: {WORDS}")
    tab("many_plan").click()
    page.wait_for_function("!document.querySelector('#ziplora_zip').disabled", timeout=60_000)
    tab.settle()
    assert "onerror" in tab("many_table").inner_text()
    clean("Many")
    tab.section("History")
    page.wait_for_selector("#ziplora_history_gallery .caption-label", timeout=30_000)
    clean("History")
    captions = page.locator("#ziplora_history_gallery .caption-label").all_inner_texts()
    at = next(i for i, caption in enumerate(captions) if caption.startswith("marked-out"))
    page.locator("#ziplora_history_gallery :is(.thumbnail-item, .thumbnail-lg)").nth(at).click()
    tab.settle()
    assert "onerror" in tab("history_lines").inner_text()
    clean("a recipe of History")
    recipe = tmp_path / f"{IMG}.json"
    parents = [{"lora": f"{IMG}{role}", "role": role, "prompt": WORDS} for role in ("subject", "style")]
    recipe.write_text(json.dumps({"parents": parents, "output": IMG, IMG: 1, "preview_prompt": WORDS}))
    page.locator("#ziplora_history_drop input[type=file]").set_input_files(str(recipe))
    tab("zip").wait_for(state="visible", timeout=30_000)
    tab.settle()
    tab.section("History")
    assert "onerror" in tab("history_said").inner_text()
    clean("a recipe that was dropped")
    page.reload()
    Tab(page)
    clean("the page once more")
    assert page.problems == []
    assert len(looked) >= 17
    page.context.close()
