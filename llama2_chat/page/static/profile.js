// Whose things these are, of those who share a browser: each login has its own conversations, settings and drafts.

/** The name under which a browser keeps something of this login's. profile: "" where nobody logs in. */
export function ofProfile(name, profile) {
  return profile ? `${name} of ${profile}` : name;
}
