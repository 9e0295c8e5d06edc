"""The password of a native role, in place of tokens."""

import math
import time
from pathlib import Path
from typing import Final

from proxy.blocking import BlockingCalls, NoThreadStarted
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.outage import ApiCall, Outage, Words

# A file system that does not answer, or a pipe that nothing is written to.
READ_SECONDS_MAX: Final = 5.0

_KEY: Final = "credentials.password_file"
_WORDS: Final = Words("the password file cannot be used", "the password file can be used again")


class PasswordFile:
    """A file with a password in it, which is read at each login."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outage = Outage(_KEY, words=_WORDS)
        # A read that hangs delays the sessions that need the password, and nothing else.
        self._threads = BlockingCalls("password-file")

    async def fresh(self) -> Credential:
        """Return the password. Raises ProxyError for a file that cannot be used now."""
        try:
            password = await self._read_in_time()
        except ProxyError as error:
            self.outage.record_failure(ApiCall.READ, error, 0)
            raise
        self.outage.record_success(ApiCall.READ)
        return Credential(password, time.time(), math.inf, is_password=True)

    async def _read_in_time(self) -> Secret:
        try:
            return await self._threads.run(self._read, READ_SECONDS_MAX)
        except NoThreadStarted as error:
            raise ProxyError(ErrorKind.OUT_OF_RESOURCES, str(error)) from error
        except TimeoutError as error:
            detail = f"{_KEY}: no answer within {READ_SECONDS_MAX:g} seconds"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail) from error

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
