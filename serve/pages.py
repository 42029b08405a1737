"""The pages for people: the console, the reference of the API, and what the console reads: models, load, runs, reports.

A page is one file without anything from elsewhere, and its content security policy says so to the browser.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import FileResponse, JSONResponse, Response

from serve import kinds, runs
from serve.config import GatewaySettings, Served
from serve.errors import Refusal
from srl_rlvr import api

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.journal import Journal

_HERE = Path(__file__).parent
_OWN = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_PAGE = f"{_OWN}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# A report shows what models wrote: it may not ask the gateway, nor read what the console keeps.
_REPORT = f"{_OWN}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts"


def install(app: FastAPI, settings: GatewaySettings, journal: Journal) -> None:
    folder = Path(settings.runs)

    @app.get("/console", include_in_schema=False)
    async def console() -> Response:
        return _file(_HERE / "console.html", _PAGE)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        return _file(_HERE / "docs.html", _PAGE)

    @app.get("/console/models", include_in_schema=False)
    async def served() -> Response:
        models = [_listed(model) for model in settings.models]
        return JSONResponse({"keys": bool(settings.access.keys), "models": models})

    @app.get("/console/live", include_in_schema=False)
    async def live() -> Response:
        return JSONResponse(journal.live())

    @app.get("/console/runs", include_in_schema=False)
    async def past() -> Response:
        return JSONResponse({"runs": await asyncio.to_thread(runs.read, folder)})

    @app.get("/console/runs/{name}/report.html", include_in_schema=False)
    async def report(name: str) -> Response:
        found = await asyncio.to_thread(runs.report, folder, name)
        if found is None:
            raise Refusal(404, "there is no report of a run of that name", "report_not_found")
        return _file(found, _REPORT)


def model_info(model: Served) -> api.ModelInfo:
    return api.ModelInfo(
        id=model.name, created=model.created, model_type=model.model_type, kind=model.kind or model.model_type
    )


def _listed(model: Served) -> dict[str, Any]:
    """`kind` is the known type whose form the model has; empty if no endpoint answers for it."""
    kind = model.kind or model.model_type
    if kind not in kinds.WITH_ENDPOINT:
        kind = "task_llm" if model.policy == "text" else ""
    found = {"id": model.name, "model_type": model.model_type, "kind": kind}
    return found | {"max_tokens": model.max_tokens, "example": model.example}


def _file(path: Path, policy: str) -> Response:
    return FileResponse(
        path,
        media_type="text/html; charset=utf-8",
        headers={"content-security-policy": policy, "cache-control": "no-cache"},
    )
