// Copy: put the secret into the clipboard, where the browser allows that.
"use strict";
const button = document.getElementById("copy");
if (navigator.clipboard) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const said = document.getElementById("copied");
    try {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent);
      said.textContent = "Copied.";
    } catch {
      said.textContent = "The browser did not allow it. Select the secret, and copy it.";
    }
  });
}
