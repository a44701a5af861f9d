// Short texts that this browser keeps for the page, such as its theme; conversations are in store.js.

/** Keep a short text in this browser. @returns whether it does: it may be full, or keep nothing at all */
export function keep(name, value) {
  return attempt(() => put(localStorage, name, value), true) !== undefined;
}

export function kept(name) {
  return attempt(() => localStorage.getItem(name)) ?? "";
}

/** The same for a text of which each tab has its own; the newest of all is for a tab that is opened later. */
export function keepOfTab(name, value) {
  if (keptOfTab(name) === value) return true;
  const isNewest = keptOfTab(name) === kept(name);
  const ofTab = attempt(() => sessionStorage.setItem(name, value), true) !== undefined;
  return (value || isNewest ? keep(name, value) : true) && ofTab;
}

export function keptOfTab(name) {
  return attempt(() => sessionStorage.getItem(name)) ?? kept(name);
}

function put(storage, name, value) {
  value ? storage.setItem(name, value) : storage.removeItem(name);
}

/** What look() gives, or `otherwise` where that is nothing; undefined where the browser refuses. */
function attempt(look, otherwise) {
  try {
    return look() ?? otherwise;
  } catch {
    return undefined; // the page works without
  }
}
