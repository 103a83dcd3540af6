// The desktop's toolbar: keys that a browser keeps to itself, the clipboard, how the picture is shown, typing by touch.

const XK = { // keysyms (X11 keysymdef.h), with the physical key where the guest's layout decides
  altgr: [0xfe03, "AltRight"],
  alt: [0xffe9, "AltLeft"],
  backspace: [0xff08, "Backspace"],
  ctrl: [0xffe3, "ControlLeft"],
  enter: [0xff0d, "Enter"],
  escape: [0xff1b, "Escape"],
  print: [0xff61, "PrintScreen"],
  shift: [0xffe1, "ShiftLeft"],
  super: [0xffeb, "MetaLeft"],
  tab: [0xff09, "Tab"],
};
const MOST_TYPED = 2000;
const MOST_CLIPBOARD = 1 << 20;
const HINT = "deskfleet-hint";
// Where each character stands on the layout that a fresh desktop has (US): its physical key, and whether with Shift.
const US = new Map();
const ROWS = [
  ["Backquote", "`~"], ["Minus", "-_"], ["Equal", "=+"], ["BracketLeft", "[{"], ["BracketRight", "]}"],
  ["Backslash", "\\|"], ["Semicolon", ";:"], ["Quote", "'\""], ["Comma", ",<"], ["Period", ".>"], ["Slash", "/?"],
  ["Space", " "],
];
for (const [code, both] of ROWS) [...both].forEach((character, shift) => US.set(character, [code, shift === 1]));
for (const [index, character] of [..."1234567890"].entries()) {
  US.set(character, [`Digit${character}`, false]);
  US.set("!@#$%^&*()"[index], [`Digit${character}`, true]);
}
for (const letter of "abcdefghijklmnopqrstuvwxyz") {
  US.set(letter, [`Key${letter.toUpperCase()}`, false]);
  US.set(letter.toUpperCase(), [`Key${letter.toUpperCase()}`, true]);
}

const element = (id) => document.getElementById(id);

/**
 * Make the toolbar work. `current` gives the present RFB object or null, `words` are the page's texts.
 * @returns {{ready: (up: boolean) => void, prepare: (rfb: object) => void, received: (text: string) => void}}
 */
export function tools(current, words) {
  const menus = [...document.querySelectorAll("#bar details")];
  const [text, said] = [element("clip-text"), element("clip-said")];
  const held = new Set();

  const press = (rfb, name, down) => rfb.sendKey(XK[name][0], XK[name][1], down);

  function chord(names) {
    const rfb = current();
    if (!rfb) return;
    for (const name of names) press(rfb, name, true);
    for (const name of [...names].reverse()) press(rfb, name, false);
    rfb.focus();
  }

  for (const button of document.querySelectorAll("[data-chord]")) {
    button.addEventListener("click", () => {
      chord(button.dataset.chord.split(" "));
      closeMenus();
    });
  }
  element("keys").addEventListener("click", () => {
    current()?.sendCtrlAltDel();
    closeMenus();
  });
  // Held until it is pressed again: AltGr on a keyboard without one, Super where the system takes it.
  for (const button of document.querySelectorAll("[data-hold]")) {
    button.addEventListener("click", () => {
      const rfb = current();
      if (!rfb) return;
      const name = button.dataset.hold;
      const down = !held.has(name);
      press(rfb, name, down);
      if (down) held.add(name);
      else held.delete(name);
      button.ariaPressed = String(down);
      rfb.focus();
    });
  }

  function letGo() {
    held.clear();
    for (const button of document.querySelectorAll("[data-hold]")) button.ariaPressed = "false";
  }

  function closeMenus(except = null) {
    for (const menu of menus) if (menu !== except) menu.open = false;
    if (!except) current()?.focus();
  }
  for (const menu of menus) {
    menu.addEventListener("toggle", () => { if (menu.open) closeMenus(menu); });
    menu.addEventListener("keydown", (event) => {
      event.stopPropagation(); // what is typed in a menu is not the desktop's
      if (event.key === "Escape") closeMenus();
    });
  }
  element("screen").addEventListener("pointerdown", () => closeMenus(), { capture: true });

  // --- clipboard

  element("clip-send").addEventListener("click", () => {
    const rfb = current();
    if (!rfb) return;
    rfb.clipboardPasteFrom(text.value.slice(0, MOST_CLIPBOARD));
    said.textContent = words.clipSent;
  });
  element("clip-type").addEventListener("click", () => {
    const characters = [...text.value];
    const odd = characters.find((character) => character !== "\n" && character !== "\t" && !US.has(character));
    if (odd !== undefined) {
      said.textContent = words.clipOdd.replace("{character}", odd);
    } else if (characters.length > MOST_TYPED) {
      said.textContent = words.clipLong.replace("{most}", String(MOST_TYPED));
    } else {
      for (const character of characters) typeOne(character);
      said.textContent = words.clipTyped;
    }
  });
  const paste = element("paste");
  paste.addEventListener("click", async () => {
    try {
      text.value = await navigator.clipboard.readText();
      current()?.clipboardPasteFrom(text.value.slice(0, MOST_CLIPBOARD));
      said.textContent = words.clipSent;
    } catch {
      said.textContent = words.clipboard;
    }
  });

  function typeOne(character) {
    const rfb = current();
    if (!rfb) return;
    if (character === "\n") rfb.sendKey(...XK.enter);
    else if (character === "\t") rfb.sendKey(...XK.tab);
    else if (US.has(character)) {
      const [code, shift] = US.get(character);
      if (shift) press(rfb, "shift", true);
      rfb.sendKey(character.codePointAt(0), code);
      if (shift) press(rfb, "shift", false);
    } else {
      // What the guest's own layout makes of it; some take it, others drop it.
      const point = character.codePointAt(0);
      rfb.sendKey(point <= 0xff ? point : 0x01000000 | point, "");
    }
  }

  // --- the picture

  const view = element("view");
  const quality = element("quality");
  function showAs(rfb) {
    rfb.scaleViewport = view.value !== "own";
    rfb.clipViewport = view.value === "own";
    rfb.dragViewport = view.value === "own" && matchMedia("(pointer: coarse)").matches;
    rfb.resizeSession = view.value === "follow";
    [rfb.qualityLevel, rfb.compressionLevel] = { sharp: [9, 2], balanced: [6, 2], slow: [2, 9] }[quality.value];
  }
  for (const choice of [view, quality]) {
    choice.value = localStorage.getItem(`deskfleet-${choice.id}`) ?? choice.value;
    if (choice.selectedIndex < 0) choice.selectedIndex = 0;
    choice.addEventListener("change", () => {
      localStorage.setItem(`deskfleet-${choice.id}`, choice.value);
      const rfb = current();
      if (rfb) showAs(rfb);
    });
  }

  const full = element("full");
  full.addEventListener("click", async () => {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await document.documentElement.requestFullscreen();
    // Chromium then lets us have the keys that the system would take, such as Alt-Tab and Super.
    if (document.fullscreenElement) await navigator.keyboard?.lock?.().catch(() => {});
    current()?.focus();
  });
  document.addEventListener("fullscreenchange", () => { full.ariaPressed = String(Boolean(document.fullscreenElement)); });

  // --- a keyboard on a screen

  const touch = element("touch");
  element("keyboard").addEventListener("click", () => {
    closeMenus();
    touch.focus();
  });
  touch.addEventListener("beforeinput", (event) => {
    event.preventDefault(); // nothing stays in the field, so that the keyboard corrects nothing afterwards
    const rfb = current();
    if (!rfb) return;
    if (event.inputType === "deleteContentBackward") rfb.sendKey(...XK.backspace);
    else if (event.inputType === "insertLineBreak") rfb.sendKey(...XK.enter);
    else for (const character of event.data ?? "") typeOne(character);
  });

  // --- once

  const hint = element("hint");
  if (!localStorage.getItem(HINT)) hint.hidden = false;
  element("hint-close").addEventListener("click", () => {
    localStorage.setItem(HINT, "seen");
    hint.hidden = true;
    current()?.focus();
  });

  return {
    ready(up) {
      for (const button of document.querySelectorAll("[data-up]")) button.disabled = !up;
      paste.disabled = !up || !navigator.clipboard;
      if (!up) letGo();
    },
    prepare: showAs,
    received(from) {
      text.value = from.slice(0, MOST_CLIPBOARD);
      navigator.clipboard?.writeText(from).catch(() => {}); // it stands in the panel
      said.textContent = words.clipCame;
    },
  };
}
