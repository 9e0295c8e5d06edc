"use strict";
// Drizzle, above pg and its pool.

const { sql } = require("drizzle-orm");
const { drizzle } = require("drizzle-orm/node-postgres");
const { Pool } = require("pg");
const { serve } = require("./commands");

/** A text with $1, $2, ... as Drizzle's template. */
const template = (text, values) =>
  sql.join(
    text
      .split(/\$(\d+)/)
      .map((part, n) => (n % 2 ? sql.param(values[part - 1]) : sql.raw(part))),
  );
const asked = (db) => async (text, values) => (await db.execute(template(text, values))).rows;

serve({
  packages: ["drizzle-orm", "pg"],

  async open({ option, ...settings }) {
    const pool = new Pool({ ...settings, options: option && `-c ${option}`, idleTimeoutMillis: 0 });
    pool.on("error", () => {}); // else the end of an idle connection ends the process
    return drizzle(pool);
  },
  close: (db) => db.$client.end(),
  query: (db, text, values) => asked(db)(text, values),

  prepared: (db, text, values) => {
    const sum = template(text.replace("select ", ""), values);
    const query = db.select({ sum: sum.mapWith(Number) }).from(sql`(select 1) as one`);
    return query.prepare(text).execute();
  },
  transaction: (db, use) => db.transaction((one) => use(asked(one))),

  async withClient(db, use) {
    const client = await db.$client.connect();
    try {
      return await use(client);
    } finally {
      client.release();
    }
  },
});
