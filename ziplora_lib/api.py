"""The API: /ziplora/v1/…, JSON, the recipe as body. Mounted into the WebUI's app beside its own API."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ziplora_lib import access
from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job, QueueFull, check_queue, remember
from ziplora_lib.later import later
from ziplora_lib.merge import balance
from ziplora_lib.naming import sendable, whole
from ziplora_lib.recipe import Recipe, parse, schema

if TYPE_CHECKING:
    from ziplora_lib.lora.reader import Lora

bake, merging = later("ziplora_lib.lora.bake"), later("ziplora_lib.job")

PREFIX = "/ziplora/v1"
# bytes of the largest body, letters of the longest answer to a wrong one, digits of the longest whole number
LARGEST, LONGEST, DIGITS = 1_000_000, 1000, 400
# preflights at once, each with its LoRAs in memory; bakes and splits that wait for the model's other work, each with one of
# the server's threads
MOST_PREFLIGHTS, MOST_BAKES = 4, 10


def credentials(api_auth: str | None) -> dict[str, str] | None:
    """The WebUI's --api-auth, "user:password,user:password"; None where it is not set."""
    return dict(pair.split(":") for pair in api_auth.split(",")) if api_auth else None


def add_routes(
    app: FastAPI, host, jobs: dict[str, Job], users: Mapping[str, str] | None, overwriting: bool = True
) -> None:
    """Adds the routes to an app. host: a WebuiHost; jobs: shared with the tab; users: who may call, None for everyone.

    overwriting: whether a LoRA that is there may be replaced.
    """

    def allowed(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
        name, word = given.username.encode(), given.password.encode()
        # all are compared, so that the time tells nobody which names there are
        found = [_same(name, user) & _same(word, password) for user, password in users.items()]
        if not any(found):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    guards = [] if users is None else [Depends(allowed)]
    preflights, bakes = threading.BoundedSemaphore(MOST_PREFLIGHTS), threading.BoundedSemaphore(MOST_BAKES)

    def route(method: str, path: str, reads: bool = False):
        """A route of that work. reads: it takes the body, as JSON; credentials are asked for before it is read."""

        def add(work: Callable) -> Callable:
            endpoint = answering(work, reads)
            name = work.__name__
            app.add_api_route(PREFIX + path, endpoint, methods=[method], dependencies=guards, name=name)
            return work

        return add

    def recipe_of(body: Any) -> Recipe:
        if not isinstance(body, dict):
            raise BadInput("the body is not a recipe", remedy=f"Send a JSON object; see GET {PREFIX}/schema")
        recipe = parse(body)
        if any(parent.reference for parent in recipe.parents):
            raise BadInput("reference pictures cannot be named over the API", remedy="Upload them in the tab")
        return access.admitted(recipe, overwriting)

    def job_of(job: str) -> Job:
        if job not in jobs:
            raise HTTPException(404, "there is no such job")
        return jobs[job]

    @route("GET", "/loras")
    def loras():
        return [name for name in host.loras() if sendable(name)]

    @route("GET", "/schema")
    def recipe_schema():
        return schema()

    @route("POST", "/preflight", reads=True)
    def check(body: Any):
        recipe = recipe_of(body)
        with _one_of(preflights):
            return merging.preflight(recipe, host).report

    @route("POST", "/merge", reads=True)
    def merge(body: Any):
        recipe = recipe_of(body)
        check_queue(jobs)
        with _one_of(preflights):
            merging.preflight(recipe, host)
        job = Job.merge(recipe)
        remember(jobs, job)
        job.start(host)
        return {"job": job.id}

    @route("POST", "/bake", reads=True)
    def bake_strengths(body: Any):
        wanted = bake_request(body)
        access.check_overwriting(wanted.get("overwrite", False), overwriting)
        with _one_of(bakes):
            weights = bake_weights(wanted, host.peek(wanted["lora"]))
            return merging.bake_balance(host, wanted["lora"], wanted["output"], weights, wanted.get("overwrite", False))

    @route("POST", "/split", reads=True)
    def split_halves(body: Any):
        wanted = split_request(body)
        access.check_overwriting(wanted.get("overwrite", False), overwriting)
        with _one_of(bakes):
            return merging.split_merged(host, wanted["lora"], wanted["outputs"], wanted.get("overwrite", False))

    @route("GET", "/jobs")
    def every_job():
        known = list(jobs.values())
        return [{"job": job.id, "kind": job.kind, "title": job.title, "state": job.state} for job in known]

    @route("GET", "/jobs/{job}")
    def show(job: str):
        return job_of(job).public()

    @route("POST", "/jobs/{job}/stop")
    def stop(job: str):
        found = job_of(job)
        found.stop()
        return found.public()


@contextmanager
def _one_of(places: threading.BoundedSemaphore) -> Iterator[None]:
    """Holds one of so many places meanwhile. Raises QueueFull where none is free."""
    if not places.acquire(blocking=False):
        raise QueueFull("too many requests of this kind are at work already", remedy="Wait a moment, then ask again")
    try:
        yield
    finally:
        places.release()


def _same(given: bytes, expected: str) -> bool:
    return secrets.compare_digest(given, expected.encode())


# --- bodies in, refusals out -------------------------------------------------------------------------------------


def answering(work: Callable, reads: bool = False) -> Callable:
    """An endpoint: work(body, what is in the path) in a thread; what is wrong is answered as {"error": one line}."""

    async def endpoint(request: Request):
        try:
            body = [await body_of(request)] if reads else []
            found = await run_in_threadpool(work, *body, **request.path_params)
            # not the app's own way: that fails at half a character, which a LoRA's metadata can have
            return Response(json.dumps(jsonable_encoder(found)), media_type="application/json")
        except HTTPException as refusal:
            return _refused(refusal.detail, refusal.status_code)
        except QueueFull as error:
            return _refused(str(error), 429)
        except BadInput as error:
            return _refused(str(error), 422)
        except OSError as error:
            return _refused(f"could not be written: {error}", 500)

    return endpoint


def _refused(text: str, status: int) -> JSONResponse:
    line = " ".join(whole(text).split())
    return JSONResponse({"error": line if len(line) <= LONGEST else f"{line[:LONGEST]} …"}, status)


async def body_of(request: Request) -> Any:
    """The body of a request, as JSON. Raises HTTPException or BadInput for one that is too large, or none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # any other, or none, a page of somebody else's could send from the user's browser
        raise HTTPException(415, "the body is not sent as JSON. Send it with Content-Type: application/json.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            raise HTTPException(413, f"the body is larger than {LARGEST:,} bytes. No recipe is.")
    return parsed(bytes(data))


def parsed(data: bytes) -> Any:
    """A body as JSON: without NaN, without fields that stand twice, without half characters. Raises BadInput."""
    try:
        body = json.loads(data.decode(), object_pairs_hook=_each_once, parse_constant=_no_number, parse_int=_whole)
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON ({error})", remedy="Send a JSON object as UTF-8") from error
    return body


def _each_once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands twice in it")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return int(text)


def bake_request(body: Any) -> dict:
    """{"lora", "output", "balance" | "subject" and/or "style" | "strengths", "overwrite"}. Raises BadInput for all else."""
    number = (int, float)
    known = {"lora": str, "output": str, "balance": number, "subject": number, "style": number, "strengths": list}
    example = 'For instance {"lora": "dog-ink", "output": "dog-ink-soft", "balance": -0.2}'
    _check_form(body, known, example)
    ways = ["balance" in body, "subject" in body or "style" in body, "strengths" in body]
    if not body.get("lora") or "output" not in body or sum(ways) != 1:
        raise BadInput("needs lora, output, and one of balance, subject and style, or strengths", remedy=example)
    given = body.get("strengths", [])
    if not all(isinstance(strength, number) and not isinstance(strength, bool) for strength in given):
        raise BadInput("strengths: must be numbers, one a parent", remedy=example)
    return body


def bake_weights(wanted: dict, merged: Lora) -> list[float]:
    """The strength of each parent that a bake request asks for. Raises BadInput where that does not fit the LoRA."""
    if "balance" in wanted:
        return balance.weights(wanted["balance"], [parent["role"] for parent in bake.origins(merged)])
    if "strengths" in wanted:
        return wanted["strengths"]
    return bake.strengths(merged, {role: [wanted[role]] for role in ("subject", "style") if role in wanted})


def split_request(body: Any) -> dict:
    """{"lora", "outputs": one name a parent, "overwrite"}. Raises BadInput for all else."""
    example = 'For instance {"lora": "dog-ink", "outputs": ["dog-half", "ink-half"]}'
    _check_form(body, {"lora": str, "outputs": list}, example)
    names = body.get("outputs", [])
    if not body.get("lora") or not names or not all(isinstance(name, str) for name in names):
        raise BadInput("needs lora and outputs, a name for each parent's half", remedy=example)
    return body


def _check_form(body: Any, known: dict, example: str) -> None:
    if not isinstance(body, dict):
        raise BadInput("the body is not a JSON object", remedy=example)
    for field, value in body.items():
        kinds = {**known, "overwrite": bool}.get(field, ())
        # to Python true is a number too
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise BadInput(f"{field}: no such field, or of another type", remedy=example)
