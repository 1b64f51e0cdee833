// The list of the conversations that this browser keeps.

import { title } from "./chat.js";
import { stored } from "./store.js";

export class History {
  // `on` has chosen(id), begun() for a new one, and removed(id).
  constructor(element, on) {
    this.element = element;
    this.on = on;
    this.listed = null; // what the list shows
    element.querySelector(".new").addEventListener("click", () => on.begun());
  }

  // Lists the conversations; `current` is the id of the one that is shown.
  list(current) {
    const rows = stored().map((conversation) => [conversation.id, title(conversation), conversation.id === current]);
    const listed = JSON.stringify(rows);
    if (listed === this.listed) return; // the focus may be in the list
    this.listed = listed;
    this.element.querySelector("ul").replaceChildren(...rows.map((row) => this.#row(...row)));
    this.element.querySelector(".help").hidden = rows.length === 0;
  }

  #row(id, name, current) {
    const open = button({ className: "quiet open", textContent: name, title: name });
    if (current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.on.chosen(id));
    const remove = button({ className: "quiet remove", textContent: "×", ariaLabel: `Delete “${name}”` });
    remove.addEventListener("click", () => {
      if (confirm(`Delete the conversation “${name}”?`)) this.on.removed(id);
    });
    const row = document.createElement("li");
    row.append(open, remove);
    return row;
  }
}

function button(properties) {
  return Object.assign(document.createElement("button"), { type: "button", ...properties });
}
