# pg with the sidecar: nothing here is about tokens.
# With an argument it connects to the database of the tenant that has this shard key.
require "pg"

# TLS ends at the sidecar, which is on loopback. The rest comes from PGHOST, PGPORT and PGUSER.
connection = PG.connect(dbname: [ENV.fetch("PGDATABASE"), *ARGV].join("@"), sslmode: "disable")
puts connection.exec("SELECT current_user, current_database()").values.first.join(" ")
connection.close
