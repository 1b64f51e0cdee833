// Light, dark, or as the system is. Loaded before the page is painted, so that a chosen theme never flashes.

const THEMES = ["auto", "light", "dark"];
const NAMES = { auto: "as the system", light: "light", dark: "dark" };

function stored() {
  const theme = localStorage.getItem("theme");
  return THEMES.includes(theme) ? theme : "auto";
}

function apply(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (!button) return; // the first call is made before there is a body
  button.querySelector("span").textContent = `Theme: ${NAMES[theme]}`;
  button.title = `Theme: ${NAMES[theme]}`;
}

apply(stored());

document.addEventListener("DOMContentLoaded", () => {
  apply(stored());
  document.getElementById("theme").addEventListener("click", () => {
    const theme = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
    localStorage.setItem("theme", theme);
    apply(theme);
  });
});
