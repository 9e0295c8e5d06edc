"use strict";
// postgres.js, which has a protocol and a pool of its own.

const postgres = require("postgres");
const { serve } = require("./commands");

serve({
  packages: ["postgres"],

  async open({ option, ...settings }) {
    const [name, value] = option?.split("=") ?? [];
    const connection = option ? { [name]: value } : {};
    return postgres({ ...settings, connection, max_lifetime: 2700, onnotice() {} });
  },
  close: (sql) => sql.end(),
  query: (sql, text, values) => sql.unsafe(text, values),
  prepared: (sql, text, values) => sql.unsafe(text, values, { prepare: true }),
  transaction: (sql, use) => sql.begin((one) => use((text, values) => one.unsafe(text, values))),

  async cursor(sql, text, portion, take) {
    for await (const rows of sql.unsafe(text).cursor(portion)) take(rows);
  },

  async withClient(sql, use) {
    const client = await sql.reserve();
    try {
      return await use(client);
    } finally {
      client.release();
    }
  },
  run: (client, text) => client.unsafe(text),
  copy: {
    in: async (client, text, rows) => {
      const { pipeline } = require("stream/promises");
      await pipeline(rows, await client.unsafe(text).writable());
    },
    out: (client, text) => client.unsafe(text).readable(),
  },

  cancellable: (client, text) => {
    const answered = client.unsafe(text).execute();
    return { answered, cancel: () => answered.cancel() };
  },
});
