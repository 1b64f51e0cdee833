// One answer on the page: its Markdown as it arrives, who gave it, its seed, and how it ended.

import { markdown } from "./markdown.js";
import { ENDS, seedButton } from "./pane.js";
import { Votes } from "./votes.js";

export class AnswerView {
  // `on` has copy(text), kept(seed), again() to ask for another answer, voted(score, better), and votes(), whether the
  // service takes votes.
  constructor(answer, on) {
    this.answer = answer;
    this.shown = null; // what the body shows
    this.element = document.getElementById("answer").content.cloneNode(true).firstElementChild;
    this.votes = new Votes(this.element, answer, on.voted);
    this.takesVotes = on.votes;
    this.find(".copy").addEventListener("click", () => on.copy(answer.text));
    this.find(".again").addEventListener("click", () => on.again());
    this.find(".about").addEventListener("click", (event) => {
      if (event.target.localName === "button") on.kept(event.target.textContent);
    });
    this.find(".body").addEventListener("click", (event) => {
      if (event.target.matches("button")) on.copy(event.target.previousElementSibling.textContent);
    });
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // Shows the answer so far. `again` says whether another can be asked for.
  update({ arriving, again }) {
    const { text, problem, leftOut } = this.answer;
    this.element.classList.toggle("arriving", arriving);
    this.#show(text, arriving);
    this.#say(".left-out", leftOut ? omission(leftOut) : "");
    this.#say(".problem", problem ?? "");
    this.#describe(arriving ? [] : about(this.answer));
    this.find(".copy").hidden = arriving || !text;
    this.find(".again").hidden = !again;
    const { id, by, end } = this.answer;
    this.votes.show(this.takesVotes() && id && by && text.trim() !== "" && ["stop", "length"].includes(end));
  }

  // Leaves a text as it is if it is already shown, so that a selection and the focus stay where they are.
  #show(text, arriving) {
    const state = `${arriving} ${text}`;
    if (state === this.shown) return;
    this.shown = state;
    const body = this.find(".body");
    body.setAttribute("aria-busy", arriving);
    body.replaceChildren(markdown(text));
    if (!arriving) body.querySelectorAll("pre").forEach(addCopy);
  }

  // Leaves the facts as they are if nothing has changed, for the focus's sake.
  #describe(facts) {
    const text = facts.map((fact) => fact.textContent).join();
    const shown = [...this.find(".about").children].map((fact) => fact.textContent).join();
    if (text !== shown) this.find(".about").replaceChildren(...facts);
  }

  // Screen readers read an alert again when its text is set, even to the same.
  #say(selector, text) {
    const element = this.find(selector);
    if (element.textContent !== text) element.textContent = text;
    element.hidden = text === "";
  }
}

function omission(count) {
  const which = count === 1 ? "The oldest message was" : `The ${count} oldest messages were`;
  return `${which} left out: the conversation is longer than the model's context.`;
}

function addCopy(block) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "quiet", textContent: "Copy", ariaLabel: "Copy code" });
  const frame = document.createElement("div");
  frame.className = "code";
  block.replaceWith(frame);
  frame.append(block, button);
}

function about({ by, seed, end }) {
  const cut = by?.lastIndexOf("/");
  return [
    ...(by ? [fact(`${by.slice(0, cut)} version ${by.slice(cut + 1)}`)] : []),
    ...(by && seed !== undefined ? [fact("seed ", seedButton(seed))] : []),
    ...(ENDS[end] && end !== "stop" ? [fact(ENDS[end])] : []),
  ];
}

function fact(...content) {
  const element = document.createElement("span");
  element.append(...content);
  return element;
}
