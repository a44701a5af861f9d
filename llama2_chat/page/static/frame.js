// The frame of the page: bars, theme, and what a phone's keyboard leaves. It stands before Gradio's own, which holds the
// settings once it is there. How its two sides open and close is in sides.js.

import { h, icon } from "./dialog.js";
import { keep, kept } from "./kept.js";
import { showShortcuts } from "./keys.js";
import { Sides } from "./sides.js";
import { T } from "./texts.js";

const THEME = "llama2-chat.theme";
const RESPONSIBLE_USE = "https://ai.meta.com/llama/responsible-use-guide/";
const ICONS = {
  sidebar: "M4 6h16 M4 12h16 M4 18h16",
  newChat: "M12 5v14 M5 12h14",
  theme: "M12 4a8 8 0 1 0 8 8 6 6 0 0 1-8-8z",
  settings: "M5 8h8 M17 8h2 M15 6v4 M5 16h2 M11 16h8 M9 14v4",
  help: "M9.5 9.5a2.5 2.5 0 1 1 3.5 2.3c-.7.4-1 .9-1 1.7 M12 17v.2",
  logOut: "M10 5H5v14h5 M14 8l4 4-4 4 M18 12H9",
};

/** @returns its parts, and addSettings(panel) for when there are some */
export function buildFrame(state) {
  const parts = {
    sidebar: h("div", { id: "sidebar" }),
    title: h("h1", {}, T.title),
    status: h("p", { class: "status", hidden: true }),
    transcript: h("section", { id: "transcript", tabindex: 0, "aria-label": T.conversation }),
    composer: h("div", { id: "composer" }),
    model: h("span", { class: "model" }),
    notice: h("span", {}),
    live: h("div", { class: "visually-hidden", role: "status" }),
  };
  const button = (name, act, more = {}) =>
    h("button", { type: "button", class: "quiet", "aria-label": T.header[name], title: T.header[name], onclick: act, ...more }, icon(ICONS[name]));
  const header = h(
    "header",
    { class: "bar" },
    button("sidebar", () => parts.sides.toggle("sidebar"), { "data-opens": "sidebar", class: "quiet open-sidebar" }),
    parts.title,
    h("span", { class: "badge" }, T.header.private),
    button("newChat", () => parts.onNew(), { class: "quiet phone" }),
    button("theme", switchTheme),
    button("help", showShortcuts, { class: "quiet desktop" }),
    state.controls.length > 0 && button("settings", () => parts.sides.toggle("settings"), { "data-opens": "settings" }),
    state.logOutToken && button("logOut", () => logOut(state.logOutToken)),
  );
  const skip = h("a", { class: "skip", href: "#composer", onclick: (event) => (event.preventDefault(), parts.composer.querySelector("textarea").focus()) }, T.skip);
  const [before, command, after] = T.header.insecure;
  const insecure = isSecureContext ? null : h("p", { class: "insecure" }, before, h("code", {}, command), after);
  const guide = h("a", { href: RESPONSIBLE_USE, target: "_blank", rel: "noopener noreferrer" }, T.responsibleUse);
  const notice = h("p", { class: "notice" }, parts.model, parts.notice, " · ", guide);
  const announcement = state.announcement && h("p", { class: "announcement", dir: "auto" }, state.announcement);
  const middle = h("div", { class: "middle" }, header, h("div", { class: "lines" }, announcement, insecure), parts.status, parts.transcript, parts.composer, notice);
  const shade = h("div", { class: "shade", onclick: () => parts.sides.closeSheet() });
  document.body.prepend(h("div", { id: "chat" }, skip, parts.sidebar, middle, shade, parts.live));
  parts.sides = new Sides(parts.sidebar, [skip, middle]);
  parts.addSettings = (panel) => {
    addSettingsHead(panel, () => parts.sides.toggle("settings"));
    parts.sides.addSettings(panel);
  };
  useTheme();
  new MutationObserver(useTheme).observe(document.body, { attributeFilter: ["class"] }); // Gradio knows the system's only
  fitKeyboard();
  new ResizeObserver(() => setLength("--foot", parts.composer.offsetHeight + notice.offsetHeight)).observe(parts.composer);
  return parts;
}

function addSettingsHead(panel, onClose) {
  const close = h("button", { type: "button", class: "quiet", "aria-label": T.settings.close, onclick: onClose }, "×");
  panel.prepend(h("header", {}, h("h2", {}, T.settings.title), close));
}

let theme = kept(THEME); // as the visitor chose it; "" follows the system

function useTheme() {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (document.body.classList.contains("dark") !== dark) document.body.classList.toggle("dark", dark);
}

function switchTheme() {
  theme = document.body.classList.contains("dark") ? "light" : "dark";
  keep(THEME, theme);
  useTheme();
}

/** The box stays above the keyboard of a phone, in browsers that shrink the window for it and in those that do not. */
function fitKeyboard() {
  const viewport = document.querySelector("meta[name=viewport]");
  viewport.content = "width=device-width, initial-scale=1, interactive-widget=resizes-content";
  // Two fingers that zoom in leave the page as it is.
  visualViewport?.addEventListener("resize", () => setLength("--height", visualViewport.height * visualViewport.scale));
}

/** For the style sheets, in px. */
function setLength(name, length) {
  document.documentElement.style.setProperty(name, `${Math.round(length)}px`);
}

async function logOut(token) {
  await fetch("page/log-out", { method: "POST", headers: { "X-Token": token } });
  location.reload();
}
