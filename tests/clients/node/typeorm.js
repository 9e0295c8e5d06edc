"use strict";
// TypeORM, above pg and its pool.

const { DataSource } = require("typeorm");
const { serve } = require("./commands");

serve({
  packages: ["typeorm", "pg"],

  async open({ max, option, user, ...where }) {
    const extra = { max, options: option && `-c ${option}`, idleTimeoutMillis: 0 };
    return new DataSource({ type: "postgres", ...where, username: user, extra }).initialize();
  },
  close: (source) => source.destroy(),
  query: (source, text, values) => source.query(text, values),
  transaction: (source, use) =>
    source.transaction((manager) => use((text, values) => manager.query(text, values))),

  async cursor(source, sql, portion, take) {
    const runner = source.createQueryRunner();
    for await (const row of await runner.stream(sql)) take([row]);
    await runner.release();
  },

  async withClient(source, use) {
    const runner = source.createQueryRunner();
    try {
      return await use(await runner.connect());
    } finally {
      await runner.release();
    }
  },
});
