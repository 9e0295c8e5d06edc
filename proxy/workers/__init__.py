"""Several processes that serve as one proxy: `listen.workers`. With one, nothing here is imported.

Reading order, which is also the import order: fork_server, shared_counters, rpc;
remote_credentials; connection_socket, credential_service; acceptor, worker_handle, worker;
supervisor.

    supervisor ── accepts, mints, looks hosts up; has signals, admin address, systemd
      │  ├─ worker 1   an `App` without these: its sessions, from the first byte to the last
      │  ├─ worker 2
      └─ fork server   one thread, everything imported; forks and reaps the workers

The supervisor accepts each connection and passes its descriptor to the worker with the fewest. That
is even for few sessions and for unix sockets too; SO_REUSEPORT spreads by a hash, which is even
only for many. It costs two system calls for each session, and nothing for a relayed byte.

Workers are forked by a process that does nothing else: it is not safe to fork one with threads (the
SDK's) and an event loop, and a new interpreter would cost each worker 30 MB and most of a second. A
forked worker shares these pages, and the maps that were read at the start. (A map that a reload
brings is read by each process: a million mappings are 100 MB in each.) All processes are of one
image, so messages need no version, and no secret or setting is in arguments, in the environment or
in a file.

Only the supervisor imports the SDK. A worker asks it for each session's token over a socket pair.
So there is one source of tokens, one freshness and one back-off, for one round trip on the machine.

`max_connections` is exact: slots are counted in memory that all processes share. `connects_max` is
divided among the workers. The bounds of starting connections and of cancel requests are each
worker's own.

Cancel keys stay where their session is. A worker that gets a cancel request with an unknown key has
all others asked (W43); so the upstream's own pid and key still go to the client.

A worker that dies costs its sessions and is replaced, with a back-off; one that is stuck is killed
first. When the supervisor dies, the fork server kills all workers, also stuck ones. When the fork
server dies, the proxy drains and exits with 1, because no worker could be replaced any more.
"""
