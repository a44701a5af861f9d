// What Gradio's login lacks: the product's name, words by which password managers and screen readers know its parts, and
// one calm sentence for what went wrong, after which only the password is typed again.

import { h } from "./dialog.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";

/** Whether the login is what stands on the page; it is complete then. */
export function completeLogin() {
  const password = document.querySelector("gradio-app input[type=password], .gradio-container input[type=password]");
  if (!password) return false;
  const panel = password.closest(".column");
  const name = panel.querySelector("input[type=text]");
  password.autocomplete = "current-password";
  Object.assign(name, { autocomplete: "username", autocapitalize: "none", spellcheck: false });
  document.title = T.title;
  panel.closest(".main").role = "main";
  document.body.classList.add("login");
  name.focus();
  label(name, T.login.name);
  label(password, T.login.password);
  panel.querySelector("button").textContent = T.login.logIn;
  const problem = h("p", { class: "problem", role: "alert" });
  panel.querySelector("h2").replaceWith(h("h1", {}, T.title), problem);
  takeOver(panel, () => logIn(name, password, problem));
  return true;
}

/** In place of what Gradio calls it. */
function label(field, words) {
  field.closest("label").querySelector("span").textContent = words;
}

/** Gradio would empty both fields after a wrong password, and say nothing of any other problem. */
function takeOver(panel, act) {
  const instead = (event) => {
    event.preventDefault();
    event.stopPropagation();
    act();
  };
  panel.addEventListener("click", (event) => event.target.closest("button") && instead(event), { capture: true });
  panel.addEventListener("keydown", (event) => event.key === "Enter" && instead(event), { capture: true });
}

async function logIn(name, password, problem) {
  problem.textContent = "";
  const body = new FormData();
  body.append("username", name.value);
  body.append("password", password.value);
  try {
    const response = await fetch("login", { method: "POST", body });
    if (response.ok) return location.reload();
    const { error } = await response.json();
    problem.textContent = response.status === 400 ? T.login.wrong : (translated(error?.message) ?? T.login.wrong);
  } catch {
    problem.textContent = T.login.unreachable;
  }
  password.select();
}
