"""Tests of proxy.wire, one file per source file: bytes in, events and bytes out, no socket."""
