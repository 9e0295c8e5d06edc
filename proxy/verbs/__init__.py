"""What each verb of the command line does: a module a verb, with `run(arguments) -> exit code`.

A verb imports what it needs and no more: `wait` is run every few seconds by a health check, on the
CPU that the application pays for. `stderr`, `event_loop` and `admin_client` are
what several have in common.
"""
