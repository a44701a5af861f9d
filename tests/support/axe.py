"""axe-core on a page in the browser. vendor/axe.min.js is axe-core 4.14.1 from npm; its licence lies beside it."""

from pathlib import Path

from playwright.sync_api import Page

SOURCE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text("utf-8")
RUN = """async (within) => {
  const { violations } = await axe.run(within ?? document, { resultTypes: ["violations"] });
  return violations.map(({ id, impact, help, nodes }) => ({ id, impact, help, at: nodes.map(({ html }) => html) }));
}"""


def assert_accessible(page: Page, within: str | None = None) -> None:
    """No serious and no critical finding on the page as it is now. within: a CSS selector of the part to look at."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(SOURCE)  # a script element would be against the page's Content-Security-Policy
    findings = page.evaluate(RUN, within)
    grave = [finding for finding in findings if finding["impact"] in ("serious", "critical")]
    assert not grave, "\n".join(f"{f['impact']} {f['id']}: {f['help']}\n  {f['at'][:5]}" for f in grave)
