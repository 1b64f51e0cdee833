// One conversation with a model, or with two side by side, and the answers that are arriving. No part of the page.
//
// A conversation is {id, system, turns}, and a turn {question, system, answers}, with the system prompt when it was
// asked and one answer from each model: {text, seed, by: "name/version", id, end, problem, leftOut, vote}. `problem` is
// an error's message, `leftOut` counts the messages at the beginning that the model did not get, and `vote` is 1 or -1
// once the user has judged the answer.

import { converse } from "./api.js";

const TITLE = 60; // characters

export function fresh() {
  return { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), system: "", turns: [] };
}

// A conversation's first question, cut to one line.
export function title({ turns }) {
  const line = turns.length ? turns[0].question.trim().split("\n")[0] : "New conversation";
  return line.length > TITLE ? `${line.slice(0, TITLE - 1)}…` : line;
}

export class Chat {
  // `changed()` is called after each change, and `ended(answer, error)` once an answer has ended.
  constructor(changed, ended) {
    this.changed = changed;
    this.ended = ended;
    this.aborter = null; // aborts the last turn's requests
    this.arriving = new Set(); // answers of the last turn
    this.conversation = fresh();
    this.ownSystem = true; // false: the service sets the system prompt and refuses another
  }

  get turns() {
    return this.conversation.turns;
  }

  get running() {
    return this.arriving.size > 0;
  }

  // Shows another conversation; the answers that are arriving stop.
  open(conversation) {
    this.stop();
    this.conversation = conversation;
  }

  // Asks a question as turn `place`, which replaces that turn and those after it; by default it is a new one.
  // Each of `requests` has a model and its sampling parameters. Resolves when all answers have ended or failed.
  async ask(question, requests, place = this.turns.length) {
    this.stop();
    this.aborter = new AbortController();
    const system = this.ownSystem ? this.conversation.system : "";
    const turn = { question, system, answers: requests.map(({ seed }) => ({ text: "", seed })) };
    this.turns.splice(place, Infinity, turn);
    this.arriving = new Set(turn.answers);
    this.changed();
    const { signal } = this.aborter;
    await Promise.all(requests.map((request, column) => this.#answer(turn, column, request, signal)));
  }

  // Ends the arriving answers at once; what has arrived of them stays.
  stop() {
    if (!this.running) return;
    this.aborter.abort();
    for (const answer of this.arriving) this.#end(answer, null);
  }

  async #answer(turn, column, request, signal) {
    const answer = turn.answers[column];
    const body = { ...request, messages: this.messages(turn, column), truncate: "oldest" };
    let failure = null;
    try {
      for await (const event of converse(body, signal)) {
        if (signal.aborted) return;
        take(answer, event);
        this.changed();
      }
    } catch (error) {
      failure = error;
    }
    if (!signal.aborted) this.#end(answer, failure);
  }

  #end(answer, failure) {
    this.arriving.delete(answer);
    answer.end ??= failure ? "error" : "abort";
    if (failure) answer.problem = failure.message;
    this.ended(answer, failure);
  }

  // What a model gets to answer a turn: its own answers, or those of the first where it was not asked. A question
  // without an answer is left out: the service refuses empty messages, and some templates two questions in a row.
  messages(turn, column) {
    const { system = "" } = turn;
    const earlier = this.turns.slice(0, this.turns.indexOf(turn)).flatMap(({ question, answers }) => {
      const { text } = answers[column] ?? answers[0];
      return text ? [message("user", question), message("assistant", text)] : [];
    });
    const first = system.trim() ? [message("system", system)] : [];
    const leftOut = turn.answers[column].leftOut ?? 0; // by the service, once it has answered
    return [...first, ...[...earlier, message("user", turn.question)].slice(leftOut)];
  }
}

export function message(role, content) {
  return { role, content };
}

function take(answer, event) {
  const [choice] = event.choices;
  answer.text += choice?.delta.content ?? "";
  answer.end = choice?.finish_reason ?? answer.end;
  answer.by = event.system_fingerprint;
  answer.id = event.id;
  answer.leftOut = event.truncated?.messages ?? 0;
}
