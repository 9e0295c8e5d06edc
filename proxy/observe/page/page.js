"use strict";
// Shows /status, /history and /sessions. Text from the proxy goes into the page as text only, never
// as markup. What has not changed is not written again, so that focus and selection stay.
const REFRESH_MS = 2000;
const ANSWER_MS_MAX = 5000;
const SESSIONS_MAX = 50;
const ERRORS_MAX = 4;
const MINUTE = 60;
const PHASES = ["mint", "dns", "tcp", "tls", "login"];
const LEVELS = { well: "The proxy is well.", warning: "Something is wrong: ", bad: "The proxy fails: " };

const $ = (id) => document.getElementById(id);

// -- words -----------------------------------------------------------------------------------------

function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [d, h, m, s] = [whole / 86400, whole / 3600 % 24, whole / 60 % 60, whole % 60].map(Math.floor);
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 0 : 1)} s`;
  return `${(seconds * 1000).toFixed(seconds >= 0.01 ? 0 : 1)} ms`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) { count /= 1000; power += 1; }
  return `${power && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[power]}`;
}

const number = (count) => Math.round(count).toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");

// -- elements --------------------------------------------------------------------------------------

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function set(node, text, className) {
  if (node.textContent !== String(text)) node.textContent = text;
  if (className !== undefined && node.className !== className) node.className = className;
}

// Replace children by others unless they are equal.
function put(parent, ...children) {
  const made = element(parent.localName, "", ...children).childNodes;
  const same = made.length === parent.childNodes.length
    && [...made].every((node, at) => node.isEqualNode(parent.childNodes[at]));
  if (!same) parent.replaceChildren(...made);
}

function linked(href, text) {
  const link = element("a", "", text);
  link.setAttribute("href", href);
  return link;
}

// The row of each name: made once, then changed in place, so that it keeps the focus.
function rows(parent, items, nameOf, make, update) {
  const before = new Map([...parent.children].map((row) => [row.dataset.name, row]));
  items.forEach((item, at) => {
    let row = before.get(nameOf(item));
    if (!row) { row = make(item); row.dataset.name = nameOf(item); }
    before.delete(nameOf(item));
    update(row, item);
    if (parent.children[at] !== row) parent.insertBefore(row, parent.children[at] ?? null);
  });
  for (const row of before.values()) row.remove();
}

// -- the first sentence, and errors ----------------------------------------------------------------

const reasonLink = (error) => error.documented === false || !error.sqlstate
  ? element("code", "", error.reason) : linked(`reasons#${error.reason}`, error.reason);

function showHealth(status) {
  const { level, text, since, reason, documented } = status.health;
  const error = status.errors.find((each) => each.reason === reason);
  document.querySelector("header").dataset.level = level;
  set($("health"), text);
  set($("told"), LEVELS[level] + (level === "well" ? "" : reason || status.state));
  document.title = `${level === "well" ? "" : `${level}: `}lakebase-auth-proxy`;
  const parts = [];
  if (since) parts.push(`Since ${clock(since)}, for ${duration((Date.parse(status.at) - Date.parse(since)) / 1000)}. `);
  if (reason) parts.push("What to do: ", documented ? linked(`reasons#${reason}`, reason) : element("code", "", reason));
  const advice = error && (error.hint || error.message);
  if (advice) parts.push(`. ${advice}`);
  put($("advice"), ...parts);
  $("advice").hidden = !parts.length;
}

// Errors of one reason, at whatever targets, as one.
function byReason(errors) {
  const groups = new Map();
  for (const error of errors) {
    const group = groups.get(error.reason);
    if (!group) groups.set(error.reason, { ...error, targets: error.target ? [error.target] : [] });
    else {
      group.count += error.count;
      group.since = group.since < error.since ? group.since : error.since;
      if (error.target) group.targets.push(error.target);
    }
  }
  return [...groups.values()];
}

function errorRow(error, lastMinute) {
  const recent = lastMinute[error.reason];
  let counts = plural(error.count, "time");
  if (recent) counts += recent === error.count ? " in the last minute" : `, ${number(recent)} in the last minute`;
  const where = error.targets.slice(0, 4).join(", ") + (error.targets.length > 4 ? ` and ${error.targets.length - 4} more` : "");
  return element("li", "",
    element("p", "line", element("b", recent ? "bad" : "", reasonLink(error)),
      element("span", "", counts),
      where ? element("span", "", where) : null,
      error.sqlstate ? element("code", "quiet", error.sqlstate) : null,
      element("span", "quiet", error.count > 1 ? `since ${clock(error.since)}, last ${duration(error.age_seconds)} ago` : `${duration(error.age_seconds)} ago`)),
    element("p", "quiet", [error.message, error.hint].filter(Boolean).map((text) => text.charAt(0).toUpperCase() + text.slice(1)).join(". ")));
}

function showErrors(status) {
  const recent = (error) => status.last_minute.errors[error.reason] || 0;
  const errors = byReason(status.errors).sort((a, b) => recent(b) - recent(a)).map((error) => errorRow(error, status.last_minute.errors));
  const older = errors.splice(ERRORS_MAX);
  $("failing").hidden = !errors.length;
  put($("errors"), ...errors);
  $("older").hidden = !older.length;
  set($("older").firstElementChild, `${plural(older.length, "older error")}`);
  put($("older-errors"), ...older);
}

// -- strips ----------------------------------------------------------------------------------------

// Of each strip: its name, its unit, and of each line its series, its name and its class.
const STRIPS = [
  ["Sessions", number, ["sessions", "", ""]],
  ["A minute", number, ["connects", "connects", ""], ["refusals", "refusals", "bad"]],
  ["Connect", milliseconds, ["connect_p50_seconds", "p50", ""], ["connect_p99_seconds", "p99", "second"]],
  ["Token age", duration, ["token_age_seconds", "", ""]],
  ["Bytes a second", bytes, ["client_bytes", "sent", ""], ["upstream_bytes", "received", "second"]],
];
const WIDTH = 90;
const HEIGHT = 40;

// A line with gaps where nothing is known; one point alone is a dot.
function path(series, highest, className) {
  let drawn = "";
  let joined = false;
  series.forEach((value, at) => {
    if (value === null) { joined = false; return; }
    const place = `${WIDTH - series.length + at + 0.5} ${(HEIGHT - 2 - value / highest * (HEIGHT - 4)).toFixed(1)}`;
    drawn += joined ? `L${place}` : `M${place}h0.01`;
    joined = true;
  });
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  made.setAttribute("d", drawn);
  if (className) made.setAttribute("class", className);
  return made;
}

function strip(history, [title, unit, ...lines]) {
  const known = lines.flatMap(([name]) => history[name].filter((value) => value !== null));
  const highest = Math.max(...known, 0);
  const now = (name) => history[name].at(-1) ?? null;
  const shown = (name) => now(name) === null ? "–" : unit(now(name));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const words = lines.map(([name, word]) => `${word} ${shown(name)}`.trim());
  const tooltip = document.createElementNS("http://www.w3.org/2000/svg", "title");
  tooltip.textContent = `${title}: ${words.join(", ")}; at most ${unit(highest)} in 15 minutes`;
  svg.append(tooltip, ...lines.map(([name, , className]) => path(history[name], highest || 1, className)));
  return element("figure", "", element("figcaption", "",
    element("span", "", title, element("small", "", highest ? `up to ${unit(highest)}` : "")),
    element("span", "", ...lines.map(([name, word, className]) => element("span", word ? `key ${className}` : "",
      word ? `${word} ` : "", element("b", "", shown(name)))))), svg);
}

const showHistory = (history) => put($("strips"), ...STRIPS.map((each) => strip(history, each)));

// -- targets ---------------------------------------------------------------------------------------

const TARGET_STATES = { failing: "bad", waiting: "warn", serving: "good", idle: "quiet" };
const opened = new Set();

function poolText(pool) {
  return `Pool (${pool.mode}): ${pool.in_use} in use, ${pool.idle} idle, ${pool.waiting} waiting, ${pool.resetting} resetting, `
    + `${pool.dialling} dialling, bound ${pool.size_max || "none"}; ${plural(pool.keys, "key")}; reused ${number(pool.reused)}, dialled ${number(pool.dialled)}`
    + (pool.oldest_seconds ? `; oldest ${duration(pool.oldest_seconds)}` : "")
    + (pool.last_retired ? `; last closed for ${pool.last_retired}` : "");
}

function targetDetail(target) {
  const phases = PHASES.filter((phase) => phase in target.connect_seconds);
  const took = (phase) => target.connect_seconds[phase];
  const total = phases.reduce((sum, phase) => sum + took(phase), 0);
  const bar = element("div", "bar", ...phases.map((phase) => element("i", "")));
  bar.setAttribute("aria-hidden", "true");
  phases.forEach((phase, at) => { bar.children[at].style.flexGrow = String(took(phase) / (total || 1)); });
  return [
    element("p", "", target.host || "host not looked up yet"),
    element("p", "quiet", `${plural(target.sessions_started, "session")} since the start; ${bytes(target.client_bytes)} to the upstream, ${bytes(target.upstream_bytes)} to clients`),
    ...(phases.length ? [element("p", "", `Last connect ${milliseconds(total)}: ${phases.map((phase) => `${phase} ${milliseconds(took(phase))}`).join(", ")}`), bar] : [element("p", "quiet", "No connect yet.")]),
    ...(target.pool ? [element("p", "", poolText(target.pool))] : []),
    ...(target.error ? [element("p", "", `${target.error.message || target.error.reason}. ${target.error.hint}`)] : []),
  ];
}

function targetState({ error, pool, sessions }) {
  if (error && error.age_seconds < MINUTE) return "failing";
  if (pool && pool.waiting) return "waiting";
  return sessions ? "serving" : "idle";
}

function targetRow(item) {
  if (item.detail) {
    const cell = element("td", "");
    cell.colSpan = 5;
    return element("tr", "detail", cell);
  }
  const button = element("button", "", item.name);
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    if (!opened.delete(item.name)) opened.add(item.name);
    showTargets(shown);
  });
  const name = element("th", "", button);
  name.scope = "row";
  return element("tr", "", name, element("td", ""), element("td", "n"), element("td", "n"), element("td", ""));
}

function updateTarget(row, target) {
  if (target.detail) { put(row.firstElementChild, ...targetDetail(target)); return; }
  const [name, state, sessions, p50, last] = row.children;
  const { error } = target;
  name.firstElementChild.setAttribute("aria-expanded", String(opened.has(target.name)));
  set(state, target.state, TARGET_STATES[target.state]);
  set(sessions, number(target.sessions));
  set(p50, milliseconds(target.connect_p50_seconds));
  set(last, error ? `${error.reason}, ${duration(error.age_seconds)} ago` : "", target.state === "failing" ? "bad" : "quiet");
}

function showTargets(status) {
  const targets = status.targets.map((target) => {
    const error = status.errors.find((each) => each.target === target.name);
    const pool = status.pools.find((each) => each.target === target.name);
    return { ...target, error, pool, state: targetState({ ...target, error, pool }) };
  });
  targets.sort((a, b) => (b.state === "failing") - (a.state === "failing"));
  const items = targets.flatMap((target) => opened.has(target.name) ? [target, { ...target, detail: true }] : [target]);
  rows($("targets"), items, (item) => `${item.detail ? "detail" : "target"} ${item.name}`, targetRow, updateTarget);
  set($("h-targets"), targets.length > 1 ? `${targets.length} targets` : "Targets");
}

// -- sessions --------------------------------------------------------------------------------------

function sessionCells(session) {
  const state = session.waits_for ? `${session.state} for ${session.waits_for}` : session.state;
  const since = session.state_seconds === null ? "" : `, ${duration(session.state_seconds)}`;
  return [session.client || "unix socket", session.application_name, session.user, session.database, session.target,
    state + since, duration(session.age_seconds), bytes(session.client_bytes), bytes(session.upstream_bytes)];
}

function showSessions(page) {
  const some = page !== null && page.sessions.length > 0;
  $("sessions-table").hidden = !some;
  const note = page === null ? "Shown to programs on the proxy's own machine only."
    : !some ? "No client is connected."
      : page.next === null ? "" : `${page.sessions.length} of ${number(page.total)}; all: lakebase-auth-proxy status --sessions`;
  set($("sessions-note"), note);
  $("sessions-note").hidden = !note;
  rows($("sessions"), some ? page.sessions : [], (session) => String(session.id),
    () => element("tr", "", ...Array.from({ length: 9 }, (_, at) => element("td", at > 5 ? "n" : ""))),
    (row, session) => sessionCells(session).forEach((text, at) => set(row.children[at], text)));
}

// -- facts -----------------------------------------------------------------------------------------

function mapText(map) {
  const facts = [`${map.name} (${map.source}, ${map.state}): ${number(map.mappings)} mappings of ${map.key_type || "unknown"} keys in ${plural(map.shards, "shard")}`];
  if (map.version !== null) facts.push(`version ${map.version}`);
  if (map.feed !== null) facts.push(`feed ${map.feed}`);
  if (map.age_seconds) facts.push(`current ${duration(map.age_seconds)} ago`);
  if (map.parked) facts.push(`${map.parked} parked`);
  if (map.validate === false) facts.push("not validated");
  return facts.join(", ");
}

function tokenText(token) {
  const left = token.expires_in_seconds;
  return `minted ${duration(token.age_seconds)} ago, ${left < 0 ? `expired ${duration(-left)} ago` : `expires in ${duration(left)}`}`
    + `, used up to an age of ${duration(token.accepted_age_seconds)}`;
}

function reloadText({ reloaded_at: at, result }) {
  return at === null ? "not since the start" : `${result} at ${clock(at)}`;
}

function showFacts(status) {
  const { workers, workers_serving: serving, roles, configuration } = status.facts;
  const opening = status.sessions_opening ? `, ${status.sessions_opening} opening` : "";
  const facts = [
    ["Identity", roles.map((role) => role === "*" ? "each client's own user" : role).join(", ") || "not looked up yet"],
    ["Sessions", `${number(status.sessions)} of ${number(status.sessions_max)}${opening}`],
    ["Listening on", status.listen || "nothing yet"],
    ["Up for", duration(status.uptime_seconds)],
    ["Workers", workers > 1 ? `${serving} of ${workers} serve` : "one process"],
    ["Compiled relay", status.acceleration],
    ["Configuration", configuration.file || "environment and flags, no file"],
    ["Last reload", reloadText(configuration)],
    ...(status.tokens.length ? status.tokens.map((token) => [`Token of ${token.workspace}`, tokenText(token)]) : [["Token", "none minted yet"]]),
    ...(status.shard_map ? [["Shard map", mapText(status.shard_map)]] : []),
  ];
  put($("facts"), ...facts.map(([name, text]) => element("div", "", element("dt", "", name), element("dd", "", text))));
}

// -- refreshing ------------------------------------------------------------------------------------

let shown = null;
let refreshedAt = null;
let historyAt = -Infinity;
let timer = null;
let asking = false;

function show(status) {
  shown = status;
  showHealth(status);
  set($("version"), status.version);
  set($("state"), status.state);
  $("warnings").hidden = !status.warnings.length;
  put($("warnings"), ...status.warnings.map((text) => element("li", "", text)));
  showErrors(status);
  showTargets(status);
  showFacts(status);
}

async function ask(path) {
  return fetch(path, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS_MAX) });
}

async function answer(path) {
  const response = await ask(path);
  if (!response.ok) throw new Error(String(response.status));
  return response.json();
}

async function askAll() {
  show(await answer("status"));
  const sessions = await ask(`sessions?limit=${SESSIONS_MAX}`);
  showSessions(sessions.ok ? await sessions.json() : null);
  if (performance.now() - historyAt < 5 * REFRESH_MS) return;
  showHistory(await answer("history"));
  historyAt = performance.now();
}

function gone() {
  document.body.classList.add("stale");
  document.querySelector("header").dataset.level = "bad";
  document.title = "no answer: lakebase-auth-proxy";
  set($("state"), "no answer");
  const text = refreshedAt === null ? "The proxy does not answer."
    : `The proxy does not answer. What you see is from ${clock(refreshedAt)}.`;
  set($("health"), text);
  set($("told"), text);
  $("advice").hidden = true;
  set($("refreshed"), "Trying again.");
}

async function refresh() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  try {
    await askAll();
    refreshedAt = Date.now();
    document.body.classList.remove("stale");
    set($("refreshed"), `Refreshed ${clock(refreshedAt)}, every ${REFRESH_MS / 1000} s.`);
  } catch {
    gone();
  }
  asking = false;
  if (!document.hidden) timer = setTimeout(refresh, REFRESH_MS);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else refresh();
});
refresh();
