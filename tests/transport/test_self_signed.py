"""The listener's certificate in memory: it leaves nothing, and one process has one."""

import ssl
from pathlib import Path

from proxy.transport.self_signed import self_signed_context


def test_a_process_has_one_certificate_and_no_file_stays_open() -> None:
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    context = self_signed_context()
    assert len(list(files.iterdir())) <= before
    assert self_signed_context() is context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
