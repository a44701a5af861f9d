// Asks highlighter-worker.js for colours. It works beside the page, which no grammar and no long code can hold up.

const TIME_LIMIT_MS = 5000;
const questions = new Map();
let worker;
let last = 0;

/**
 * The lines of a code in colour, from line `from` on: pieces of "kind \u0002 text" between \u0001, kind a class of
 * code.css or empty. null if the language is not known or it took too long.
 * @param {string} code
 * @param {string} language
 * @param {number} from
 * @returns {Promise<string[] | null>}
 */
export function highlight(code, language, from) {
  worker ??= started();
  const id = ++last;
  return new Promise((resolve) => {
    const limit = setTimeout(restart, TIME_LIMIT_MS);
    questions.set(id, (lines) => {
      clearTimeout(limit);
      resolve(lines);
    });
    worker.postMessage({ id, code, language, from });
  });
}

function started() {
  const made = new Worker(new URL("highlighter-worker.js", import.meta.url), { type: "module" });
  made.addEventListener("message", ({ data }) => answer(data.id, data.lines));
  made.addEventListener("error", restart); // an old browser, or a file that did not come
  return made;
}

function restart() {
  worker?.terminate();
  worker = undefined;
  for (const id of [...questions.keys()]) answer(id, null);
}

function answer(id, lines) {
  questions.get(id)?.(lines);
  questions.delete(id);
}
