"""The password of a native role, in place of tokens."""

import math
import time
from pathlib import Path

from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential


class PasswordFile:
    """A file with a password in it, which is read at each login."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    async def fresh(self) -> Credential:
        """Return the password. Raises ProxyError when the file cannot be read or is empty."""
        try:
            text = self._path.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            detail = f"credentials.password_file: {error.strerror}"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail) from error
        if not text or b"\0" in text:
            detail = "credentials.password_file is empty or has a NUL byte"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail)
        return Credential(Secret(text), time.time(), math.inf, is_password=True)

    def is_fresh(self, credential: Credential) -> bool:
        """Return True: the file was read for this dial."""
        return True

    def reject(self, credential: Credential) -> bool:
        """Return True: the next login reads the file again."""
        return True
