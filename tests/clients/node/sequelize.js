"use strict";
// Sequelize, an object-relational mapper with its own pool above pg.

const { QueryTypes, Sequelize } = require("sequelize");
const { serve } = require("./commands");

const asked =
  (db, transaction) =>
  async (text, bind) => {
    const type = /^(select|fetch)/.test(text) ? QueryTypes.SELECT : QueryTypes.RAW;
    return db.query(text, { bind, transaction, type });
  };

serve({
  packages: ["sequelize", "pg"],

  async open({ max, option, user, ...where }) {
    return new Sequelize({
      dialect: "postgres",
      ...where,
      username: user,
      pool: { max, min: 0, idle: 60000 },
      dialectOptions: { options: option && `-c ${option}` },
      logging: false,
    });
  },
  close: (db) => db.close(),
  query: (db, text, values) => asked(db)(text, values),
  transaction: (db, use) => db.transaction((transaction) => use(asked(db, transaction))),

  async withClient(db, use) {
    const client = await db.connectionManager.getConnection();
    try {
      return await use(client);
    } finally {
      db.connectionManager.releaseConnection(client);
    }
  },
});
