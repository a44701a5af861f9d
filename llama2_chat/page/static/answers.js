// One answer over the network: asked for, read as it grows, found again after a lost line or a reload, stopped.
// Nothing here knows what is shown or kept. The server's side is ../routes.py and ../answers.py.
//
// A browser has six connections for all tabs: one in the background lets go of its own, and asks now and then.

import { T } from "./texts.js";

const RETRY_MS = [300, 1000, 2000, 4000, 8000];
const GIVE_UP_MS = 10 * 60 * 1000; // as long as the server keeps an answer that has ended
const HIDDEN_MS = 500; // that a tab in the background reads
const AWAY_MS = 5000; // and then leaves the line to others; the server takes longer to think that nobody reads

const reaching = new Map(); // id of an answer -> resolves once the server has the question, or is asked no longer

/** What the server refused, in its own sentence. */
export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

/**
 * The events of an answer, which can be stopped from now on, until its end: {text} all of it so far, {more}, {waiting},
 * {offline: true} while the line is down, and at last {end} or, where the server no longer knows of it, {lost: true}.
 *
 * @param {string} id 32 hexadecimal digits of the asker's own choice
 * @param {object|null} question to ask for it; null to read one that was asked for before
 * @param {AbortSignal} signal ends the reading, and not the answer
 */
export function follow(id, question, signal) {
  const events = eventsOf(id, question, signal);
  return question === null ? events : reachingBy(events, id);
}

/** The events of one that is asked for; stop() hears when the server has it, or when nobody asks for it any more. */
function reachingBy(events, id) {
  let settle;
  reaching.set(id, new Promise((resolve) => (settle = () => (reaching.delete(id), resolve()))));
  return (async function* () {
    try {
      for await (const event of events) {
        if (!event.offline) settle();
        yield event;
      }
    } finally {
      settle();
    }
  })();
}

async function* eventsOf(id, question, signal) {
  let known = question === null; // whether the server has it
  let failures = 0;
  let downSince = 0;
  while (!signal.aborted) {
    const connection = untilHidden(signal);
    try {
      const asked = { ...(known ? {} : put(question)), signal: connection.signal };
      const kind = !known && "text" in question ? "completions" : "answers";
      const response = await fetch(`page/${kind}/${id}`, asked);
      if (response.status === 404 && known) return void (yield { lost: true });
      if (!response.ok) {
        if (response.status >= 502) throw new TypeError("the proxy has no server");
        throw new Refused(response.status, await sentence(response));
      }
      for await (const event of lines(response.body)) {
        known = true;
        failures = downSince = 0;
        yield event;
        if (event.end) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) throw error;
    } finally {
      connection.release();
    }
    if (connection.signal.aborted) {
      if (document.hidden) await pause(AWAY_MS, signal);
      continue;
    }
    downSince ||= Date.now();
    if (Date.now() - downSince > GIVE_UP_MS) return void (yield { lost: true });
    yield { offline: true };
    await pause(retryMs(failures++), signal);
  }
}

/**
 * End the answer on the server; its readers see it end. One that the server does not have yet, ends as soon as it has it.
 * @returns {Promise<Refused | null>} why it did not, where whoever asks is not who asked for the answer
 */
export async function stop(id) {
  await reaching.get(id);
  const giveUpAt = Date.now() + GIVE_UP_MS;
  for (let failures = 0; Date.now() < giveUpAt; failures += 1) {
    try {
      const response = await fetch(`page/answers/${id}`, { method: "DELETE", keepalive: true });
      return response.status === 401 ? new Refused(response.status, await sentence(response)) : null;
    } catch {
      await pause(retryMs(failures)); // the line is down
    }
  }
  return null;
}

/** What the visitor says of the call that waits for them. Throws Refused where the server does not take it. */
export async function confirm(id, call, allow) {
  const response = await fetch(`page/answers/${id}/confirm`, { ...put({ call, allow }), method: "POST" });
  if (!response.ok) throw new Refused(response.status, await sentence(response));
}

/** How the conversation would stand in the model's window; null where that cannot be told now. */
export async function fit(question, signal) {
  const response = await fetch("page/fit", { ...put(question), method: "POST", signal });
  return response.ok ? response.json() : null;
}

/** A conversation as it is sent: whatever was said, and what was done for it. */
export function turnsOf(messages) {
  const said = messages.filter(({ text }) => text);
  return said.map(({ role, text, steps }) => ({ role, content: text, ...(steps?.length && { steps }) }));
}

function put(question) {
  return { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) };
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return T.connection.refused(response.status);
  }
}

async function* lines(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      for (const line of whole) if (line) yield JSON.parse(line);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const retryMs = (failures) => RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];

/**
 * A signal that also ends what a tab in the background reads, or a page that was left, which the browser may keep with
 * its connections for a way back; and release(), after which it ends nothing.
 */
function untilHidden(signal) {
  const ending = new AbortController();
  const end = () => ending.abort();
  let timer = null;
  const look = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(end, HIDDEN_MS);
  };
  look();
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", end);
  signal.addEventListener("abort", end);
  const release = () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", look);
    removeEventListener("pagehide", end);
    signal.removeEventListener("abort", end);
  };
  return { signal: ending.signal, release };
}

/** Resolves after a while, and sooner where there is a reason to try at once. */
function pause(ms, signal = new AbortController().signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    const look = () => document.hidden || done();
    function done() {
      clearTimeout(timer);
      removeEventListener("online", done);
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", done);
      resolve();
    }
    addEventListener("online", done);
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", done);
  });
}
