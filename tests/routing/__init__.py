"""Tests of proxy.routing, one file per source file: texts in, targets out, no socket."""
