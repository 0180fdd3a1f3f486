// Runs before the first paint: a "#dark" or "#light" in the address, then the reader's last choice
// on this machine, then the system's preference.
"use strict";
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = location.hash.slice(1);
if (chosenTheme !== "dark" && chosenTheme !== "light") {
  try { chosenTheme = localStorage.getItem("foveate-theme"); } catch { chosenTheme = null; }
}
function wantedTheme() {
  return chosenTheme || (systemDark.matches ? "dark" : "light");
}
document.documentElement.dataset.theme = wantedTheme();
