// Which way a text in a box runs. dir="auto" reads all of it at each change, which takes seconds in a pasted book: of a
// long text its beginning tells.

const LONG = 10_000;
const BEGINNING = 1_000;
const RIGHT_TO_LEFT = /[\u0590-\u08FF\uFB1D-\uFDFF\uFE70-\uFEFC\u{10800}-\u{10FFF}\u{1E800}-\u{1EFFF}]/u;

/** Give a box a text, or none. */
export function setText(area, value) {
  area.dir = directionFor(value, value.length);
  area.value = value;
}

/** Before each change, so that the browser never looks for the way of what becomes long. */
export function watchDirection(area) {
  area.dir = "auto";
  area.addEventListener("beforeinput", ({ data }) => {
    const { value } = area;
    area.dir = directionFor(value.trim() ? value : (data ?? ""), value.length + (data?.length ?? 0));
  });
}

/** As dir="auto" does: by the first letter that has a way. */
function directionFor(text, length) {
  if (length <= LONG) return "auto";
  const first = text.slice(0, BEGINNING).match(/\p{L}/u);
  return first && RIGHT_TO_LEFT.test(first[0]) ? "rtl" : "ltr";
}
