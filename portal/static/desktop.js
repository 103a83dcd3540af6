// The screen of a desktop: noVNC over a WebSocket that is opened with a fresh ticket each time, and reopened by itself.
// Where to connect comes from the server alone; nothing in the page's own address is looked at.

import RFB from "./vendor/novnc/core/rfb.js";
import { tools } from "./desktop-tools.js";

const PAUSES_MS = [300, 1000, 2000, 4000, 5000]; // before each try in a row; the last one repeats
const OPEN_WITHIN_MS = 15000;
// A cut that nobody tells us of is noticed within QUIET + ANSWER + one TICK, 9 s.
const TICK_MS = 1000;
const QUIET_MS = 4000; // without a message for so long, ask for one
const ANSWER_MS = 4000;
// RFC 6143, 7.5.3: FramebufferUpdateRequest, not incremental, one pixel at 0,0. A living server must answer it.
const PROBE = new Uint8Array([3, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
const NAME_CHARACTERS = 60;
const WARN_MINUTES = 30;
const SOON_MINUTES = 5;
const ASK_TIME_MS = 60000;

const page = document.body.dataset;
const csrf = document.querySelector("meta[name=csrf-token]").content;
const element = (id) => document.getElementById(id);
// What this file says, in the language of the page; the portal's answers come in it when it is named.
const words = JSON.parse(element("words").textContent);
const asking = { Accept: "application/json", [page.languageHeader]: page.language };
const [screen, stateLine, nameLine, message] = ["screen", "state", "name", "message"].map(element);

let link = null; // the present connection: {rfb, socket, up, openedAt, heardAt, askedAt}
let failures = 0;
let timer = null;
let over = false;
let greeted = false;
const bar = tools(() => (link?.up ? link.rfb : null), words);

function show(state, text) {
  stateLine.dataset.state = state;
  stateLine.textContent = text;
  const up = state === "connected";
  bar.ready(up);
  screen.classList.toggle("stale", !up);
  document.title = `${up ? words.ready : text} · ${page.title}`;
}

/** Tell a person who looks at something else, if they allowed it. */
function tell(text) {
  if (document.visibilityState === "visible" || !("Notification" in window) || Notification.permission !== "granted") return;
  const told = new Notification(page.title, { body: text, tag: page.ticket });
  told.addEventListener("click", () => window.focus());
}

function end(text) {
  over = true;
  show("ended", words.ended);
  message.querySelector("p").textContent = text;
  message.hidden = false;
}

function again(text) {
  if (over || link) return;
  show("reconnecting", text);
  clearTimeout(timer);
  timer = setTimeout(connect, PAUSES_MS[Math.min(failures, PAUSES_MS.length - 1)]);
  failures += 1;
}

/** A fresh ticket; null when there is none, and what follows from that was begun. */
async function fetchTicket() {
  let response;
  let body;
  try {
    response = await fetch(page.ticket, {
      method: "POST",
      headers: { ...asking, "X-CSRFToken": csrf },
      signal: AbortSignal.timeout(OPEN_WITHIN_MS),
    });
    body = await response.json();
  } catch {
    again(words.silentTrying);
    return null;
  }
  if (response.ok) return body;
  if (response.status === 401) {
    over = true;
    location.assign(page.login);
  } else if (response.status >= 500 || response.status === 429 || body.reason === "not_running") {
    again(body.message);
  } else {
    end(body.message);
  }
  return null;
}

async function connect() {
  clearTimeout(timer);
  const right = await fetchTicket();
  if (!right || link) return;
  // Opened here and not by noVNC, so that a silent cut can be noticed and the connection dropped.
  const socket = new WebSocket(`${right.console_url}?ticket=${encodeURIComponent(right.ticket)}`, ["binary"]);
  screen.replaceChildren();
  const rfb = new RFB(screen, socket);
  const now = performance.now();
  const mine = { rfb, socket, up: false, openedAt: now, heardAt: now, askedAt: null };
  link = mine;
  bar.prepare(rfb);
  socket.addEventListener("message", () => {
    mine.heardAt = performance.now();
    mine.askedAt = null;
  });
  rfb.addEventListener("connect", () => {
    if (link !== mine) return;
    mine.up = true;
    if (!greeted) tell(words.readyNow);
    greeted = true;
    failures = 0;
    show("connected", words.connected);
    rfb.focus();
  });
  // The guest chooses this text: it is shown, never more.
  rfb.addEventListener("desktopname", (event) => { nameLine.textContent = event.detail.name.slice(0, NAME_CHARACTERS); });
  rfb.addEventListener("clipboard", (event) => bar.received(event.detail.text));
  rfb.addEventListener("disconnect", () => drop(mine));
}

/** Give a connection up and try for a new one; what a dropped one still says changes nothing. */
function drop(which) {
  if (link !== which) return;
  link = null;
  again(which.up ? words.again : words.notYet);
}

function cut(which) {
  drop(which); // first: closing a dead connection takes long, and nobody should wait for it
  which.rfb.disconnect();
}

function watch() {
  if (!link) return;
  const now = performance.now();
  if (!link.up) {
    if (now - link.openedAt > OPEN_WITHIN_MS) cut(link);
  } else if (link.askedAt !== null) {
    if (now - link.askedAt > ANSWER_MS) cut(link);
  } else if (now - link.heardAt > QUIET_MS && link.socket.readyState === WebSocket.OPEN) {
    link.socket.send(PROBE);
    link.askedAt = now;
  }
}

// Back on the network, or looked at again: no reason to sit out the pause.
function hurry() {
  if (!over && !link && document.visibilityState === "visible") connect();
}
window.addEventListener("online", hurry);
document.addEventListener("visibilitychange", hurry);

// The end is said in time to save one's work: from 30 minutes on, urgently from 5.
const ending = element("ending");
const [endingText, longer] = [ending.querySelector("span"), ending.querySelector("button")];
let endsAt = null; // by this page's own clock
let warned = Infinity; // the last warning that was told, in minutes before the end

// A desktop that somebody works at keeps its login alive; one that is only open does not.
let touched = true;
for (const name of ["keydown", "pointerdown", "pointermove", "wheel"]) {
  window.addEventListener(name, () => { touched = true; }, { capture: true, passive: true });
}

async function askTime() {
  if (over) return;
  const headers = touched ? asking : { ...asking, "X-Deskfleet-Unattended": "yes" };
  touched = false;
  try {
    const response = await fetch(page.session, { headers });
    const left = response.ok ? (await response.json()).time_left_s : null;
    endsAt = left === null ? null : performance.now() + left * 1000;
  } catch {
    // What was known last still holds.
  }
  showTime();
}

function showTime() {
  const minutes = endsAt === null ? Infinity : (endsAt - performance.now()) / 60000;
  ending.hidden = over || minutes > WARN_MINUTES;
  const step = [SOON_MINUTES, WARN_MINUTES].find((limit) => minutes <= limit) ?? Infinity;
  if (step < warned) tell(words.ending.replace("{minutes}", String(Math.max(1, Math.round(minutes)))));
  warned = step;
  ending.toggleAttribute("data-soon", minutes <= SOON_MINUTES);
  const text = words.ending.replace("{minutes}", String(Math.max(1, Math.round(minutes))));
  if (!ending.hidden && endingText.textContent !== text) endingText.textContent = text;
}

longer.addEventListener("click", async () => {
  longer.disabled = true;
  try {
    const response = await fetch(page.extend, {
      method: "POST",
      headers: { ...asking, "X-CSRFToken": csrf, "Content-Type": "application/json" },
      body: JSON.stringify({ extra_s: Number(page.extra) }),
    });
    if (!response.ok) endingText.textContent = (await response.json()).message;
    else for (const pause of [1000, 3000, 10000]) setTimeout(askTime, pause); // until the scheduler has taken it up
  } catch {
    endingText.textContent = words.silent;
  }
  longer.disabled = false;
  link?.rfb.focus();
});

setInterval(askTime, ASK_TIME_MS);
setInterval(showTime, 15000);
askTime();
setInterval(watch, TICK_MS);
connect();
