// Asks before a desktop is stopped, and tells when the portal does not answer what the page asks again and again.

document.addEventListener("click", (event) => {
  const dialog = document.getElementById("confirm");
  if (!dialog) return;
  const button = event.target.closest("[data-confirm]");
  if (button) {
    dialog.querySelector("form").action = button.dataset.confirm;
    dialog.querySelector("[data-fill=what]").textContent = button.dataset.what;
    dialog.showModal();
  } else if (event.target.closest("[data-close]")) {
    dialog.close();
  }
});

// A second click on a form that is on its way changes nothing, so it should not look as if it did.
document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || event.target.dataset.sent) {
    event.preventDefault();
    return;
  }
  event.target.dataset.sent = "yes";
  for (const button of event.target.querySelectorAll("button")) button.setAttribute("aria-busy", "true");
});

// A page that comes back out of the browser's memory is old, and so are its forms.
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

// What this file says, in the language of the page.
const words = JSON.parse(document.getElementById("words").textContent);
const offline = document.getElementById("offline");

for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"]) {
  document.addEventListener(name, (event) => {
    const outlook = event.target.closest(".outlook");
    if (outlook) outlook.textContent = words.outlook;
    else offline.hidden = false;
  });
}

// What a screen reader tells by itself: a sentence once it has changed. The place for it must outlive the swapped part.
function say() {
  const [said, sentence] = [document.getElementById("said"), document.querySelector("[data-say]")];
  if (said && sentence && said.textContent !== sentence.textContent) said.textContent = sentence.textContent;
}
say();

// So that a tab in the background tells how far its desktop is.
document.addEventListener("htmx:afterSwap", () => {
  const named = document.querySelector("[data-title]");
  if (named) document.title = named.dataset.title;
  say();
});

// The seconds of the step that is waited for go on here: the portal sends that part of the page anew when more changes.
const COUNTED_S = 60;

setInterval(() => {
  for (const said of document.querySelectorAll("[data-counted]")) {
    said.begun ??= performance.now() - 1000 * Number(said.dataset.counted);
    const seconds = Math.floor((performance.now() - said.begun) / 1000);
    if (seconds < COUNTED_S) said.textContent = `${seconds} s…`;
  }
}, 500);

document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.isError) return;
  offline.hidden = true;
  // What is pressed must not be replaced before it is released: the click would be lost.
  if (!event.detail.target.matches(".outlook") && event.detail.target.querySelector("button:active, a:active, details[open]")) event.detail.shouldSwap = false;
});

// Small pictures of running desktops: a new one replaces the old once it is there, so that nothing flickers.
async function showScreen(image) {
  try {
    const response = await fetch(image.dataset.picture, { headers: { "X-Deskfleet-Unattended": "yes" } });
    if (response.status !== 200) return;
    const next = URL.createObjectURL(await response.blob());
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = next;
    image.hidden = false;
  } catch {
    // The page says elsewhere that the portal does not answer.
  }
}

const SCREEN_MS = 6000;
const SCREEN_SOON_MS = 1200; // what is asked for the first time is there a moment later

function showScreens() {
  if (document.visibilityState === "visible") document.querySelectorAll("img[data-picture]").forEach(showScreen);
}

if (document.querySelector("img[data-picture], [data-pictures]")) {
  showScreens();
  setTimeout(showScreens, SCREEN_SOON_MS);
  setInterval(showScreens, SCREEN_MS);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const field = document.getElementById(button.dataset.copy);
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    button.textContent = words.copied;
  } catch {
    // It stands selected: the person copies it by hand.
  }
});

// Sizes: a list of steps becomes a slider over the same steps, and a named size sets them all.
for (const list of document.querySelectorAll("select[data-slider]")) {
  if (list.options.length < 3) continue;
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: list.options.length - 1 });
  const said = document.createElement("output");
  const show = () => {
    slider.value = list.selectedIndex;
    said.textContent = list.selectedOptions[0].textContent;
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  slider.setAttribute("aria-label", list.name);
  if (list.labels[0]) slider.setAttribute("aria-label", list.labels[0].firstChild.textContent.trim());
  slider.addEventListener("input", () => {
    list.selectedIndex = Number(slider.value);
    show();
  });
  slider.addEventListener("change", () => list.dispatchEvent(new Event("change", { bubbles: true })));
  list.addEventListener("change", show);
  list.hidden = true;
  list.after(slider, said);
  show();
}

for (const button of document.querySelectorAll("[data-preset]")) {
  const size = JSON.parse(button.dataset.preset);
  const form = button.closest("form");
  const same = () => Object.entries(size).every(([name, value]) => form.elements[name].value === String(value));
  const mark = () => { button.ariaPressed = String(same()); };
  button.hidden = false;
  button.addEventListener("click", () => {
    for (const [name, value] of Object.entries(size)) {
      form.elements[name].value = String(value);
      form.elements[name].dispatchEvent(new Event("change", { bubbles: true }));
    }
  });
  form.addEventListener("change", mark);
  mark();
}

// Asked for by a click, as browsers want it; the desktop's own page tells, once it is there and nobody looks at it.
const tell = document.querySelector("[data-notify]");
if (tell && "Notification" in window && Notification.permission === "default") {
  tell.hidden = false;
  tell.addEventListener("click", async () => {
    await Notification.requestPermission();
    tell.hidden = true;
  });
}
