"""A request that gets no answer: status, one sentence, and what OpenAI's error form says beside it."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from srl_rlvr import api


class Refusal(Exception):
    """Raised by replicas, too: everything it holds travels in `args`."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float = 0.0,  # seconds
    ):
        super().__init__(status, message, code, param, retry_after)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        match self.status:
            case 401:
                return "authentication_error"
            case 403:
                return "permission_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
        return "invalid_request_error"


def error_form(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's."""
    said = api.ErrorBody(message=refusal.message, type=refusal.kind, param=refusal.param, code=refusal.code)
    return {"error": said.model_dump()}


def refused(refusal: Refusal) -> JSONResponse:
    headers = {"retry-after": str(math.ceil(refusal.retry_after))} if refusal.retry_after else {}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_form(refusal), refusal.status, headers)
