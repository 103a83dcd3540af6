// The screen of a desktop: noVNC over a WebSocket that is opened with a fresh ticket each time and reopened by itself.

import RFB from "./vendor/novnc/core/rfb.js";

const PAUSES_S = [0.3, 1, 2, 4, 5]; // before each try in a row; the last one repeats
const OPEN_WITHIN_MS = 15000;
const QUIET_MS = 5000; // without a message for so long, ask for one
const ANSWER_WITHIN_MS = 4000;
// FramebufferUpdateRequest, not incremental, of one pixel: a server must answer it (RFC 6143, 7.5.3).
const PROBE = new Uint8Array([3, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
const FINAL = new Set([400, 403, 404, 422]);

const page = document.body.dataset;
const csrf = document.querySelector("meta[name=csrf-token]").content;
const screen = document.getElementById("screen");
const stateLine = document.getElementById("state");
const message = document.getElementById("message");
const fit = document.getElementById("fit");
const ctrlAltDel = document.getElementById("ctrl-alt-del");

let link = null; // the present connection: {rfb, socket, connected, heardAt, probedAt, openedAt}
let failures = 0;
let over = false;

function show(state, text) {
  stateLine.dataset.state = state;
  stateLine.textContent = text;
  ctrlAltDel.disabled = state !== "connected";
}

function end(text) {
  over = true;
  show("ended", "Ended");
  message.querySelector("p").textContent = text;
  message.hidden = false;
}

function again(text) {
  if (over) return;
  const pause = PAUSES_S[Math.min(failures, PAUSES_S.length - 1)];
  failures += 1;
  show("reconnecting", text);
  setTimeout(connect, pause * 1000);
}

/** A fresh ticket; null when there is none, and what follows from that was begun. */
async function fetchTicket() {
  let response;
  let body;
  try {
    response = await fetch(page.ticketUrl, {
      method: "POST",
      headers: { "X-CSRFToken": csrf, Accept: "application/json" },
      signal: AbortSignal.timeout(OPEN_WITHIN_MS),
    });
    body = await response.json();
  } catch {
    again("The portal does not answer; trying again…");
    return null;
  }
  if (response.ok) return body;
  if (response.status === 401) {
    over = true;
    location.assign(page.loginUrl);
  } else if (body.reason === "ended" || FINAL.has(response.status)) {
    end(body.message);
  } else {
    again(body.message);
  }
  return null;
}

async function connect() {
  const ticket = await fetchTicket();
  if (!ticket) return;
  // Opened here and not by noVNC, so that a connection that was cut silently can be noticed and dropped.
  const socket = new WebSocket(`${ticket.console_url}?ticket=${encodeURIComponent(ticket.ticket)}`, ["binary"]);
  const rfb = new RFB(screen, socket);
  const now = performance.now();
  const mine = { rfb, socket, connected: false, openedAt: now, heardAt: now, probedAt: null };
  link = mine;
  rfb.scaleViewport = fit.getAttribute("aria-pressed") === "true";
  rfb.resizeSession = true;
  rfb.focusOnClick = true;
  socket.addEventListener("message", () => {
    mine.heardAt = performance.now();
    mine.probedAt = null;
  });
  rfb.addEventListener("connect", () => {
    if (link !== mine) return;
    mine.connected = true;
    failures = 0;
    show("connected", "Connected");
    rfb.focus();
  });
  rfb.addEventListener("disconnect", () => drop(mine));
}

/** Give a connection up and try for a new one; events of one that was given up before change nothing. */
function drop(which) {
  if (link !== which) return;
  link = null;
  again(which.connected ? "The connection was lost; connecting again…" : "No connection yet; trying again…");
}

function cut(which) {
  drop(which); // first: closing a dead connection takes long, and nobody should wait for it
  which.rfb.disconnect();
}

function watch() {
  if (!link || document.visibilityState !== "visible") return;
  const now = performance.now();
  if (!link.connected) {
    if (now - link.openedAt > OPEN_WITHIN_MS) cut(link);
  } else if (link.probedAt !== null) {
    if (now - link.probedAt > ANSWER_WITHIN_MS) cut(link);
  } else if (now - link.heardAt > QUIET_MS && link.socket.readyState === WebSocket.OPEN) {
    link.socket.send(PROBE);
    link.probedAt = now;
  }
}

fit.addEventListener("click", () => {
  const scaled = fit.getAttribute("aria-pressed") !== "true";
  fit.setAttribute("aria-pressed", String(scaled));
  fit.textContent = scaled ? "Fit" : "100 %";
  if (link) {
    link.rfb.scaleViewport = scaled;
    link.rfb.focus();
  }
});

ctrlAltDel.addEventListener("click", () => {
  if (!link) return;
  link.rfb.sendCtrlAltDel();
  link.rfb.focus();
});

document.getElementById("full-screen").addEventListener("click", async () => {
  if (document.fullscreenElement) await document.exitFullscreen();
  else await document.documentElement.requestFullscreen();
  if (link) link.rfb.focus();
});

setInterval(watch, 1000);
connect();
