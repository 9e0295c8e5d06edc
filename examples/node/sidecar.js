// node-postgres and its pool with the sidecar: nothing here is about tokens.
// With an argument it connects to the database of the tenant that has this shard key.
const { Pool } = require("pg");

const database = [process.env.PGDATABASE, ...process.argv.slice(2)].join("@");
// TLS ends at the sidecar, which is on loopback. The rest comes from PGHOST, PGPORT and PGUSER.
const pool = new Pool({ database, ssl: false, max: 10 });

async function main() {
  const { rows } = await pool.query("SELECT current_user, current_database()");
  console.log(rows[0].current_user, rows[0].current_database);
}

main().finally(() => pool.end());
