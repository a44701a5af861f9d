// What scrolls sideways can be reached by keyboard, and what does not is no stop of the Tab key.

const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const scrolls = target.scrollWidth > target.clientWidth;
    if (scrolls) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

/** @template {Element} E @param {E} element @returns {E} */
export function keepReachable(element) {
  observer.observe(element);
  return element;
}
