// The chat: a conversation with one model or two, and the list of earlier ones.

import { vote } from "./api.js";
import { Chat, fresh, message } from "./chat.js";
import { History } from "./history.js";
import { facts } from "./lineage.js";
import { ENDS } from "./pane.js";
import { current, forget, keep, setCurrent, stored } from "./store.js";
import { sends, TurnView } from "./turn_view.js";

const NEAR = 80; // pixels from the end of the conversation within which the page follows a growing answer

export class ChatView {
  // `on` has the page's functions: those of a pane, and request() for the sampling parameters, picked(name) when a
  // model is chosen, compared(name) for the second one or none, and setsSystem(), whether the service sets the system
  // prompt itself, and votes(), whether it takes votes on answers.
  constructor(on) {
    this.element = document.getElementById("chat").content.cloneNode(true).firstElementChild;
    this.on = on;
    this.chat = new Chat(() => this.#grown(), (answer, error) => this.#ended(answer, error));
    this.turns = []; // a TurnView for each turn of the conversation
    this.entries = []; // of GET /models
    this.painting = 0; // the frame in which the answer is painted next
    this.find(".history").open = matchMedia("(min-width: 60rem)").matches;
    this.history = new History(this.find(".history"), {
      chosen: (id) => this.#open(find(id)),
      begun: () => this.#open(fresh()),
      removed: (id) => this.#remove(id),
    });
    this.#listen();
    this.#open(find(current()));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // Lists the models, of which `name` is chosen, and `other` to compare it with, or none.
  list(entries, name, other) {
    this.entries = entries;
    const option = (value, chosen, text = value) => new Option(text, value, false, value === chosen);
    const able = entries.filter((entry) => entry.name !== name && entry.chat !== false);
    this.find("#chat-model").replaceChildren(...entries.map((entry) => option(entry.name, name)));
    this.find("#chat-other").replaceChildren(
      option("", other, "no other"),
      ...able.map((entry) => option(entry.name, other)),
    );
    this.find(".against").hidden = able.length === 0;
    const entry = entries.find((one) => one.name === name);
    this.find(".facts").textContent = entry ? facts(entry).join(" · ") : "";
    this.#system();
    this.#draw(); // whether the service takes votes is known now
  }

  stop() {
    this.chat.stop();
  }

  #listen() {
    this.find("#chat-model").addEventListener("change", (event) => this.on.picked(event.target.value));
    this.find("#chat-other").addEventListener("change", (event) => this.on.compared(event.target.value));
    this.find(".composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.chat.running) this.#send(this.find("#message").value);
    });
    this.find(".composer").addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      this.find(".composer").requestSubmit();
    });
    this.find(".halt").addEventListener("click", () => this.stop());
    this.find(".examples").addEventListener("click", (event) => {
      if (event.target.localName === "button") this.#send(event.target.textContent);
    });
    this.find(".system textarea").addEventListener("change", (event) => {
      this.chat.conversation.system = event.target.value;
      if (this.turns.length) this.#keep();
    });
    addEventListener("storage", () => this.history.list(this.chat.conversation.id)); // another tab keeps one
    addEventListener("pagehide", () => this.stop()); // what has arrived of an answer is kept
  }

  #open(conversation) {
    this.chat.open(conversation);
    setCurrent(conversation.id);
    this.find(".system textarea").value = conversation.system;
    this.find(".system").open = conversation.system !== "";
    this.#system();
    this.#draw();
    this.history.list(conversation.id);
    if (this.element.isConnected) this.find("#message").focus();
  }

  #remove(id) {
    if (id === this.chat.conversation.id) this.#open(fresh()); // first, since a running answer is kept as it stops
    forget(id);
    this.history.list(this.chat.conversation.id);
    this.find(".new").focus();
  }

  #system() {
    const fixed = this.on.setsSystem();
    this.chat.ownSystem = !fixed;
    this.find(".system textarea").disabled = fixed;
    this.find(".system .help").hidden = !fixed;
  }

  #send(question, place) {
    const models = ["#chat-model", "#chat-other"].map((part) => this.find(part).value).filter(Boolean);
    if (question.trim() === "" || models.length === 0) return;
    if (place === undefined) this.find("#message").value = "";
    const request = this.on.request();
    this.chat.ask(question, models.map((model) => ({ ...request, model })), place);
    this.#keep();
    this.turns.at(-1).element.scrollIntoView({ block: "nearest" });
    this.find("#message").focus({ preventScroll: true });
    this.on.said("Answering.");
  }

  // Paints at most once per frame, however fast the events arrive.
  #grown() {
    if (this.turns.at(-1)?.turn !== this.chat.turns.at(-1)) this.#draw();
    this.painting ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    cancelAnimationFrame(this.painting);
    this.painting = 0;
    const edge = (part, side) => this.find(part).getBoundingClientRect()[side];
    const gap = () => edge(".thread", "bottom") - edge(".composer", "top");
    const follows = gap() < NEAR;
    this.turns.at(-1)?.update({ arriving: this.chat.arriving, last: true });
    if (follows && gap() > 0) scrollBy(0, gap());
  }

  // Makes the page's turns those of the conversation. Turns that are already shown stay as they are.
  #draw() {
    const { arriving, turns } = this.chat;
    const same = this.turns.filter((view, place) => view.turn === turns[place]);
    for (const view of this.turns.slice(same.length)) view.element.remove();
    this.turns = [...same, ...turns.slice(same.length).map((turn) => this.#view(turn))];
    this.turns.forEach((view, place) => view.update({ arriving, last: place === turns.length - 1 }));
    this.find(".thread").append(...this.turns.slice(same.length).map((view) => view.element));
    this.find(".examples").hidden = turns.length > 0;
    this.#offer();
  }

  #offer() {
    this.find(".send").disabled = this.chat.running;
    this.find(".halt").disabled = !this.chat.running;
  }

  #view(turn) {
    const { copy, kept, votes } = this.on;
    const asked = (question) => this.#send(question, this.chat.turns.indexOf(turn));
    const voted = (column, score, better) => this.#vote(turn, column, score, better);
    return new TurnView(turn, { copy, kept, votes, asked, voted });
  }

  // Sends a vote on an answer. Rejects with a ServiceError if the service has not kept it.
  async #vote(turn, column, score, better) {
    const { conversation } = this.chat;
    const answer = turn.answers[column];
    const { id, by } = answer;
    try {
      await vote({
        id,
        score,
        ...(better ? { better } : {}),
        model: by.slice(0, by.lastIndexOf("/")),
        system_fingerprint: by,
        messages: [...this.chat.messages(turn, column), message("assistant", answer.text)],
      });
    } catch (error) {
      this.on.refused(error);
      throw error;
    }
    answer.vote = score;
    if (this.chat.conversation === conversation) this.#draw();
    else if (!stored().some(({ id }) => id === conversation.id)) return; // deleted meanwhile
    this.#keep(conversation);
  }

  #ended(answer, error) {
    this.#paint();
    if (!this.chat.running && document.activeElement === this.find(".halt")) this.find("#message").focus();
    this.#offer();
    this.#keep();
    this.on.said(`Answer: ${ENDS[answer.end]}.`);
    if (error) this.on.refused(error);
    const known = this.entries.some(({ name, version }) => answer.by === `${name}/${version}`);
    if (error || (answer.by && !known)) this.on.stale();
  }

  #keep(conversation = this.chat.conversation) {
    if (!keep(conversation)) this.on.said("The browser has no room to keep this conversation.");
    this.history.list(this.chat.conversation.id);
  }
}

function find(wanted) {
  return stored().find(({ id }) => id === wanted) ?? fresh();
}
