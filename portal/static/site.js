// Dialogs that ask before a desktop is stopped, and polling that survives a portal that does not answer.

const RETRY_MS = 2000;

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-confirm]");
  const dialog = document.getElementById("confirm");
  if (button && dialog) {
    dialog.querySelector("form").action = button.dataset.confirm;
    dialog.querySelector("[data-fill=what]").textContent = button.dataset.what;
    dialog.showModal();
  } else if (dialog && event.target.closest("[data-close]")) {
    dialog.close();
  }
});

const offline = document.getElementById("offline");

for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"]) {
  document.addEventListener(name, (event) => {
    offline.hidden = false;
    // What asks again by being replaced would fall silent now, since nothing replaced it.
    setTimeout(() => htmx.trigger(event.detail.elt, "again"), RETRY_MS);
  });
}

document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.isError) return;
  offline.hidden = true;
  // A button must not be replaced between press and release: the click would be lost.
  const target = event.detail.target;
  if (target.matches("[data-poll]") && target.querySelector("button:active, a:active")) {
    event.detail.shouldSwap = false;
  }
});
