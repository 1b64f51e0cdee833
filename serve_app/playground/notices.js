// What the page says to everyone: an error above the view, and announcements to screen readers.

// Shows an error's message, or none.
export function problem(error) {
  const element = document.getElementById("problem");
  element.textContent = error?.message ?? "";
  element.hidden = !error;
}

export function said(text) {
  document.getElementById("said").textContent = text;
}
