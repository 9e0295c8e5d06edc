"""The password of a native role, in place of tokens."""

import math
import time
from pathlib import Path
from typing import Final

from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.outage import ApiCall, Outage, Words

_KEY: Final = "credentials.password_file"
_WORDS: Final = Words("the password file cannot be used", "the password file can be used again")


class PasswordFile:
    """A file with a password in it, which is read at each login."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outage = Outage(_KEY, words=_WORDS)

    async def fresh(self) -> Credential:
        """Return the password. Raises ProxyError when the file cannot be read or is empty."""
        try:
            password = self._read()
        except ProxyError as error:
            self.outage.record_failure(ApiCall.READ, error, 0)
            raise
        self.outage.record_success(ApiCall.READ)
        return Credential(password, time.time(), math.inf, is_password=True)

    def _read(self) -> Secret:
        try:
            text = Path(self.path).read_bytes().rstrip(b"\r\n")
        except OSError as error:
            detail = f"{_KEY}: {error.strerror}"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail) from error
        if not text or b"\0" in text:
            detail = f"{_KEY} is empty or has a NUL byte"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail)
        return Secret(text)

    def is_fresh(self, credential: Credential) -> bool:
        """Return True: the file was read for this dial."""
        return True

    def reject(self, credential: Credential) -> bool:
        """Return True: the next login reads the file again."""
        return True
