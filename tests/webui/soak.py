"""Long runs on a real WebUI with the miniature. Their results are kept in benchmarks/results.

WEBUI_DIR=… python tests/webui/soak.py mixed    generations, merges, bakes, stops and interrupts from several clients at
                                                once, and what memory they leave taken: soak.json
WEBUI_DIR=… python tests/webui/soak.py state    a failure at every line of a merge in turn: state-webui.json
"""

import hashlib
import json
import os
import platform
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import requests

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]

from inside import INSIDE, KINDS  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks/results"
METHODS = ("direct", "ssr", "ziplora")
SUBJECT, STYLE = "a photo of sks dog", "a house in szn style"
SIZE = {"width": 64, "height": 64}


def recipe(output: str, method: str) -> dict:
    from test_state import recipe as smallest

    return smallest(output=output, method=method, overwrite=True)


def names(client: int, method: str) -> str:
    return f"soak-{client}-{method}"


def prepared(webui, clients: int = 3, methods=METHODS) -> dict:
    """What is right, made with nothing else going on: pictures by prompt and seed, and each client's files."""
    from test_merge import merge
    from test_state import write_parents

    write_parents(webui.lora_dir)
    webui.post("/sdapi/v1/refresh-loras")
    webui.run(INSIDE + "inside.aim()")
    files = {}
    for method in methods:
        for client in range(clients):
            state = merge(webui, recipe(names(client, method), method))
            assert state["state"] == "done", state
            files[names(client, method)] = digest(webui, names(client, method))
    tags = ["", "<lora:state-subject:1>", "<lora:state-subject:0.6><lora:state-style:0.8>"]
    tags += [f"<lora:{names(0, method)}:1>" for method in methods]
    drawn = {
        (tag, seed): webui.txt2img(f"{SUBJECT}, {STYLE}{tag}", seed, steps=2, **SIZE) for tag in tags for seed in (1, 2)
    }
    assert len({picture.tobytes() for picture in drawn.values()}) > len(tags)
    baked = {}
    bake = {"lora": names(0, methods[-1]), "subject": 0.5, "style": 1.5, "overwrite": True}
    for client in range(clients):
        name = f"soak-{client}-baked"
        assert webui.post("/ziplora/v1/bake", json={**bake, "output": name}).status_code == 200
        baked[name] = digest(webui, name)
    return {"files": files, "pictures": drawn, "baked": baked, "bake": bake, "methods": methods, "clients": clients}


def digest(webui, name: str) -> str:
    return hashlib.sha256((webui.lora_dir / f"{name}.safetensors").read_bytes()).hexdigest()


def plan(right: dict, count: int, seed: int = 0, merges: int | None = None) -> list[tuple]:
    """What the clients do, in some order: half of it pictures, two fifths merges unless told otherwise, and the rest."""
    chance = random.Random(seed)
    merges = merges if merges is not None else 2 * count // 5
    rest = max(3, count // 20)
    work = [("merge", right["methods"][k % len(right["methods"])]) for k in range(merges)]
    work += [(kind, right["methods"][-1]) for kind in ("stop", "interrupt") for _ in range(rest)]
    work += [("bake", "")] * rest
    pictures = sorted(right["pictures"])
    work += [("picture", pictures[k % len(pictures)]) for k in range(max(0, count - len(work)))]
    chance.shuffle(work)
    return work


def mixed(webui, right: dict, count: int, clients: int = 3, **of_plan) -> list[tuple]:
    """Does it all with several clients at once: [(kind, what, what was wrong or "")]."""
    todo, done = queue.SimpleQueue(), []
    for work in plan(right, count, **of_plan):
        todo.put(work)

    def client(number: int) -> None:
        own = replace(webui, session=requests.Session())
        own.session.trust_env = False
        while True:
            try:
                kind, what = todo.get_nowait()
            except queue.Empty:
                return
            try:
                wrong = DOES[kind](own, right, number, what)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"[:300]
            done.append((kind, what, wrong))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def picture(webui, right, number, what) -> str:
    tag, seed = what
    # each client asks for its own file of the same content
    drawn = webui.txt2img(f"{SUBJECT}, {STYLE}{tag.replace('soak-0-', f'soak-{number}-')}", seed, steps=2, **SIZE)
    wanted = right["pictures"][what]
    if drawn.shape != wanted.shape:
        return f"of another size: {drawn.shape}"
    apart = int(np.abs(drawn.astype(int) - wanted).max())
    return f"differs by {apart}" if apart else ""


def started(webui, output: str, method: str) -> str:
    answer = webui.post("/ziplora/v1/merge", json=recipe(output, method))
    assert answer.status_code == 200, answer.text
    return answer.json()["job"]


def ended(webui, job: str) -> dict:
    while (state := webui.get(f"/ziplora/v1/jobs/{job}").json())["state"] in ("queued", "running"):
        time.sleep(0.1)
    return state


def merged(webui, right, number, method) -> str:
    state = ended(webui, started(webui, names(number, method), method))
    if state["state"] != "done":
        return f"{state['state']}: {state.get('error')}"
    return "" if digest(webui, names(number, method)) == right["files"][names(number, method)] else "another file"


def stopped(webui, right, number, method) -> str:
    """Our own Stop, whenever it comes: the file is there, whole, or not."""
    output = f"soak-{number}-stopped"
    job = started(webui, output, method)
    webui.post(f"/ziplora/v1/jobs/{job}/stop")
    state = ended(webui, job)
    return "" if state["state"] == "stopped" else f"{state['state']}: {state.get('error')}"


def interrupted(webui, right, number, method) -> str:
    """The WebUI's Interrupt, in the midst of the job."""
    output = f"soak-{number}-interrupted"
    webui.run("from modules import call_queue\ncall_queue.queue_lock.acquire()")
    try:
        job = started(webui, output, method)
        webui.run(INSIDE + "inside.aimed_at.add(data['job'])", job=job)
    finally:
        webui.run("from modules import call_queue\ncall_queue.queue_lock.release()")
    state = ended(webui, job)
    there = (webui.lora_dir / f"{output}.safetensors").exists()
    return "" if state["state"] == "stopped" and not there else f"{state['state']}: {state.get('error')}"


def baked(webui, right, number, _) -> str:
    name = f"soak-{number}-baked"
    answer = webui.post("/ziplora/v1/bake", json={**right["bake"], "output": name})
    if answer.status_code != 200:
        return answer.text
    return "" if digest(webui, name) == right["baked"][name] else "another file"


DOES = {"picture": picture, "merge": merged, "stop": stopped, "interrupt": interrupted, "bake": baked}


def checked(done: list[tuple]) -> dict:
    """How many of each kind, and what was wrong."""
    return {
        "done": len(done),
        "kinds": dict(Counter(kind for kind, *_ in done)),
        "merges": dict(Counter(what for kind, what, _ in done if kind == "merge")),
        "wrong": [[kind, str(what), wrong] for kind, what, wrong in done if wrong],
    }


# --- by themselves ----------------------------------------------------------------------------------------


def machine(webui) -> dict:
    inner = webui.run(
        "import sys, torch, numpy, safetensors\nfrom modules import launch_utils\n"
        "result = {'webui': launch_utils.git_tag(), 'python': sys.version.split()[0], 'torch': torch.__version__, "
        "'numpy': numpy.__version__, 'safetensors': safetensors.__version__, 'threads': torch.get_num_threads()}"
    )
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "command": " ".join(sys.argv), **inner}


def soak(webui, count: int = 250, merges: int = 100, clients: int = 4) -> dict:
    """First until ten merges are done, then a hundred more: what is taken in between is what jobs leave taken."""
    began, traces = time.monotonic(), INSIDE + "result = inside.memory()"
    right = prepared(webui, clients)
    webui.txt2img(SUBJECT, 1, steps=2, **SIZE)  # the last one had a LoRA, and leaves it loaded
    webui.run(INSIDE + "inside.before = inside.fingerprint()")
    first = mixed(webui, right, 25, clients, merges=10)
    after_10 = webui.run(traces)
    rest = mixed(webui, right, count, clients, merges=merges, seed=1)
    after = webui.run(traces)
    webui.txt2img(SUBJECT, 1, steps=2, **SIZE)
    changed = webui.run(INSIDE + "result = inside.changes(inside.before, inside.fingerprint())")
    told = {
        "what": "generations, merges, bakes, stops and interrupts of several clients at once, each compared with one alone",
        **checked(first + rest),
        "clients": clients,
        "memory": {"after_10_merges": after_10, f"after_{10 + merges}_merges": after},
        "gained_bytes": after["resident"] - after_10["resident"],
        "gained_tensors": after["tensors"] - after_10["tensors"],
        "gained_hooks": after["hooks"] - after_10["hooks"],
        "changed": [line for line in changed if not line.startswith(("files", "chance", "scratch"))],
        "seconds": round(time.monotonic() - began),
        **machine(webui),
    }
    told["differing_pictures"] = sum(kind == "picture" for kind, *_ in told["wrong"])
    return told


def state(webui, every: int = 1) -> dict:
    """A failure at each line of a merge, of a kind each in turn; every tenth time two pictures are compared as well."""
    from test_state import PICTURE, WITH_LORA, attempt, check, write_parents

    began = time.monotonic()
    write_parents(webui.lora_dir)
    webui.post("/sdapi/v1/refresh-loras")
    attempt(webui)
    usual = attempt(webui)
    pictures = [webui.txt2img(**PICTURE), webui.txt2img(**WITH_LORA)]
    ends, kinds, files, wrong, not_passed, differing, drawn = Counter(), Counter(), Counter(), [], [], 0, 0
    lines = list(usual["passed"])[::every]
    for number, line in enumerate(lines):
        kind, many = list(KINDS)[number % len(KINDS)], usual["passed"][line]
        told = attempt(webui, (line, 1 + many // 2 * (number % 2)), kind, again=number % 10 != 0)
        if not told["sprung"]:  # it is not passed so often every time
            told = attempt(webui, (line, 1), kind)
        if not told["sprung"]:
            assert told["changes"] == [], told
            not_passed.append(line)
            continue
        kinds[kind] += 1
        files[line.partition(":")[0]] += 1
        ends["passed on" if told["escaped"] else told["state"]] += 1
        try:
            check(told, usual)
        except AssertionError as error:
            wrong.append([line, kind, str(error)[:500]])
            print(wrong[-1], told["changes"], told["file"], flush=True)
        if number % 10 == 9:
            for body, wanted in ((WITH_LORA, pictures[1]), (PICTURE, pictures[0])):
                drawn, differing = drawn + 1, differing + int(not np.array_equal(webui.txt2img(**body), wanted))
            if number % 20 == 9:  # the next ten with a LoRA in the weights
                webui.txt2img(**WITH_LORA)
            print(number + 1, "of", len(lines), len(wrong), "wrong", round(time.monotonic() - began), "s", flush=True)
    return {
        "what": "a failure at each line that a merge passes, but those that restore; all of the WebUI compared with before",
        "lines": len(usual["passed"]),
        "injected": sum(kinds.values()),
        "recovered": sum(kinds.values()) - len(wrong),
        "not_passed": not_passed,
        "wrong": wrong,
        "kinds": dict(kinds),
        "files": dict(files),
        "ends": dict(ends),
        "pictures": drawn,
        "differing_pictures": differing,
        "seconds": round(time.monotonic() - began),
        **machine(webui),
    }


def main(what: str, *given: str) -> None:
    from conftest import WEBUI_DIR, running_webui
    from sgm_miniature import write_sgm_miniature

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        with running_webui(Path(folder) / "data", write_sgm_miniature(checkpoint, WEBUI_DIR)) as webui:
            told = {"mixed": soak, "state": state}[what](webui, *map(int, given))
    file = RESULTS / {"mixed": "soak.json", "state": "state-webui.json"}[what]
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: told[name] for name in told if name != "memory"}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
