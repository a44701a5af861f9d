// Small things that appear over the page: a line that fades, a question, a list. Nothing here knows of conversations.

import { T } from "./texts.js";

/** An element with attributes, listeners ("onclick") and children; texts become text nodes. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** A drawing of 24 by 24, of one path, for a button that has a name of its own. */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

/** One line at the bottom of the page, said once to screen readers; a new one takes its place. */
export function toast(text, { action, onAction, seconds = 8 } = {}) {
  document.querySelector(".toast")?.remove();
  const line = h("div", { class: "toast", role: "alert" }, h("span", {}, text));
  const close = () => line.remove();
  if (action) line.append(h("button", { type: "button", onclick: () => (close(), onAction()) }, action));
  line.append(h("button", { type: "button", class: "quiet", "aria-label": T.dialog.close, onclick: close }, "×"));
  line.addEventListener("keydown", (event) => event.key === "Escape" && (event.stopPropagation(), close()));
  document.body.append(line);
  const timer = setTimeout(close, seconds * 1000);
  line.addEventListener("focusin", () => clearTimeout(timer));
}

/** A dialog with a title and content; it is gone once closed, and the focus back where it was. */
export function openDialog(title, ...content) {
  const close = h("button", { type: "button", class: "quiet", "aria-label": T.dialog.close }, "×");
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, h("header", {}, heading, close), ...content);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Whether the visitor says yes. */
export function confirmDialog(text, yesLabel = T.dialog.yes) {
  return new Promise((resolve) => {
    const yes = h("button", { type: "button", class: "primary" }, yesLabel);
    const no = h("button", { type: "button" }, T.dialog.no);
    const dialog = openDialog(text, h("footer", {}, no, yes));
    yes.addEventListener("click", () => (resolve(true), dialog.close()));
    no.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => resolve(false));
  });
}
