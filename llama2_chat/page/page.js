// What Gradio's chat leaves undone around an answer.
() => {
  const box = () => document.querySelector("#message textarea");
  const hint = box().placeholder;
  let locked = false;

  // Plain HTTP, except on this machine itself.
  document.body.classList.toggle("insecure", !isSecureContext);

  // When an answer ends, the box has its hint and the keyboard back, and a message that was refused (too long, say, or
  // one too many in line) returns to it, so that nothing typed is lost.
  new MutationObserver(() => {
    const { disabled } = box();
    if (!box().placeholder) box().placeholder = hint;
    if (locked && !disabled) {
      const last = [...document.querySelectorAll("[data-testid=bot]")].at(-1);
      if (last?.querySelector(".REFUSED") && !box().value) document.querySelector("button[aria-label=Undo]")?.click();
      if (document.activeElement === document.body) box().focus();
    }
    locked = disabled;
  }).observe(document.querySelector("#message"), { subtree: true, childList: true, attributes: true });

  // Stops the answer that runs, if any, and waits until Gradio has put its last words away.
  window.endAnswer = async () => {
    document.querySelector("#message .stop-button")?.click();
    while (box().disabled) await new Promise((resolve) => setTimeout(resolve, 50));
    return [];
  };
}
