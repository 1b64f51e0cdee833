// The vote on an answer: good, bad, and what would have been a better one.

export class Votes {
  // `element` is the answer's. `voted(score, better)` sends a vote, and rejects if the service has not kept it.
  constructor(element, answer, voted) {
    this.element = element;
    this.answer = answer;
    this.voted = voted;
    this.find(".votes").addEventListener("click", (event) => this.#click(event.target.closest("button")));
    this.find(".better .cancel").addEventListener("click", () => this.#close());
    this.find(".better").addEventListener("submit", (event) => {
      event.preventDefault();
      const better = this.find(".better textarea").value.trim();
      if (better) this.#send(-1, better);
    });
    this.find(".better").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // or the page would stop the running answer as well
      this.#close();
    });
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  show(offered) {
    this.find(".votes").hidden = !offered;
    for (const button of this.find(".votes").children) {
      button.setAttribute("aria-pressed", Number(button.value) === this.answer.vote);
    }
  }

  async #click(button) {
    if (!button) return;
    const score = Number(button.value);
    const again = score === this.answer.vote; // a better answer that was sent stays
    if ((!again && !(await this.#send(score, ""))) || score > 0) return;
    this.find(".better").hidden = false;
    if (button.contains(document.activeElement)) this.find(".better textarea").focus();
  }

  // Resolves to whether the vote is kept.
  async #send(score, better) {
    try {
      await this.voted(score, better);
    } catch (error) {
      this.#say(`The vote was not kept: ${error.message}`);
      return false;
    }
    this.#say("The service has kept your vote with this conversation.");
    if (score > 0 || better) this.#close();
    return true;
  }

  #say(text) {
    this.find(".voted").textContent = text;
    this.find(".voted").hidden = false;
  }

  #close() {
    const held = this.find(".better").contains(document.activeElement);
    this.find(".better").hidden = true;
    if (held) this.find(".votes [value='-1']").focus();
  }
}
