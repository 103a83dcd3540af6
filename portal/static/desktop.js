// The desktop in the browser. Where to connect comes from the server alone, with a fresh ticket each time; nothing in
// the page's address is looked at.
import RFB from "./vendor/novnc/core/rfb.js";

const page = document.body.dataset;
const state = document.getElementById("state");
const screen = document.getElementById("screen");
const csrf = document.querySelector('meta[name="csrf-token"]').content;
const PAUSES_MS = [300, 1000, 2000, 4000, 5000];
const QUIET_MS = 4000; // so long without a byte, and the other side is asked for one
const DEAD_MS = 4000; // so long without an answer, and the connection counts as cut
// RFC 6143, 7.5.3: FramebufferUpdateRequest, not incremental, one pixel at 0,0: any live server answers it.
const PROBE = new Uint8Array([3, 0, 0, 0, 0, 0, 0, 1, 0, 1]);

let rfb = null;
let failures = 0;
let fit = true;

function show(name, text) {
  state.dataset.state = name;
  state.textContent = text;
}

function end(text) {
  show("ended", text);
}

async function ticket() {
  const answer = await fetch(page.ticket, { method: "POST", headers: { "X-CSRFToken": csrf }, redirect: "manual" });
  if (answer.status === 401) {
    location.assign(page.login);
    return null;
  }
  const body = await answer.json();
  if (answer.ok) return body;
  if (body.reason === "ended" || body.reason === "no_such_desktop" || body.reason === "stale_form") {
    end(body.message);
    return null;
  }
  throw new Error(body.message);
}

function again(text) {
  const pause = PAUSES_MS[Math.min(failures++, PAUSES_MS.length - 1)];
  show("reconnecting", text || "The connection was lost; trying again …");
  setTimeout(connect, pause);
}

async function connect() {
  let right;
  try {
    right = await ticket();
  } catch (error) {
    return again(error.message);
  }
  if (!right) return undefined;
  const socket = new WebSocket(`${right.console_url}?ticket=${encodeURIComponent(right.ticket)}`, ["binary"]);
  socket.binaryType = "arraybuffer";
  screen.replaceChildren();
  rfb = new RFB(screen, socket);
  rfb.scaleViewport = fit;
  rfb.resizeSession = true;
  let heard = Date.now();
  let asked = 0;
  let up = false;
  socket.addEventListener("message", () => { heard = Date.now(); asked = 0; });
  const watch = setInterval(() => {
    const now = Date.now();
    if (up && asked && now - asked > DEAD_MS) {
      socket.close();
      finish();
    } else if (up && !asked && now - heard > QUIET_MS) {
      asked = now;
      socket.send(PROBE);
    }
  }, 1000);
  let finished = false;
  function finish() {
    if (finished) return;
    finished = true;
    clearInterval(watch);
    again();
  }
  rfb.addEventListener("connect", () => {
    up = true;
    failures = 0;
    show("connected", "Connected");
    rfb.focus();
  });
  rfb.addEventListener("disconnect", finish);
  return undefined;
}

document.getElementById("keys").addEventListener("click", () => { if (rfb) rfb.sendCtrlAltDel(); });
document.getElementById("full").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else document.documentElement.requestFullscreen();
});
document.getElementById("fit").addEventListener("click", (event) => {
  fit = !fit;
  event.target.setAttribute("aria-pressed", String(fit));
  if (rfb) rfb.scaleViewport = fit;
});
connect();
