// Numbers, counts, sizes, lists and days as people of a language write them. Each file of texts/ begins with these.

/** What is written from right to left, or says so, turns nothing around it. */
export const isolated = (text) => `\u2068${text}\u2069`;

/** @param {string} language its code, such as "de" */
export function formats(language) {
  const rules = new Intl.PluralRules(language);
  const lists = new Intl.ListFormat(language, { type: "conjunction", style: "narrow" });
  const number = (value, decimals) => value.toLocaleString(language, { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  const inUnit = (value, unit, decimals) => value.toLocaleString(language, { style: "unit", unit, maximumFractionDigits: decimals, minimumFractionDigits: decimals });
  return {
    number,
    /** The form for so many things; French says “0 message”, Japanese has one form for all. */
    form: (count, one, other) => (rules.select(count) === "one" ? one : other),
    /** So many things, in words. */
    plural: (count, one, other) => `${number(count)} ${rules.select(count) === "one" ? one : other}`,
    /** With one decimal as long as that says something. */
    brief: (value) => number(value, value < 10 ? 1 : 0),
    seconds: (seconds) => (seconds < 0.01 ? `< ${number(0.01, 2)}` : number(seconds, seconds < 1 ? 2 : 1)),
    size: (bytes) => (bytes < 1e6 ? inUnit(Math.ceil(bytes / 1e3), "kilobyte", 0) : inUnit(bytes / 1e6, "megabyte", 1)),
    list: (texts) => lists.format(texts),
    month: (date) => date.toLocaleDateString(language, { month: "long", year: "numeric" }),
  };
}
