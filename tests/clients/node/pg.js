"use strict";
// pg, the driver that most libraries of Node stand on, and its pool.

const { Pool } = require("pg");
const Cursor = require("pg-cursor");
const { serve } = require("./commands");

const withClient = async (pool, use) => {
  const client = await pool.connect();
  try {
    return await use(client);
  } finally {
    client.release();
  }
};
const rows = (result) => result.rows;

serve({
  packages: ["pg", "pg-pool"],

  async open({ option, ...settings }) {
    const options = option && `-c ${option}`;
    const pool = new Pool({ ...settings, options, idleTimeoutMillis: 0, maxLifetimeSeconds: 2700 });
    pool.on("error", () => {}); // else the end of an idle connection ends the process
    return pool;
  },
  close: (pool) => pool.end(),
  query: async (pool, text, values) => rows(await pool.query(text, values)),
  prepared: async (pool, text, values) => rows(await pool.query({ name: text, text, values })),

  transaction: (pool, use) =>
    withClient(pool, async (client) => {
      await client.query("begin");
      try {
        const result = await use(async (text, values) => rows(await client.query(text, values)));
        await client.query("commit");
        return result;
      } catch (error) {
        await client.query("rollback");
        throw error;
      }
    }),

  cursor: (pool, sql, portion, take) =>
    withClient(pool, async (client) => {
      const cursor = client.query(new Cursor(sql));
      for (let rows; (rows = await cursor.read(portion)).length; ) take(rows);
      await cursor.close();
    }),
  withClient,
});
