"""Addresses of stores, as they may be shown and written down."""

import re

# Up to the last @ before the path: a password may hold an @ of its own.
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_SECRET_QUERY = re.compile(r"(?i)([?&](?:password|passwd|token|secret|api_?key)=)[^&\s]*")


def without_secrets(text: str) -> str:
    """Text in which no address holds a user name, password or token any more."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("", text))
