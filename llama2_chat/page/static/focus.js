// Where the focus goes when what had it has gone: never nowhere, since keys would go there too. What opens and closes says
// itself where the focus returns to; what only disappears is noticed here.

const FOCUSABLE = "button, input, textarea, select, a[href], summary, [tabindex]";
const CHANGES = { subtree: true, childList: true, attributeFilter: ["class", "disabled", "hidden", "inert"] };
const TYPING = "input, textarea, select, [role=menuitem]";

let box, beside; // where messages are typed, and what takes the focus instead of it after a touch
let last = null; // had the focus, and was not left on purpose
let byTouch = matchMedia("(pointer: coarse)").matches;

/** Watch over the focus of the whole page from now on. */
export function watchFocus(textBox, besideIt) {
  [box, beside] = [textBox, besideIt];
  addEventListener("pointerdown", ({ pointerType }) => (byTouch = pointerType === "touch"), true);
  addEventListener("keydown", () => (byTouch = false), true);
  addEventListener("click", focusButton, true);
  addEventListener("focusin", ({ target }) => (last = target));
  let asked = false;
  const look = () => {
    if (!asked) requestAnimationFrame(() => ((asked = false), restore()));
    asked = true;
  };
  addEventListener("focusout", look);
  new MutationObserver(look).observe(document.body, CHANGES);
}

/** To the box, where the visitor types on; after a touch beside it, since a keyboard would cover what was asked for. */
export function focusBox() {
  move(byTouch ? beside : box);
}

/** To the box, unless the visitor has begun something elsewhere; for what happens by itself. */
export function offerBox() {
  if (!document.activeElement?.matches(TYPING)) move(box);
}

/** Back to what had the focus before, or to the box. */
export function returnFocus(element) {
  if (element && element !== document.body && canHaveFocus(element)) move(element);
  else focusBox();
}

/** To the first control of a dialog or sheet. */
export function focusInto(element) {
  const [first] = stops(element);
  if (first) move(first);
}

/** Tab leads from the last control in these elements to the first, and back. */
export function holdFocus(event, elements) {
  if (event.key !== "Tab") return;
  const all = elements.flatMap(stops);
  const [from, to] = event.shiftKey ? [all[0], all.at(-1)] : [all.at(-1), all[0]];
  if (event.target !== from && elements.some((element) => element.contains(event.target))) return;
  event.preventDefault();
  move(to);
}

/** Where the Tab key stops. */
function stops(element) {
  return [...element.querySelectorAll(FOCUSABLE)].filter((each) => each.tabIndex >= 0 && canHaveFocus(each));
}

function move(element) {
  element.focus({ preventScroll: true });
}

/** Safari leaves the focus where it was when a button is clicked. */
function focusButton({ target, isTrusted }) {
  const button = isTrusted && target.closest?.("button");
  if (button && button !== document.activeElement && document.activeElement?.contains(button)) move(button);
}

function restore() {
  const active = document.activeElement ?? document.body;
  const lost = active === document.body ? last : active;
  if (!lost) return;
  if (canHaveFocus(lost)) {
    last = active === document.body ? null : active; // left for the empty page
    return;
  }
  const over = [...document.querySelectorAll("dialog[open], [aria-modal=true]")].at(-1);
  if (over) focusInto(over);
  else focusBox();
}

function canHaveFocus(element) {
  const isOff = !element.isConnected || element.matches(":disabled") || element.closest("[inert]");
  return !isOff && element.checkVisibility({ visibilityProperty: true });
}
