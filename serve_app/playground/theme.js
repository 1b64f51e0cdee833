// Light theme, dark theme, or the system's. Loaded before the first paint, so that the other theme does not flash.

const THEMES = ["auto", "light", "dark"];
const NAMES = { auto: "as the system", light: "light", dark: "dark" };

function stored() {
  const theme = localStorage.getItem("theme");
  return THEMES.includes(theme) ? theme : "auto";
}

function apply(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (!button) return; // at the first call there is no body yet
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
