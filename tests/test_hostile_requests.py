"""The tab's server without a WebUI, asked what it should refuse. In a WebUI: tests/webui/test_access.py."""

import json
import shutil
from urllib.parse import quote

import hostile
import pytest
from hostile import JSON, SECRET, Hostile, ask

pytest.importorskip("gradio")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def place(tmp_path_factory, pair_files):
    """(address, log, LoRA folder, canary, all else that there is)"""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "models/Lora"
    folder.mkdir(parents=True)
    for name, file in zip(("subject", "style"), pair_files):
        shutil.copy(file, folder / f"{name}.safetensors")
    canary = hostile.with_canaries(root / "outside", pair_files[0])
    with hostile.served(folder, root / "run") as (url, log):
        yield url, log, folder, canary, root


def get(url, path, **headers):
    return ask(url, Hostile("GET", path, headers=headers))


def test_every_request_is_refused_and_nothing_is_touched(place, capsys):
    url, log, folder, canary, root = place
    asked = hostile.requests("subject", "style", canary)
    before = hostile.tree(folder, root / "outside", root / "run/started-in")
    wrong = [said for one in asked if (said := hostile.wrong_about(one, *ask(url, one)[:2]))]
    assert wrong == [], f"{len(wrong)} of {len(asked)}:\n" + "\n".join(wrong[:40])
    assert hostile.tree(folder, root / "outside", root / "run/started-in") == before
    assert json.loads(get(url, "/ziplora/v1/jobs")[1]) == []
    assert json.loads(get(url, "/ziplora/v1/loras")[1]) == ["style", "subject"]
    assert "Traceback" not in log.read_text("utf-8", "replace")
    assert len(asked) >= 300
    with capsys.disabled():
        print(f"\n{len(asked)} hostile requests to the API without a WebUI: all refused")


def test_forged_events_of_the_page_read_and_write_nothing_else(place, capsys):
    url, _, folder, canary, root = place
    config = json.loads(get(url, "/config")[1])
    outside = [
        canary,
        canary.with_suffix(".txt"),
        canary.with_suffix(".png"),
        canary.with_suffix(".json"),
        "/etc/passwd",
    ]
    asked = hostile.forged(config, [*map(str, outside), "../../outside/canary", "\x00", "<img src=x onerror=alert(1)>"])
    before = hostile.tree(folder, root / "outside", root / "run/started-in")
    for one in asked:
        status, body, _ = ask(url, one)
        assert status in one.right, one.title
        text = body.decode("utf-8", "replace")
        assert SECRET not in text, one.title
        assert "Traceback" not in text, one.title
        assert "root:x:" not in text, one.title
        assert "<img src=x" not in json.dumps([v for v in json.loads(text).get("data", []) if _is_html(v)]), one.title
    assert hostile.tree(folder, root / "outside", root / "run/started-in") == before
    # what gradio would hand out
    kept = set(hostile.tree(root / "run/gradio").values()) if (root / "run/gradio").exists() else set()
    assert kept.isdisjoint(hostile.tree(root / "outside").values())
    assert json.loads(get(url, "/ziplora/v1/jobs")[1]) == []
    assert len(asked) > 100
    with capsys.disabled():
        print(f"\n{len(asked)} forged events of the page without a WebUI: nothing read, nothing written")


def _is_html(value):
    return isinstance(value, str) and value.startswith("<")


def test_files_of_the_page_are_those_of_the_lora_folder(place):
    url, _, folder, canary, root = place
    (folder / ".hidden").write_text(SECRET)
    refused = [canary, canary.with_suffix(".txt"), root / "run/started-in/canary.txt", "canary.txt", "/etc/passwd",
               folder / ".hidden", f"{folder}/../../outside/canary.txt", f"{folder}/a/../../../outside/canary.txt",
               "../outside/canary.txt", folder, "/proc/self/environ"]  # fmt: skip
    for path in refused:
        for form in (quote(str(path)), quote(str(path), safe="")):
            for route in ("/file=", "/file/"):
                status, body, _ = get(url, route + form)
                assert status in (403, 404), (path, status)
                assert SECRET.encode() not in body
    for path in ("/ziplora.js/../canary.txt", "/static/../../canary.txt", "/assets/..%2f..%2f..%2fcanary.txt"):
        status, body, _ = get(url, path)
        assert status in (403, 404), path
    (folder / ".hidden").unlink()
    (folder / "subject.png").write_bytes(canary.with_suffix(".png").read_bytes())
    assert get(url, f"/file={quote(str((folder / 'subject.png').resolve()))}")[0] == 200
    (folder / "subject.png").unlink()


def test_no_page_of_another_site_is_answered(place):
    url, *_ = place
    own = url.removeprefix("http://")
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{own}.evil.example", "file://"):
        for method, path in (("GET", "/ziplora/v1/loras"), ("POST", "/ziplora/v1/merge"), ("POST", "/run/predict"),
                             ("OPTIONS", "/ziplora/v1/merge"), ("GET", "/config"), ("POST", "/upload")):  # fmt: skip
            headers = {**JSON, "Origin": origin, "Access-Control-Request-Method": "POST"}
            status, _, told = ask(url, Hostile(method, path, b"{}" * (method == "POST"), headers))
            assert status == 403, (origin, path, status)
            assert not [name for name in told if name.lower().startswith("access-control-allow")]
        upgrade = {"Origin": origin, "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        assert ask(url, Hostile("GET", "/queue/join", headers=upgrade))[0] == 403
    assert get(url, "/ziplora/v1/loras", Origin=url)[0] == 200
    assert get(url, "/ziplora/v1/loras")[0] == 200


# --- pictures that are none, or too many -----------------------------------------------------------------------------


def test_only_plain_pictures_of_bounded_size_are_read_as_references(tmp_path):
    import struct
    import zlib

    from PIL import Image

    from ziplora_lib.calibration import MOST_BYTES, MOST_PICTURES, references
    from ziplora_lib.errors import BadInput

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)) + chunk(b"IEND", b"")
    small = Image.new("RGB", (64, 64), "red")
    cases = {
        "bomb.png": "is not a readable picture",
        "large.png": "too large a picture",
        "long.png": "too large a picture",
    }
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.new("1", (8100, 8000)).save(tmp_path / "large.png")
    with (tmp_path / "long.png").open("wb") as file:
        small.save(file, "PNG")
        file.truncate(MOST_BYTES + 1)
    for kind in ("GIF", "TIFF", "ICO", "PDF", "EPS", "TGA", "PPM", "PCX", "SGI"):  # readers with a history
        small.save(tmp_path / f"{kind}.png", kind)
        cases[f"{kind}.png"] = "is not a readable picture"
    (tmp_path / "canary.png").write_text(SECRET)
    (tmp_path / "svg.png").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    )
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("canary.png", "svg.png", "empty.png", "not-there.png"):
        cases[name] = "is not a readable picture"
    for name, said in cases.items():
        with pytest.raises(BadInput, match=said) as caught:
            references([str(tmp_path / name)], 64)
        assert SECRET not in str(caught.value)
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        small.save(tmp_path / f"good.{kind.lower()}", kind)
        assert references([str(tmp_path / f"good.{kind.lower()}")], 64)[0].size == (64, 64)
    with pytest.raises(BadInput, match="reference pictures of one LoRA"):
        references([str(tmp_path / "good.png")] * (MOST_PICTURES + 1), 64)


# --- names, metadata and messages as markup ----------------------------------------------------------------------------

EVIL = "\"'><img src=x onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>&lt;b&gt;</a>"
PLAIN = {"p", "b", "br", "div", "span", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "h4", "small", "button",
         "img", "figure", "figcaption", "svg", "path", "text", "line", "polyline", "details", "summary", "i"}  # fmt: skip


def assert_harmless(markup: str):
    """Nothing but our own elements; what was hostile is in it as text."""
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        said = ""

        def handle_starttag(self, tag, attributes):
            assert tag in PLAIN, (tag, markup)
            for name, value in attributes:
                assert not name.startswith("on"), markup
                assert name not in ("src", "href") or not value.strip().lower().startswith(
                    ("javascript", "data", "x")
                ), markup

        def handle_data(self, data):
            self.said += data

    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert "alert" in reader.said or "alert" in markup
    assert "<script" not in markup
    assert "<img src=x" not in markup


def test_whatever_the_page_says_is_text(tmp_path):
    from ziplora_lib import charts
    from ziplora_lib.batch import Batch, Outcome
    from ziplora_lib.catalogue import Facts
    from ziplora_lib.findings import Findings, Parent
    from ziplora_lib.hosts.host import Entry
    from ziplora_lib.jobs import Job
    from ziplora_lib.many import Chosen, Pair, Planned
    from ziplora_lib.recipe import parse
    from ziplora_lib.tab import many, parents, preflight, result, running, why, words

    both = [{"lora": EVIL, "role": role, "prompt": EVIL} for role in ("subject", "style")]
    recipe = parse({"parents": both, "output": EVIL, "preview_prompt": EVIL})
    told = {"name": EVIL, "title": EVIL, "role": "style", "base": EVIL, "kinds": {EVIL: 1}, "ranks": [4], "layers": 2}
    told |= {"matched": 1, "norm": 1.0}
    report = {"parents": [told, told], "model": {"name": EVIL}, "learned_layers": 1, "shared_layers": 1, "bytes": 1,
              "warnings": [EVIL], "free_memory": None}  # fmt: skip
    entry = Entry(EVIL, tmp_path / "x.safetensors", EVIL, "file=" + quote(EVIL))
    outcome = result.merging.Result(EVIL, EVIL, False, {}, [EVIL], {}, {"error": [1, 1], "error_plain_sum": [1, 1]}, EVIL,
                                    {"bytes": 1, "largest_error": 0.0}, None, report, {EVIL: 1.0})  # fmt: skip
    job = Job("merge", EVIL, lambda *_: None, recipe)
    job.result, job.error = outcome, EVIL
    job.progress = {"phase": "merge", "what": EVIL, "step": 1, "steps": 2, "rows": [[EVIL, EVIL, EVIL]]}
    job.history = [{"loss": 1.0, "errors": [1, 1], "mean_m": [1, 1]}] * 2
    lost = Findings(EVIL, [Parent(EVIL, EVIL, 1, 1, EVIL, EVIL)] * 2, {}, [EVIL])
    pair = Planned(Pair(Chosen(EVIL, EVIL), Chosen(EVIL, EVIL)), EVIL, recipe, sources=(EVIL, EVIL))
    batch = Batch([Outcome(EVIL, EVIL, EVIL, "failed", EVIL, EVIL)])
    for markup in (
        words.error(EVIL), words.line(EVIL), words.warnings([EVIL]), words.table([EVIL], [[EVIL, EVIL, words.Wrong(EVIL)]]),
        parents._card_html(entry, Facts(EVIL, EVIL, EVIL), True), parents._card_html(entry, Facts(problem=EVIL), False),
        parents._choice_html(entry, Facts(EVIL, EVIL, EVIL), True), parents._choice_html(entry, Facts(problem=EVIL), False),
        preflight.ready(report, recipe, [], True), preflight.ready({**report, "model": None}, recipe, [], False),
        result._summary(job), result._learned(outcome.learned, report["parents"]), running.live(job),
        charts.curves(EVIL, {EVIL: [1, 2]}), charts.learning(job.history, [EVIL, EVIL], True),
        charts.heat_map(EVIL, [EVIL], [EVIL], {(EVIL, EVIL): 1.0}, unit=EVIL), why.by_block(lost),
        words.table(["", EVIL], [many._row(pair, {EVIL: EVIL})]), many.outcomes_table(batch, 1.0), many._without_result(job),
    ):  # fmt: skip
        assert_harmless(markup)
