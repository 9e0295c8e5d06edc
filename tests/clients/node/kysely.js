"use strict";
// Kysely, a query builder above pg and its pool.

const { CompiledQuery, Kysely, PostgresDialect, sql } = require("kysely");
const Cursor = require("pg-cursor");
const { serve } = require("./commands");
const { openPool, withClient } = require("./pg_pool");

const pools = new WeakMap();
const asked = (db) => async (text, values) =>
  (await db.executeQuery(CompiledQuery.raw(text, values))).rows;

serve({
  packages: ["kysely", "pg"],

  async open(settings) {
    const pool = openPool(settings);
    const db = new Kysely({ dialect: new PostgresDialect({ pool, cursor: Cursor }) });
    pools.set(db, pool);
    return db;
  },
  close: async (db) => {
    await db.destroy(); // ends the pool only if Kysely has used it
    if (!pools.get(db).ended) await pools.get(db).end();
  },
  query: (db, text, values) => asked(db)(text, values),
  transaction: (db, use) => db.transaction().execute((one) => use(asked(one))),

  async cursor(db, text, portion, take) {
    const numbers = db.selectFrom(sql`(${sql.raw(text)})`.as("numbers")).selectAll();
    for await (const row of numbers.stream(portion)) take([row]);
  },
  withClient: (db, use) => withClient(pools.get(db), use),
});
