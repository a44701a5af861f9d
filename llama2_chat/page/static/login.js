// What Gradio's login lacks: the product's name, and words by which password managers know the fields.

import { T } from "./texts.js";

/** Whether the login is what stands on the page; it is complete then. */
export function completeLogin() {
  const password = document.querySelector("gradio-app input[type=password], .gradio-container input[type=password]");
  if (!password) return false;
  password.autocomplete = "current-password";
  const panel = password.closest(".column");
  Object.assign(panel.querySelector("input[type=text]"), { autocomplete: "username", autocapitalize: "none" });
  panel.querySelector("h2").textContent = document.title = T.title;
  panel.querySelector("input[type=text]").focus();
  return true;
}
