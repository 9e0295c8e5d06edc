"use strict";
// pg, the driver that most libraries of Node stand on, and its pool.

const Cursor = require("pg-cursor");
const { serve } = require("./commands");
const { openPool, withClient } = require("./pg_pool");

const rows = (result) => result.rows;

serve({
  packages: ["pg", "pg-pool"],

  open: async (settings) => openPool(settings),
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
