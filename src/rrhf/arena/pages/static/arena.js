// The keys 1, 2, 3 and s; and of a double click the second is not sent, nor does it answer the page that comes next.
// Everything works without this file.
"use strict";
(() => {
  const form = document.getElementById("vote");
  if (!form) return;
  const DOUBLE_CLICK = 400;  // milliseconds
  let sent = false;
  form.addEventListener("click", (event) => {
    const pointer = event.detail > 0;  // a key's click has 0
    if (pointer && event.target.closest("button") && performance.now() < DOUBLE_CLICK) event.preventDefault();
  });
  form.addEventListener("submit", (event) => {
    if (sent) event.preventDefault();
    sent = true;
  });
  window.addEventListener("pageshow", () => { sent = false; });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
    if (event.target.closest("input, textarea, select")) return;
    for (const button of form.querySelectorAll("button[data-key]")) {
      if (button.dataset.key === event.key.toLowerCase()) button.click();
    }
  });
})();
