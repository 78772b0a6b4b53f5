// Now: ask for the picture every two seconds while the page is visible and not paused, and show it. Text is set as text,
// never as markup.
"use strict";
const EVERY = 2000; // milliseconds
const KEPT = 120; // values of the small plot
const AWAY = "The gateway does not answer. The page shows the last known state.";
const BUSY = "This page was asked for too often, or the console is busy. The page shows the last known state, and tries again.";
const speeds = [];
const byId = (id) => document.getElementById(id);

function cell(kind, text, className) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells);
  cells[0].scope = "row";
  return made;
}

function engine(it) {
  const name = cell("th", it.name + " ");
  name.append(cell("small", it.dialect));
  const state = cell("td", "");
  state.append(cell("span", it.state, "state state-" + (["ok", "waking", "asleep"].includes(it.state) ? "ok" : "bad")), " " + it.message);
  const slots = cell("td", "");
  const meter = document.createElement("meter");
  const facts = { "aria-label": "Slots in use", min: 0, max: it.slots || 1, value: it.used };
  for (const [name, value] of Object.entries(facts)) meter.setAttribute(name, value);
  slots.append(meter, ` ${it.used} of ${it.slots}`);
  return row(name, state, cell("td", it.models.join(", ")), slots, cell("td", it.waiting, "n"));
}

function request(it) {
  const id = cell("th", "");
  const link = cell("a", it.id);
  link.href = "/console/requests/" + encodeURIComponent(it.id);
  id.append(link);
  const words = [it.name || it.key, it.owner, it.model, it.engine || "–"].map((text) => cell("td", text));
  const numbers = [it.position || it.waits || "–", it.seconds, it.tokens, it.speed].map((text) => cell("td", text, "n"));
  return row(id, ...words, ...numbers);
}

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 999.5 ? `${Number(seconds.toPrecision(3))} s` : `${Math.round(seconds).toLocaleString("en-US")} s`;
}

function none() {
  const made = cell("td", "No request is running.");
  made.colSpan = 9;
  const line = document.createElement("tr");
  line.append(made);
  return line;
}

// What has not changed stays in the page, and with it a selection of its text.
function say(id, text) {
  if (byId(id).textContent !== String(text)) byId(id).textContent = text;
}

// A table that somebody is in by keyboard is left as it is until they leave it.
function fill(id, rows) {
  const body = byId(id);
  if (body.contains(document.activeElement)) return;
  rows.forEach((made, at) => {
    const there = body.rows[at];
    if (!there) return body.append(made);
    if (there.cells.length !== made.cells.length) return there.replaceWith(made);
    [...made.cells].forEach((it, column) => {
      if (!it.isEqualNode(there.cells[column])) there.cells[column].replaceWith(it);
    });
  });
  while (body.rows.length > rows.length) body.rows[rows.length].remove();
}

function show(picture) {
  const values = {
    answered: picture.answered,
    waiting: picture.waiting,
    speed: picture.speed,
    requests: picture.minute.requests,
    failed: picture.five.failed,
    first: duration(picture.five.first_token),
  };
  for (const [id, value] of Object.entries(values)) say(id, value);
  byId("store").hidden = !picture.store;
  say("store", picture.store || "");
  fill("engines", picture.engines.map(engine));
  fill("running", picture.running.length ? picture.running.map(request) : [none()]);
  speeds.push(picture.speed);
  if (speeds.length > KEPT) speeds.shift();
  const most = Math.max(1, ...speeds);
  const points = speeds.map((value, at) => `${(600 * at) / (KEPT - 1)},${58 - (56 * value) / most}`);
  byId("spark").setAttribute("points", points.join(" "));
}

const pause = byId("pause");
const paused = () => pause.getAttribute("aria-pressed") === "true";
pause.hidden = false;
pause.addEventListener("click", () => pause.setAttribute("aria-pressed", String(!paused())));

async function look() {
  if (!document.hidden && !paused()) {
    let why = AWAY;
    try {
      const answer = await fetch("/console/now.json", { headers: { accept: "application/json" } });
      if (answer.status === 401) return location.assign("/console/sign-in");
      if (answer.status === 429 || answer.status === 503) why = BUSY;
      if (!answer.ok) throw new Error(answer.status);
      const picture = await answer.json();
      if (!paused()) show(picture);
      byId("stale").hidden = true;
    } catch {
      say("stale", why);
      byId("stale").hidden = false;
    }
  }
  setTimeout(look, EVERY);
}

look();
