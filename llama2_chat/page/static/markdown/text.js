// Small things that the kinds share: elements, character references, and which addresses may be followed.

/** An element with its attributes and what stands in it. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// No letter has so many: Unicode allows 30, and with thousands a browser does not come back.
const MARKS_ON_MARKS = /(\p{M}{64})\p{M}+/gu;

/** A text as it can be shown, whoever wrote it. */
export const withoutEndlessMarks = (text) => text.replace(MARKS_ON_MARKS, "$1");

const REFERENCE = /&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z][a-z\d]{1,30});/gi;
const decoder = document.createElement("textarea");

/** Text whose character references, &copy; for example, are the characters; the browser knows all their names. */
export function decodeEntities(text) {
  if (!text.includes("&")) return text;
  return text.replace(REFERENCE, (reference) => {
    decoder.innerHTML = reference; // a reference and nothing else: no tag can be in it
    return decoder.value;
  });
}

const FOLLOWED = new Set(["http:", "https:", "mailto:"]);

/** The address of a link, or null if it is one that a click must not open. */
export function safeLink(href) {
  const url = parsed(href);
  return url && FOLLOWED.has(url.protocol) ? url.href : null;
}

/** The address of a picture that needs no other host, or null. */
export function safeImage(href) {
  const url = parsed(href);
  if (url?.protocol === "blob:") return url.href;
  return url && /^data:image\/[\w.+-]+[;,]/i.test(url.href) ? url.href : null;
}

function parsed(href) {
  const address = decodeEntities(href ?? "").trim();
  return URL.canParse(address) ? new URL(address) : null;
}
