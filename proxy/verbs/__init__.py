"""The verbs of the command line: a line in `verb_table` and a module for each, with `run`.

A verb imports no more than it needs: `wait` is run every few seconds by a health check, on CPU time
that the application pays for. `stderr`, `syntax`, `event_loop` and `admin_client` are shared by
several. `shards` is a package: it has verbs of its own.
"""
