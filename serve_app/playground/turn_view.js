// One turn of a conversation on the page: the question, which can be edited, and its answers side by side.

import { AnswerView } from "./answer_view.js";

export class TurnView {
  // `on` has copy(text), kept(seed), asked(question) to ask this turn anew, with the same or an edited question,
  // voted(column, score, better) for one of its answers, and votes(), whether the service takes votes.
  constructor(turn, on) {
    this.turn = turn;
    this.element = document.getElementById("turn").content.cloneNode(true).firstElementChild;
    const again = () => on.asked(turn.question);
    this.answers = turn.answers.map((answer, column) => {
      const voted = (score, better) => on.voted(column, score, better);
      return new AnswerView(answer, { ...on, again, voted });
    });
    this.find(".answers").append(...this.answers.map((view) => view.element));
    this.find(".asked").textContent = turn.question;
    this.find(".copy").addEventListener("click", () => on.copy(turn.question));
    this.find(".change").addEventListener("click", () => this.#edit(true));
    this.find(".cancel").addEventListener("click", () => this.#edit(false));
    this.find(".edit").addEventListener("submit", (event) => {
      event.preventDefault();
      on.asked(this.find(".edit textarea").value);
    });
    this.find(".edit").addEventListener("keydown", (event) => this.#key(event));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // `arriving` has the answers that are not complete. Only a conversation's last turn can be answered again.
  update({ arriving, last }) {
    const again = last && arriving.size === 0;
    this.answers.forEach((view, column) => {
      view.update({ arriving: arriving.has(view.answer), again: again && column === this.answers.length - 1 });
    });
  }

  #edit(begins) {
    this.find(".edit").hidden = !begins;
    this.find(".asked").hidden = begins;
    this.find(".question footer").hidden = begins;
    if (begins) this.find(".edit textarea").value = this.turn.question;
    this.find(begins ? ".edit textarea" : ".change").focus();
  }

  #key(event) {
    if (event.key === "Escape") {
      event.stopPropagation(); // or the page would stop the running answer as well
      this.#edit(false);
    }
    if (sends(event)) {
      event.preventDefault();
      this.find(".edit").requestSubmit();
    }
  }
}

// Whether a key in a text field sends it: Enter does, but not while an input method composes a character.
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target.localName === "textarea";
}
