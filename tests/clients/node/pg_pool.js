"use strict";
// Opens pg's pool as those do who use it or a library above it.

const { Pool } = require("pg");

const LIFETIME_SECONDS = 2700;

/** Return a pool whose connections may end without ending the process. */
function openPool({ option, ...settings }) {
  const options = option && `-c ${option}`;
  const pool = new Pool({
    ...settings,
    options,
    idleTimeoutMillis: 0,
    maxLifetimeSeconds: LIFETIME_SECONDS,
  });
  pool.on("error", () => {}); // of an idle connection
  pool.on("connect", (client) => client.on("error", () => {})); // of one that waits for its user
  return pool;
}

/** Use one of its connections while a function runs. */
async function withClient(pool, use) {
  const client = await pool.connect();
  try {
    return await use(client);
  } finally {
    client.release();
  }
}

module.exports = { openPool, withClient };
