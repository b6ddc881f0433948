"""The API: /ziplora/v1/…, JSON, the recipe as body. Mounted into the WebUI's app beside its own API."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job, remember
from ziplora_lib.later import later
from ziplora_lib.merge import balance
from ziplora_lib.recipe import Recipe, parse, schema

if TYPE_CHECKING:
    from ziplora_lib.lora.reader import Lora

bake, merging = later("ziplora_lib.lora.bake"), later("ziplora_lib.job")

PREFIX = "/ziplora/v1"


def credentials(api_auth: str | None) -> dict[str, str] | None:
    """The WebUI's --api-auth, "user:password,user:password"; None where it is not set."""
    return dict(pair.split(":") for pair in api_auth.split(",")) if api_auth else None


def add_routes(app: FastAPI, host, jobs: dict[str, Job], users: Mapping[str, str] | None) -> None:
    """Adds the routes to an app. host: a WebuiHost; jobs: shared with the tab; users: who may call, None for everyone."""

    def allowed(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
        expected = users.get(given.username, "")
        right = secrets.compare_digest(given.password.encode(), expected.encode())
        if not right or given.username not in users:
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    guards = [] if users is None else [Depends(allowed)]

    def route(method: str, path: str):
        return app.api_route(PREFIX + path, methods=[method], dependencies=guards)

    def recipe_of(body: Any) -> Recipe:
        if not isinstance(body, dict):
            raise BadInput("the body is not a recipe", remedy=f"Send a JSON object; see GET {PREFIX}/schema")
        recipe = parse(body)
        if any(parent.reference for parent in recipe.parents):
            raise BadInput("reference pictures cannot be named over the API", remedy="Upload them in the tab")
        return recipe

    def job_of(job: str) -> Job:
        if job not in jobs:
            raise HTTPException(404, f"there is no job {job}")
        return jobs[job]

    def refused(error: BadInput) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @route("GET", "/loras")
    def loras():
        return host.loras()

    @route("GET", "/schema")
    def recipe_schema():
        return schema()

    @route("POST", "/preflight")
    def check(body: Any = Body(...)):  # noqa: B008
        try:
            return merging.preflight(recipe_of(body), host).report
        except BadInput as error:
            return refused(error)

    @route("POST", "/merge")
    def merge(body: Any = Body(...)):  # noqa: B008
        try:
            recipe = recipe_of(body)
            merging.preflight(recipe, host)
        except BadInput as error:
            return refused(error)
        job = Job.merge(recipe)
        remember(jobs, job)
        job.start(host)
        return {"job": job.id}

    @route("POST", "/bake")
    def bake_strengths(body: Any = Body(...)):  # noqa: B008
        try:
            wanted = bake_request(body)
            weights = bake_weights(wanted, host.peek(wanted["lora"]))
            return merging.bake_balance(host, wanted["lora"], wanted["output"], weights, wanted.get("overwrite", False))
        except BadInput as error:
            return refused(error)
        except OSError as error:
            return JSONResponse({"error": f"could not be written: {error}"}, 500)

    @route("POST", "/split")
    def split_halves(body: Any = Body(...)):  # noqa: B008
        try:
            wanted = split_request(body)
            return merging.split_merged(host, wanted["lora"], wanted["outputs"], wanted.get("overwrite", False))
        except BadInput as error:
            return refused(error)
        except OSError as error:
            return JSONResponse({"error": f"could not be written: {error}"}, 500)

    @route("GET", "/jobs")
    def every_job():
        return [{"job": job.id, "kind": job.kind, "title": job.title, "state": job.state} for job in jobs.values()]

    @route("GET", "/jobs/{job}")
    def show(job: str):
        return job_of(job).public()

    @route("POST", "/jobs/{job}/stop")
    def stop(job: str):
        found = job_of(job)
        found.stop()
        return found.public()


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
