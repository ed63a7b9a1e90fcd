"""The one exception that means: this request cannot be answered, the service goes on."""


class RequestError(Exception):
    """What is wrong with a request or with what it needs, told in one sentence.

    status: of the HTTP answer. field: which field of the body, if one. retry_after: seconds after
    which the same request may succeed, or None.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.retry_after = retry_after
