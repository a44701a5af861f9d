// The language of the page, which the server chose for this document (../language.py), and the visitor may change here.

import { h, toast } from "./dialog.js";
import { T } from "./texts.js";

const LANGUAGES = { en: "English", de: "Deutsch", es: "Español", fr: "Français", ja: "日本語", zh: "简体中文" };
const COOKIE = "llama2_chat_language"; // as in ../language.py
const KEPT_S = 365 * 24 * 3600;

/** @param onUnkept called where the browser keeps no cookie */
export function languageControl(onUnkept) {
  const named = Object.entries(LANGUAGES).map(([code, name]) => h("option", { value: code, lang: code }, name));
  const list = h("select", { id: "language" }, h("option", { value: "" }, T.language.browsers), ...named);
  list.value = chosen();
  list.addEventListener("change", () => {
    choose(list.value);
    if (chosen() !== list.value) onUnkept();
    else if (!document.body.classList.contains("private")) location.reload();
    else toast(T.language.change, { action: T.document.reload, onAction: () => location.reload(), seconds: 30 });
  });
  return h("div", { class: "start language" }, h("label", { for: "language" }, T.language.label), list);
}

const chosen = () => document.cookie.match(`(?:^|; )${COOKIE}=(\\w+)`)?.[1] ?? "";

/** In the frame of another site, a browser keeps only cookies that say so. */
function choose(code) {
  const path = new URL(".", document.baseURI).pathname.replace(/(?<=.)\/$/, ""); // the page has two, with and without a slash
  const where = window.top === window ? "SameSite=Lax" : "SameSite=None; Secure; Partitioned";
  document.cookie = `${COOKIE}=${code}; Path=${path}; Max-Age=${code ? KEPT_S : 0}; ${where}`;
}
