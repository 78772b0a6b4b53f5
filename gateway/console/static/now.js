// Now: ask for the picture every two seconds while the page is visible, and show it. Text is set as text, never as markup.
"use strict";
const EVERY = 2000; // milliseconds
const KEPT = 120; // values of the small plot
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
  meter.max = it.slots || 1;
  meter.value = it.used;
  slots.append(meter, ` ${it.used} of ${it.slots}`);
  return row(name, state, cell("td", it.models.join(", ")), slots, cell("td", it.waiting, "n"));
}

function request(it) {
  const id = cell("th", "");
  const link = cell("a", it.id);
  link.href = "/console/requests/" + encodeURIComponent(it.id);
  id.append(link);
  const words = [it.name || it.key, it.owner, it.model, it.engine || "–"].map((text) => cell("td", text));
  const numbers = [it.position ?? "–", it.seconds, it.tokens, it.speed].map((text) => cell("td", text, "n"));
  return row(id, ...words, ...numbers);
}

function duration(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toPrecision(3)} s`;
}

function none() {
  const made = cell("td", "No request is running.");
  made.colSpan = 9;
  const line = document.createElement("tr");
  line.append(made);
  return line;
}

// A table that somebody is in by keyboard is left as it is until they leave it.
function fill(id, rows) {
  const body = byId(id);
  if (!body.contains(document.activeElement)) body.replaceChildren(...rows);
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
  for (const [id, value] of Object.entries(values)) byId(id).textContent = value;
  byId("store").hidden = !picture.store;
  byId("store").textContent = picture.store || "";
  fill("engines", picture.engines.map(engine));
  fill("running", picture.running.length ? picture.running.map(request) : [none()]);
  speeds.push(picture.speed);
  if (speeds.length > KEPT) speeds.shift();
  const most = Math.max(1, ...speeds);
  const points = speeds.map((value, at) => `${(600 * at) / (KEPT - 1)},${58 - (56 * value) / most}`);
  byId("spark").setAttribute("points", points.join(" "));
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/console/now.json", { headers: { accept: "application/json" } });
      if (answer.status === 401) return location.assign("/console/sign-in");
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.json());
      byId("stale").hidden = true;
    } catch {
      byId("stale").hidden = false;
    }
  }
  setTimeout(look, EVERY);
}

look();
