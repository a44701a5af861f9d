// Short texts that this browser keeps for the page, such as its theme; conversations are in store.js.

/** Keep a short text in this browser. */
export function keep(name, value) {
  try {
    value ? localStorage.setItem(name, value) : localStorage.removeItem(name);
  } catch {
    // Nothing can be kept here; the page works without.
  }
}

export function kept(name) {
  try {
    return localStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}
