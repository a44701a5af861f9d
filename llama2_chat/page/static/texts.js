// Every sentence and word of the page, by module. No other module holds text that people read.

/** @type {Record<string, any>} */
export const T = {
  store: {
    outdated: "The page was updated in another tab. Reload this one to go on.",
  },
  tree: {
    pinned: "Pinned",
    today: "Today",
    yesterday: "Yesterday",
    week: "Previous 7 days",
    month: (date) => date.toLocaleDateString("en", { month: "long", year: "numeric" }),
  },
  markdown: {
    code: "Code",
    copy: "Copy",
    copied: "Copied",
    notCopied: "Not copied",
    wrap: "Wrap",
    table: "Table",
    done: "Done",
    notDone: "Not done",
    thinking: "Thinking…",
    thoughts: "Thoughts",
    footnote: (number) => `Footnote ${number}`,
    backToText: "Back to the text",
  },
};
