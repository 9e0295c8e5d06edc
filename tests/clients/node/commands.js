"use strict";
// Reads commands on standard input and answers them, for all of the Node programs.
//
// A program gives a table of functions: how its library opens a pool, asks, and closes. A library
// that stands on pg names the client below it, for what it has no function for.

const { createHash } = require("crypto");
const { createInterface } = require("readline");
const { pipeline } = require("stream/promises");
const { Readable } = require("stream");

const POOL = 20;
const QUERIES = 40;
const AGAIN_MS_MAX = 20000;
const PORTION = 1000;
const NUMBERS = "select n from generate_series(1, 100000) n";
const SHARD = "select name from shard_identity";

const where = {
  host: process.env.PGHOST,
  port: Number(process.env.PGPORT),
  database: process.env.PGDATABASE,
  user: process.env.PGUSER,
};

// In text alone: pg reads each value as text even where it asked for binary.
const VALUES = [
  ["bool", true],
  ["int2", -32768],
  ["int4", 2147483647],
  ["int8", "-9223372036854775808"],
  ["float4", 1.5],
  ["float8", 1e-300],
  ["numeric", "12345678901234567890.123456789"],
  ["text", "it's a \"quote\"\nanother line, \\ ünïcödé ✓ 😀"],
  ["varchar", ""],
  ["bytea", Buffer.from(Array.from({ length: 256 }, (_, n) => n))],
  ["date", "2024-02-29"],
  ["timestamptz", new Date("2024-02-29T12:00:00.123Z")],
  ["interval", "1 year 2 months 3 days 04:05:06.789"],
  ["uuid", "5ca1ab1e-0000-4000-8000-00000000c0de"],
  ["json", { a: [1, null] }],
  ["jsonb", { b: "ü" }],
  ["int4[]", [1, -2, 3]],
  ["text[]", ["a,b", null, "", '"']],
  ["int8", null],
];

/** What a library cannot do by its nature; the message says why. */
class Cannot extends Error {}

/** The server's own error, which many libraries wrap into theirs. */
const original = (error) => error.driverError ?? error.original ?? error.cause ?? error;
const sqlstate = (error) => original(error).code;
const oneLine = (text) => String(text).replace(/\s+/g, " ");
const shown = (value) =>
  Buffer.isBuffer(value) ? value.toString("hex") : JSON.stringify(value);

const versionOf = (name) => require(`${process.env.NODE_PATH}/${name}/package.json`).version;

/** Use a pool of one connection for as long as a function runs. */
async function using(driver, settings, use) {
  const pool = await driver.open({ max: 1, ...where, ...settings });
  try {
    return await use(pool);
  } finally {
    await driver.close(pool);
  }
}

/** Return what something returns, tried for a while: what a pool does not test may fail. */
async function triedAgain(attempt) {
  const deadline = Date.now() + AGAIN_MS_MAX;
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
  }
}

/** Return how many backends twenty transactions have at once. */
async function atOnce(driver, pool) {
  let meet, part;
  const met = new Promise((resolve, reject) => ([meet, part] = [resolve, reject]));
  met.catch(() => {});
  let arrived = 0;
  const pids = Array.from({ length: POOL }, async () => {
    try {
      return await driver.transaction(pool, async (query) => {
        const [{ pid }] = await query("select pg_backend_pid() as pid");
        if (++arrived === POOL) meet();
        await met;
        return pid;
      });
    } catch (error) {
      part(error);
      throw error;
    }
  });
  const settled = await Promise.allSettled(pids);
  for (const one of settled) if (one.status === "rejected") throw one.reason;
  return new Set(settled.map((one) => one.value)).size;
}

/** Read rows by a cursor of SQL, for a library that has none of its own. */
const declared = (driver) => (pool, sql, portion, take) =>
  driver.transaction(pool, async (query) => {
    await query(`declare portions cursor for ${sql}`);
    for (let rows; (rows = await query(`fetch ${portion} from portions`)).length; ) take(rows);
  });

/** Copy rows in and out, with pg's streams. */
const copyWithPg = {
  async in(client, sql, rows) {
    await pipeline(rows, client.query(require("pg-copy-streams").from(sql)));
  },
  out: (client, sql) => client.query(require("pg-copy-streams").to(sql)),
};

/** Run a query of a pg client so that it can be cancelled. */
function cancellableOfPg(client, sql) {
  const { Client, Query } = require("pg");
  const query = new Query(sql);
  const answered = new Promise((resolve, reject) => query.on("end", resolve).on("error", reject));
  client.query(query);
  return { answered, cancel: () => new Client(where).cancel(client, query) };
}

/** Wait until a backend runs pg_sleep, or does not any more. */
async function asleep(driver, pid, yes) {
  const sql = `select 1 from pg_stat_activity where pid = ${pid} and wait_event = 'PgSleep'`;
  const deadline = Date.now() + AGAIN_MS_MAX;
  await using(driver, {}, async (pool) => {
    while ((await driver.query(pool, sql)).length !== (yes ? 1 : 0))
      if (Date.now() > deadline) throw new Error(yes ? "it has not begun" : "it has not ended");
  });
}

/** Cancel a query that has begun, by a library's request or pg's. */
const cancelled = (driver, run) => (pool, asleep) =>
  driver.withClient(pool, async (client) => {
    const [{ pid }] = await run(client, "select pg_backend_pid() as pid");
    const cancellable = driver.cancellable ?? cancellableOfPg;
    const { answered, cancel } = cancellable(client, "select pg_sleep(60)");
    answered.catch(() => {});
    await asleep(pid, true);
    cancel();
    await answered;
  });

/** Return the function of each command. */
function commands(driver) {
  let pool;
  const run = driver.run ?? (async (client, sql) => (await client.query(sql)).rows);
  const ask = async (settings, sql) =>
    using(driver, settings, async (one) => Object.values((await driver.query(one, sql))[0]));

  return {
    version: () => [driver.packages.map((name) => `${name} ${versionOf(name)}`).join(", ")],
    connect: () => ask({}, "select current_database(), 1 as one"),
    key_in_name: (database) => ask({ database }, SHARD),
    key_in_options: (option) => ask({ option }, SHARD),

    types: () =>
      using(driver, {}, async (one) => {
        const lines = [];
        for (const [type, value] of VALUES) {
          const [row] = await driver.query(one, `select $1::${type} as value`, [value]);
          lines.push(`${type} ${shown(row.value)}`);
        }
        return lines;
      }),

    prepared: () =>
      using(driver, {}, async (one) => {
        let count = 0;
        let sum = 0;
        for (let round = 0; round < 2; round++)
          for (let n = 0; n < 300; n++, count++) {
            const sql = `select ${n} + $1::int as sum`;
            sum += (await (driver.prepared ?? driver.query)(one, sql, [1]))[0].sum;
          }
        return [count, sum];
      }),

    cursor: () =>
      using(driver, {}, async (one) => {
        let count = 0;
        let sum = 0;
        const cursor = driver.cursor ?? declared(driver);
        await cursor(one, NUMBERS, PORTION, (rows) => {
          count += rows.length;
          for (const { n } of rows) sum += n;
        });
        return [count, sum];
      }),

    copy: () =>
      using(driver, {}, (one) =>
        driver.withClient(one, async (client) => {
          const { in: copyIn, out: copyOut } = driver.copy ?? copyWithPg;
          const rows = Array.from({ length: 10000 }, (_, n) => `${n}\trow\\t${n}\n`);
          await run(client, "create temp table copied (n int, s text)");
          await copyIn(client, "copy copied from stdin", Readable.from(rows));
          const digest = createHash("sha256");
          let count = 0;
          for await (const part of await copyOut(client, "copy copied to stdout")) {
            digest.update(part);
            count += part.toString().split("\n").length - 1;
          }
          return [count, digest.digest("hex").slice(0, 16)];
        }),
      ),

    rollback: () =>
      using(driver, {}, async (one) => {
        let state;
        await driver.query(one, "create temp table kept (n int primary key)");
        try {
          await driver.transaction(one, async (query) => {
            await query("insert into kept values (1)");
            await query("insert into kept values (1)");
          });
        } catch (error) {
          state = sqlstate(error);
        }
        return [state, (await driver.query(one, "select count(*)::int as n from kept"))[0].n];
      }),

    cancel: () =>
      using(driver, {}, async (one) => {
        let state;
        try {
          const cancel = driver.cancel ?? cancelled(driver, run);
          await cancel(one, (pid, yes) => asleep(driver, pid, yes));
        } catch (error) {
          if (error instanceof Cannot) throw error;
          state = sqlstate(error);
        }
        return [state, (await driver.query(one, "select 1 as one"))[0].one];
      }),

    async pool() {
      pool = await driver.open({ max: POOL, ...where });
      return [await atOnce(driver, pool)];
    },

    async again() {
      const answers = [];
      const asked = Array.from({ length: QUERIES }, (_, n) => n);
      const worker = async () => {
        for (let n; (n = asked.shift()) !== undefined; )
          answers.push(
            (await triedAgain(() => driver.query(pool, "select $1::int as n", [n])))[0].n,
          );
      };
      await Promise.all(Array.from({ length: POOL }, worker));
      const opened = await triedAgain(() => atOnce(driver, pool));
      if (opened !== POOL) throw new Error(`${opened} connections are open`);
      return [new Set(answers).size];
    },

    async refused(database) {
      try {
        await ask({ database }, SHARD);
      } catch (error) {
        const { code, message, hint, detail } = original(error);
        return [
          `SQLSTATE ${code}`,
          `message ${oneLine(message)}`,
          hint ? `hint ${oneLine(hint)}` : "hint not shown",
          detail ? `detail ${oneLine(detail)}` : "detail not shown",
        ];
      }
      return ["it was not refused"];
    },

    async close() {
      await driver.close(pool);
      pool = undefined;
      return ["closed"];
    },

    async end() {
      if (pool) await driver.close(pool);
      return [];
    },
  };
}

/** Answer commands until the input ends. */
async function serve(driver) {
  const table = commands(driver);
  for await (const line of createInterface({ input: process.stdin })) {
    const [name, ...rest] = line.split(" ");
    let lines;
    try {
      lines = await table[name](...rest);
    } catch (error) {
      const reason = error instanceof Cannot ? "cannot:" : `error: ${sqlstate(error)}`;
      lines = [`${reason} ${oneLine(error.message)}`];
    }
    process.stdout.write([...lines, ".", ""].join("\n"));
  }
  await table.end();
}

module.exports = { Cannot, serve };
