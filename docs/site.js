// What the theme makes as the page loads: tables wider than the page scroll in boxes, which the keyboard has to
// reach, and the buttons at blocks of code are landmarks, all of one name.
const mend = () => {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((box) => {
    box.tabIndex = 0;
  });
  document.querySelectorAll("nav.md-code__nav").forEach((nav, number) => {
    nav.ariaLabel = `Code ${number + 1}`;
  });
};
new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
mend();
