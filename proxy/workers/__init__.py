"""Several processes that serve as one proxy: `listen.workers`.

Reading order, which is also the import order: messages, ledger, nursery; channel; accounts; desk,
entrance; crew, worker; supervisor. With one worker nothing of this is imported.

    supervisor ── accepts, mints, looks hosts up, has signals, admin address, systemd
      │  ├─ worker 1   an `App` without these: its sessions, from the first byte to the last
      │  ├─ worker 2
      └─ nursery       one thread, everything imported, forks workers

The supervisor accepts and gives each connection, by its descriptor, to the worker with the fewest.
That is even by construction, for unix sockets too; SO_REUSEPORT spreads by a hash, which is even
only for many. It costs a session two system calls more, and a relayed byte nothing.

Workers are forked, from a process that does nothing else: forking one that has threads (the SDK's)
and an event loop is not safe, and a new interpreter would cost each worker 30 MB and most of a
second; forked, it shares these pages, and the maps that were read at the start. (One that a reload
brings is read by each process: a million mappings are 100 MB in each.) All processes are of one
image, so that no message needs a version, and no secret and no setting is in arguments, in the
environment or in a file.

Only the supervisor imports the SDK. A worker asks it for each session's token over a socket pair:
one source of tokens, one freshness, one back-off, and one round trip on the machine for a session.

`max_connections` is exact: the places are counted on a page that all processes see. `connects_max`
is shared out; the bounds of starting connections and of cancels are each worker's own.

Cancel keys stay where their session is. A request that finds no key in the worker that it came to
is asked of all the others (W43); so the upstream's own pid and key still go to the client.

Who dies: a worker costs its sessions and is replaced, with back-off; one that is stuck is ended
first. When the supervisor has gone the nursery kills all workers, be they stuck. When the nursery
has gone the proxy drains and ends with 1, since it could replace nobody any more.
"""
