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
    for body in ([], "x", 3, None):
        assert client.post(f"/ziplora/v1/{route}", json=body).status_code == 422


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
