// Files between the page and this computer, without a server.

import { h } from "./dialog.js";

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the download may not have begun yet
}

/** onChosen(file) for the file that the visitor chooses, if any. accept: of which kinds, as a file field has it */
export function chooseFile(accept, onChosen) {
  const field = h("input", { type: "file", accept });
  field.addEventListener("change", () => onChosen(field.files[0]));
  field.click();
}

/** The day where the visitor is, as in 2026-11-28. */
export function today() {
  const now = new Date();
  const twoDigits = (number) => String(number).padStart(2, "0");
  return `${now.getFullYear()}-${twoDigits(now.getMonth() + 1)}-${twoDigits(now.getDate())}`;
}
