"use strict";
// Drizzle, above pg and its pool.

const { sql } = require("drizzle-orm");
const { drizzle } = require("drizzle-orm/node-postgres");
const { serve } = require("./commands");
const { openPool, withClient } = require("./pg_pool");

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

  open: async (settings) => drizzle(openPool(settings)),
  close: (db) => db.$client.end(),
  query: (db, text, values) => asked(db)(text, values),

  prepared: (db, text, values) => {
    const sum = template(text.replace("select ", ""), values);
    const query = db.select({ sum: sum.mapWith(Number) }).from(sql`(select 1) as one`);
    return query.prepare(text).execute();
  },
  transaction: (db, use) => db.transaction((one) => use(asked(one))),
  withClient: (db, use) => withClient(db.$client, use),
});
