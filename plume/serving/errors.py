"""What a request is told where it is not answered: one shape for every endpoint, and sentences that repeat nothing."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused.

    status: of HTTP. message: a sentence without the content of the request. param: the field that is wrong.
    retry_after: seconds after which it may be sent again; None: it need not.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}

    @property
    def headers(self) -> dict[str, str]:
        """Whether to try again, which OpenAI's clients do by themselves for some statuses."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def wrong(message: str, param: str | None = None) -> RequestError:
    """A fault of the request."""
    return RequestError(400, message, param)
