// The texts of the page. Its document names another language's file in place of this one where a visitor reads another
// language (the import map of ../language.py), so that no more than one of them is ever loaded.

export * from "./texts/en.js";
