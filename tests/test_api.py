"""The API's bodies, on the headless host: what is taken, what is refused. The same in a WebUI: tests/webui."""

import json
from pathlib import Path

import pytest

from ziplora_lib.lora.reader import read

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("diffusers")

PARENTS = ("subject", "third", "style")


@pytest.fixture
def client(host):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from ziplora_lib.api import add_routes

    app = FastAPI()
    add_routes(app, host, {}, None)
    return TestClient(app)


@pytest.fixture
def body(pair_files, third_file, recipe_of):
    """A small recipe of two subjects and a style, as it is sent."""
    files = {"subject": pair_files[0], "third": third_file, "style": pair_files[1]}
    parents = [
        {"lora": str(files[name]), "role": "style" if name == "style" else "subject", "prompt": name}
        for name in PARENTS
    ]
    return json.loads(recipe_of(parents=parents).json())


@pytest.fixture
def merged(host, body, recipe_of):
    from ziplora_lib.job import run

    return run(recipe_of(parents=body["parents"], method="direct"), host).file


def test_three_parents_are_checked_and_merged(client, body):
    told = client.post("/ziplora/v1/preflight", json=body).json()
    assert [(p["name"], p["role"]) for p in told["parents"]] == [
        ("subject", "subject"), ("third", "subject"), ("style", "style")
    ]  # fmt: skip
    job = client.post("/ziplora/v1/merge", json={**body, "steps": 2}).json()["job"]
    while (state := client.get(f"/ziplora/v1/jobs/{job}").json())["state"] in ("queued", "running"):
        pass
    assert state["state"] == "done", state
    assert len(state["result"]["learned"]["error"]) == 3
    for parents in ([], body["parents"][:1], body["parents"] * 3):
        answer = client.post("/ziplora/v1/merge", json={**body, "parents": parents})
        assert answer.status_code == 422
        assert "parents: " in answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"balance": -1}, [1.2, 1.2, 0.75]),
        ({"subject": 0.5, "style": 2}, [0.5, 0.5, 2]),
        ({"strengths": [0.5, -1, 2]}, [0.5, -1, 2]),
    ],
    ids=str,
)
def test_bake(client, host, merged, fields, wanted):

    answer = client.post("/ziplora/v1/bake", json={"lora": merged, "output": "baked", **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tag"] == "<lora:baked:1>"
    assert json.loads(read(host.destination("baked")).metadata["ziplora.strengths"]) == wanted
    again = {"lora": merged, "output": "baked", **fields}
    assert client.post("/ziplora/v1/bake", json=again).status_code == 422
    assert client.post("/ziplora/v1/bake", json={**again, "overwrite": True}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "one of balance"),
        ({"balance": 0, "strengths": [1, 1, 1]}, "one of balance"),
        ({"balance": 0, "subject": 1, "style": 1}, "one of balance"),
        ({"strengths": [1, 1, 1], "style": 1}, "one of balance"),
        ({"balance": 1.5}, "between -1 and 1"),
        ({"balance": "0"}, "balance: "),
        ({"balance": True}, "balance: "),
        ({"subject": 1, "style": 4.5}, "between -4 and 4"),
        ({"strengths": [1, 1]}, "takes 3 strengths, one for each of subject, third, style"),
        ({"strengths": []}, "takes 3 strengths"),
        ({"strengths": [1, 1, "1"]}, "strengths: "),
        ({"strengths": [1, 1, -5]}, "between -4 and 4"),
        ({"balance": 0, "output": "a/b"}, "a/b"),
        ({"balance": 0, "lora": ""}, "needs lora"),
        ({"balance": 0, "loud": True}, "loud: no such field"),
        ({"balance": 0, "overwrite": 1}, "overwrite: "),
    ],
    ids=str,
)
def test_what_cannot_be_baked(client, host, merged, fields, word):
    answer = client.post("/ziplora/v1/bake", json={"lora": merged, "output": "baked", **fields})
    assert answer.status_code == 422
    assert word in answer.json()["error"]
    assert not host.destination("baked").exists()


def test_split(client, host, merged):
    answer = client.post("/ziplora/v1/split", json={"lora": merged, "outputs": ["a", "b", "c"]})
    assert answer.status_code == 200, answer.text
    assert [half["tag"] for half in answer.json()] == ["<lora:a:1>", "<lora:b:1>", "<lora:c:1>"]
    assert all(Path(half["file"]).exists() for half in answer.json())


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "needs lora and outputs"),
        ({"outputs": []}, "needs lora and outputs"),
        ({"outputs": ["a", "b", 3]}, "needs lora and outputs"),
        ({"outputs": "abc"}, "outputs: "),
        ({"outputs": ["a", "b"]}, "has 3 halves (subject subject, subject third, style style)"),
        ({"outputs": ["a", "b", "a"]}, "same name"),
        ({"outputs": ["a", "b", "../c"]}, "../c"),
        ({"outputs": ["a", "b", "merged"]}, "same name"),
    ],
    ids=str,
)
def test_what_cannot_be_split(client, host, merged, fields, word):
    before = sorted(host.folder.iterdir())
    answer = client.post("/ziplora/v1/split", json={"lora": merged, **fields})
    assert answer.status_code == 422
    assert word in answer.json()["error"]
    assert sorted(host.folder.iterdir()) == before


@pytest.mark.parametrize("route", ["bake", "split"])
def test_bodies_that_are_no_objects(client, route):
    for body in ("[]", '"x"', "3", "null", "", "{"):
        answer = client.post(f"/ziplora/v1/{route}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["error"]


def test_a_bake_can_name_one_role_alone(client, host, merged):
    before = json.loads(read(host.open(merged).path).metadata["ziplora.parents"])
    answer = client.post("/ziplora/v1/bake", json={"lora": merged, "output": "softer", "style": 0.5})
    assert answer.status_code == 200, answer.text
    wanted = [0.5 if parent["role"] == "style" else 1.0 for parent in before]
    assert json.loads(read(host.destination("softer")).metadata["ziplora.strengths"]) == wanted


@pytest.mark.parametrize("fields", [{"balance": 10**400}, {"strengths": [True, 1, 1]}, {"subject": 10**400}], ids=str)
def test_numbers_that_are_none_are_refused(client, merged, fields):
    answer = client.post("/ziplora/v1/bake", json={"lora": merged, "output": "odd", **fields})
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize("field", ["lr", "lam", "steps"])
def test_a_setting_beyond_all_numbers_is_refused(client, field):
    parents = [{"lora": "a", "role": "subject", "prompt": "x"}, {"lora": "b", "role": "style", "prompt": "y"}]
    answer = client.post("/ziplora/v1/preflight", json={"parents": parents, "output": "m", field: 10**400})
    assert answer.status_code == 422, answer.text


# --- who may come in, with what --------------------------------------------------------------------------------------


@pytest.fixture
def app_of(host):
    """app_of(users, overwriting) -> a client of the routes"""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from ziplora_lib.api import add_routes

    def make(users=None, overwriting=True, jobs=None):
        app = FastAPI()
        add_routes(app, host, {} if jobs is None else jobs, users, overwriting)
        return TestClient(app)

    return make


def test_credentials_are_read_as_the_webui_reads_them():
    from ziplora_lib.api import credentials

    assert credentials(None) is None
    assert credentials("") is None
    assert credentials("a:b") == {"a": "b"}
    assert credentials("a:b,c:d,a:e") == {"a": "e", "c": "d"}
    assert credentials("a:") == {"a": ""}
    for wrong in ("a", "a:b:c", "a:b,c", "a:b,"):
        with pytest.raises(ValueError, match=r"dictionary update sequence|need"):
            credentials(wrong)


def test_nobody_gets_past_the_credentials(app_of):
    import base64

    client = app_of({"user": "pass", "other": "word", "empty": ""})
    routes = [(route.path.replace("{job}", "x"), next(iter(route.methods))) for route in client.app.routes]
    routes = [(path, method) for path, method in routes if path.startswith("/ziplora/")]
    assert len(routes) == 9
    code = lambda text: "Basic " + base64.b64encode(text.encode()).decode()  # noqa: E731
    wrong = [None, "", "Basic", "Basic x", "Bearer pass", code("user"), code("user:"), code("user:word"), code("other:pass"),
             code("nobody:"), code(":"), code(":pass"), code("User:pass"), code("user:pass "), code("user:p\u00e4ss"),
             code("user:pass\x00"), code("empty:x"), "Digest " + code("user:pass")[6:]]  # fmt: skip
    for path, method in routes:
        for given in wrong:
            headers = {} if given is None else {"Authorization": given}
            for body in ({}, {"content": b"x" * 2_000_000}):  # refused before it is read
                answer = client.request(method, path, headers=headers, **body)
                assert answer.status_code == 401, (path, given)
        for given in (code("user:pass"), code("other:word"), code("empty:")):
            answer = client.request(method, path, headers={"Authorization": given})
            assert answer.status_code in (200, 404, 415), (path, given, answer.text)


def test_a_body_that_is_not_sent_as_json_begins_nothing(app_of, body):
    jobs = {}
    client = app_of(jobs=jobs)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json"):
        answer = client.post("/ziplora/v1/merge", content=json.dumps(body), headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "application/json" in answer.json()["error"]
    assert client.post("/ziplora/v1/merge", content=json.dumps(body)).status_code == 415
    assert not jobs
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        answer = client.post("/ziplora/v1/preflight", content=json.dumps(body), headers={"Content-Type": kind})
        assert answer.status_code == 200


def test_a_large_body_is_refused_before_it_is_read_to_its_end(app_of):
    from ziplora_lib.api import LARGEST

    read = 0

    def endless():
        nonlocal read
        for _ in range(100):
            read += 100_000
            yield b" " * 100_000

    answer = app_of().post("/ziplora/v1/merge", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert f"{LARGEST:,}" in answer.json()["error"]


def test_nothing_is_overwritten_where_anybody_may_come(app_of, host, merged, body):
    client = app_of(overwriting=False)
    known = {path: path.read_bytes() for path in host.folder.iterdir()}
    for route, asked in (
        ("merge", {**body, "output": "merged"}),
        ("preflight", {**body, "output": "merged"}),
        ("bake", {"lora": merged, "output": "merged", "balance": 0}),
        ("split", {"lora": merged, "outputs": ["a", "b", "merged"]}),
    ):
        refused = client.post(f"/ziplora/v1/{route}", json={**asked, "overwrite": True})
        assert refused.status_code == 422
        assert "overwriting is off" in refused.json()["error"]
        assert client.post(f"/ziplora/v1/{route}", json=asked).status_code == 422  # it is there
    assert {path: path.read_bytes() for path in host.folder.iterdir()} == known
    assert client.post("/ziplora/v1/bake", json={"lora": merged, "output": "new", "balance": 0}).status_code == 200


def test_a_merge_that_would_take_half_a_day_is_refused(app_of, body):
    client = app_of()
    for fields in ({"steps": 1000, "batch": 16, "resolution": 1024}, {"steps": 1000, "batch": 4, "resolution": 2048}):
        answer = client.post("/ziplora/v1/preflight", json={**body, **fields})
        assert answer.status_code == 422
        assert "passes of the model" in answer.json()["error"]
    assert client.post("/ziplora/v1/preflight", json={**body, "steps": 1000}).status_code == 200


def test_so_many_jobs_wait_and_no_more(app_of, host, body):
    from ziplora_lib.jobs import MOST_WAITING, Job

    jobs = {}
    client = app_of(jobs=jobs)
    with host.exclusive("a long one"):
        for _ in range(MOST_WAITING):
            waiting = Job("merge", "x", lambda *_: None)
            jobs[waiting.id] = waiting
        answer = client.post("/ziplora/v1/merge", json=body)
        assert answer.status_code == 429
        assert f"{MOST_WAITING} jobs are waiting" in answer.json()["error"]
        assert len(jobs) == MOST_WAITING
    next(iter(jobs.values())).state = "done"
    job = client.post("/ziplora/v1/merge", json={**body, "method": "direct", "balance_points": 1}).json()["job"]
    while client.get(f"/ziplora/v1/jobs/{job}").json()["state"] in ("queued", "running"):
        pass


def test_so_many_bakes_wait_and_no_more(app_of, host, merged):
    import threading
    import time

    from ziplora_lib.api import MOST_BAKES

    client, answers = app_of(), []

    def bake(i):
        asked = {"lora": merged, "output": f"baked-{i}", "balance": 0}
        answers.append(client.post("/ziplora/v1/bake", json=asked).status_code)

    threads = [threading.Thread(target=bake, args=(i,)) for i in range(MOST_BAKES + 3)]
    with host.exclusive("a long one"):
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30
        while answers.count(429) < 3 and time.monotonic() < end:
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * MOST_BAKES + [429] * 3


def test_who_serves_the_page_takes_names_alone(app_of, host, pair_files):
    import shutil

    shutil.copy(pair_files[0], host.folder / "here.safetensors")
    host.paths = False
    client = app_of()
    style = {"lora": "here", "role": "style", "prompt": "x"}
    for lora in (pair_files[0], pair_files[0].with_suffix(""), host.folder / "here.safetensors", "here.safetensors"):
        parents = [{"lora": str(lora), "role": "subject", "prompt": "y"}, style]
        answer = client.post("/ziplora/v1/preflight", json={"parents": parents, "output": "m", "resolution": 64})
        assert answer.status_code == 422
        assert "there is no LoRA named" in answer.json()["error"]
    assert host.open("here").layers
    assert client.get("/ziplora/v1/loras").json() == ["here"]


def test_a_name_that_is_no_text_costs_nobody_the_list(app_of, host, pair_files):
    import os
    import shutil

    shutil.copy(pair_files[0], host.folder / "plain.safetensors")
    shutil.copy(pair_files[0], os.fsencode(host.folder) + b"/odd-\xff.safetensors")
    assert app_of().get("/ziplora/v1/loras").json() == ["plain"]


def test_half_a_character_in_a_card_costs_no_answer(app_of, host, pair_files):
    """JSON can hold such; UTF-8, and so a page, cannot."""
    import shutil

    for name, file in zip("ab", pair_files):
        shutil.copy(file, host.folder / f"{name}.safetensors")
        (host.folder / f"{name}.json").write_text('{"activation text": "a fox \\ud800", "notes": "\\udfff"}')
    parents = [{"lora": "a", "role": "subject", "prompt": "x"}, {"lora": "b", "role": "style", "prompt": "y"}]
    host.paths = False
    answer = app_of().post("/ziplora/v1/preflight", json={"parents": parents, "output": "m", "resolution": 64})
    assert answer.status_code == 200
    assert answer.json()["parents"][0]["trigger"] == "a fox \ud800"
    pytest.importorskip("gradio")
    from types import SimpleNamespace

    from ziplora_lib.tab.parents import Parents

    page = SimpleNamespace(place=SimpleNamespace(host=host))
    assert Parents.suggestion(page, "a")[0] == "a fox ?"
