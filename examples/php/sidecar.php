<?php
// PDO with the sidecar: nothing here is about tokens. PHP has no pool that outlives a request, so
// let the proxy have one: upstream.pool = "session".
// With an argument it connects to the database of the tenant that has this shard key.
$database = implode("@", [getenv("PGDATABASE"), ...array_slice($argv, 1)]);
// TLS ends at the sidecar, which is on loopback. The rest comes from PGHOST, PGPORT and PGUSER.
$connection = new PDO("pgsql:dbname=$database;sslmode=disable");
$rows = $connection->query("SELECT current_user, current_database()");
echo implode(" ", $rows->fetch(PDO::FETCH_NUM)), "\n";
