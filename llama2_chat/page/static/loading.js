// Stands in the document itself, before all that is fetched, and needs nothing else: sees which of the page's files do not
// come, and has them asked for again once the server gives them. A browser remembers of a module that it did not come, and
// asks again in a new document only. Until the page begins nobody has typed anything, so that it may be loaded anew.

(() => {
  const FIRST_PAUSE_MS = 1000; // before the server is asked again; then twice as long each time
  const LONGEST_PAUSE_MS = 30_000;
  const LOOK_MS = 5000; // between two looks whether anything came: of a document that was cut, a browser says nothing
  const ANSWER_MS = 20_000;
  const said = document.currentScript.dataset; // in the language of the page
  const lost = new Set(); // style sheets
  const [navigation] = performance.getEntriesByType("navigation");
  let pauseMs = navigation?.type === "reload" ? 2 * LOOK_MS : FIRST_PAUSE_MS; // there may be something that no reload mends
  let hasBegun = false;
  let isMending = false;

  addEventListener("error", notice, true);
  document.addEventListener("load", noticeEmpty, true); // which the window is not told of
  addEventListener("begun", begin); // told by main.js, as is the other
  addEventListener("stuck", () => hasBegun || (say(said.incomplete), mend()));
  const watch = setInterval(lookForProgress, LOOK_MS);
  let progress = 0;
  let idle = 0; // looks at which nothing had come

  function notice({ target, error }) {
    if (target.id === "page") say(said.incomplete); // its event stands for all modules that it imports
    else if (isSheet(target)) lost.add(target);
    else if (!error || hasBegun) return;
    else if (!modules().some(isEmpty)) return giveUp();
    else say(said.incomplete);
    mend();
  }

  /** Of a file whose headers were cut, browsers make an empty one, over plain HTTP, and call it loaded. */
  function noticeEmpty({ target }) {
    if (target.id === "page" && isEmpty(target)) say(said.incomplete);
    else if (isSheet(target) && target.sheet?.cssRules.length === 0) lost.add(target);
    else return;
    mend();
  }

  /** Of the page: extensions of a browser add sheets of their own, whose rules nobody may read, nor fetch them. */
  function isSheet({ rel, href }) {
    return rel === "stylesheet" && href.startsWith(`${location.origin}/`);
  }

  function isEmpty({ href, src }) {
    const came = performance.getEntriesByName(href ?? src);
    return came.some(({ decodedBodySize, transferSize }) => decodedBodySize === 0 && transferSize > 0);
  }

  function begin() {
    hasBegun = true;
    clearInterval(watch);
    document.querySelector("#loading")?.remove();
  }

  /** The browser does not understand the code, and would not after a reload. */
  function giveUp() {
    clearInterval(watch);
    say(said.failed);
  }

  function lookForProgress() {
    const now = performance.getEntriesByType("resource").length + document.querySelectorAll("*").length;
    idle = now === progress ? idle + 1 : 0;
    progress = now;
    if (idle === 1) say(said.incomplete);
    if (idle !== 2) return;
    if (document.readyState !== "complete") window.stop(); // a browser opens six connections, and these may be all dead
    mend();
  }

  async function mend() {
    if (isMending) return;
    isMending = true;
    do {
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
      pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
    } while (!(await areThere(missing())));
    isMending = false;
    if (!hasBegun) location.reload();
    for (const link of lost) link.replaceWith(link.cloneNode()); // where it stands: a later sheet goes before it
    lost.clear();
  }

  /** The addresses of what is to come. */
  function missing() {
    if (hasBegun) return [...lost].map(({ href }) => href);
    const files = [...modules(), ...[...document.querySelectorAll("link")].filter(isSheet)];
    return [location.href, ...files.map(({ href, src }) => href ?? src)];
  }

  function modules() {
    return [...document.querySelectorAll("link[rel=modulepreload], #page")];
  }

  async function areThere(addresses) {
    try {
      const answers = await Promise.all(addresses.map((address) => fetch(address, { signal: AbortSignal.timeout(ANSWER_MS) })));
      await Promise.all(answers.map((answer) => answer.arrayBuffer())); // the browser keeps what came whole
      return answers.every(({ ok }) => ok);
    } catch {
      return false;
    }
  }

  function say(text) {
    document.querySelector("#loading")?.remove();
    const reload = Object.assign(document.createElement("button"), { type: "button", textContent: said.reload });
    reload.addEventListener("click", () => location.reload());
    const line = Object.assign(document.createElement("p"), { id: "loading", role: "alert" });
    line.style.cssText = "order: -1; margin: 0; padding: 24px; color: var(--text, inherit); font: 16px/2 system-ui, sans-serif";
    line.append(text, " ", reload);
    (document.body ?? document.documentElement).append(line);
  }
})();
