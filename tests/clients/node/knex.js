"use strict";
// Knex, a query builder with its own pool above pg.

const knex = require("knex");
const { Cannot, serve } = require("./commands");

// Its warnings would be lines of answers.
const log = { warn: console.error, error: console.error };
const asked = (one) => async (text, values) =>
  (await one.raw(text.replace(/\$\d+/g, "?"), values ?? [])).rows;

serve({
  packages: ["knex", "pg"],

  async open({ max, option, ...where }) {
    const connection = { ...where, options: option && `-c ${option}` };
    return knex({ client: "pg", connection, pool: { min: 0, max }, log });
  },
  close: (db) => db.destroy(),
  query: (db, text, values) => asked(db)(text, values),
  transaction: (db, use) => db.transaction((one) => use(asked(one))),

  async cursor(db, sql, portion, take) {
    for await (const row of db.raw(sql).stream({ batchSize: portion })) take([row]);
  },

  async withClient(db, use) {
    const client = await db.client.acquireConnection();
    try {
      return await use(client);
    } finally {
      await db.client.releaseConnection(client);
    }
  },

  async cancel(db, asleep) {
    const [{ pid }] = await asked(db)("select pg_backend_pid() as pid");
    await db
      .raw("select pg_sleep(60)")
      .timeout(500, { cancel: true })
      .catch((error) => {
        if (error.name !== "KnexTimeoutError") throw error;
      });
    await asked(db)("select 1"); // discards the connection of the query that took too long
    await asleep(pid, false);
    throw new Cannot("its user sees a KnexTimeoutError, not 57014; the query has ended");
  },
});
