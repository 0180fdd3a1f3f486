// Light and dark, and paper, which is light; a page that includes this draws itself in drawAll.
"use strict";

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  drawAll();
}

document.getElementById("theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("foveate-theme", chosenTheme); } catch { /* a private window */ }
  setTheme(chosenTheme);
});
systemDark.addEventListener("change", () => setTheme(wantedTheme()));
window.addEventListener("beforeprint", () => setTheme("light"));
window.addEventListener("afterprint", () => setTheme(wantedTheme()));
