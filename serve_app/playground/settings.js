// The sampling settings: one table, from which the form, the request and the shared link are made.
//
// Takes, from a shared link, values as text; returns a request's fields.

const CONTROLS = [
  {
    name: "max_new_tokens", label: "Max new tokens", group: "Length", limited: true,
    min: 1, max: 512, step: 1, value: 128, help: "At most this many tokens are generated.",
  },
  {
    name: "stop", label: "Stop strings", group: "Length", kind: "lines", value: "",
    help: "The text ends before any of these. One per line; \\n is a line break.",
  },
  {
    name: "ignore_eos", label: "Go on after the end of text", group: "Length", kind: "check", value: false,
    help: "Otherwise the model may end the text itself.",
  },
  {
    name: "temperature", label: "Temperature", group: "Sampling",
    min: 0, max: 2, step: 0.05, value: 1, help: "Higher is more daring; 0 always takes the likeliest token.",
  },
  {
    name: "top_k", label: "Top-k", group: "Sampling",
    min: 0, max: 200, step: 1, value: 0, help: "Choose among the k likeliest tokens; 0 means all.",
  },
  {
    name: "top_p", label: "Top-p", group: "Sampling",
    min: 0.01, max: 1, step: 0.01, value: 1,
    help: "Choose among the fewest tokens that hold this much probability; 1 means all.",
  },
  {
    name: "min_p", label: "Min-p", group: "Sampling",
    min: 0, max: 1, step: 0.01, value: 0,
    help: "Leave out tokens less likely than this share of the likeliest token's probability.",
  },
  {
    name: "seed", label: "Seed", group: "Sampling", kind: "seed", value: "",
    help: "The same seed, prompt and settings give the same text. Empty: another seed each time.",
  },
  {
    name: "repetition_penalty", label: "Repetition penalty", group: "Penalties",
    min: 1, max: 2, step: 0.01, value: 1, help: "Above 1: tokens that are already in the text become less likely.",
  },
  {
    name: "presence_penalty", label: "Presence penalty", group: "Penalties",
    min: -2, max: 2, step: 0.05, value: 0, help: "Lowers the score of each token that was generated before.",
  },
  {
    name: "frequency_penalty", label: "Frequency penalty", group: "Penalties",
    min: -2, max: 2, step: 0.05, value: 0, help: "Lowers a token's score for each time it was generated.",
  },
  {
    name: "logprobs", label: "Alternatives shown", group: "Report",
    min: 0, max: 20, step: 1, value: 5, help: "How many of the likeliest tokens to show for each token.",
  },
];

// An answer is as long as it has to be, and the chat shows text instead of tokens.
const CHAT_CONTROLS = [
  {
    name: "max_completion_tokens", label: "Most tokens of an answer", group: "Length", limited: true,
    min: 0, max: 512, step: 1, value: 0, none: 0, help: "0: what the service and the model's context allow.",
  },
  ...CONTROLS.filter(({ name }) => !["max_new_tokens", "logprobs"].includes(name)),
];

export class Settings {
  // Makes the form of a continuation or, with `chat`, of an answer; `show` puts it into the page. `changed` is called
  // without arguments after any change by hand.
  constructor(changed, { chat = false } = {}) {
    this.controls = chat ? CHAT_CONTROLS : CONTROLS;
    this.fields = new Map();
    this.groups = new Map();
    for (const control of this.controls) {
      if (!this.groups.has(control.group)) this.groups.set(control.group, newGroup(control.group));
      this.fields.set(control.name, addField(this.groups.get(control.group), control, changed));
    }
  }

  show(container) {
    container.replaceChildren(...this.groups.values());
  }

  // A request's fields. An empty seed is chosen here, so that it can be shown, shared and used again.
  request() {
    const body = {};
    for (const [name, field] of this.fields) body[name] = field.read();
    body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
    return body;
  }

  // [name, text] of each setting that differs from its default, for a link.
  differing() {
    return this.controls
      .map(({ name, value }) => [name, this.fields.get(name).text(), String(value)])
      .filter(([, text, usual]) => text !== usual)
      .map(([name, text]) => [name, text]);
  }

  // Applies a link's values. Missing and invalid values get the default.
  restore(params) {
    for (const { name, value } of this.controls) this.fields.get(name).write(params.get(name) ?? String(value));
  }

  set(name, text) {
    this.fields.get(name).write(String(text));
  }

  // Limits the number of tokens to the model's context.
  limit(context) {
    for (const { name, limited } of this.controls) if (limited) this.fields.get(name).limit(context);
  }

  // Marks the setting that the service refused, if the error names one, and scrolls to it.
  refuse(name) {
    for (const [known, field] of this.fields) field.mark(known === name);
  }
}

function newGroup(title) {
  const group = document.createElement("fieldset");
  group.appendChild(document.createElement("legend")).textContent = title;
  return group;
}

function addField(group, control, changed) {
  const row = group.appendChild(document.createElement("div"));
  row.className = `field ${control.kind ?? "number"}`;
  const label = row.appendChild(document.createElement("label"));
  label.htmlFor = `set-${control.name}`;
  label.textContent = control.label;
  const field = KINDS[control.kind ?? "number"](row, control);
  field.input.id = label.htmlFor;
  field.input.name = control.name;
  field.input.setAttribute("aria-describedby", `help-${control.name}`);
  const help = row.appendChild(document.createElement("p"));
  help.id = `help-${control.name}`;
  help.className = "help";
  help.textContent = control.help;
  const mark = (refused) => {
    row.classList.toggle("refused", refused);
    field.input.setAttribute("aria-invalid", refused);
    if (!refused) return;
    field.input.closest("details").open = true;
    field.input.scrollIntoView({ block: "nearest" });
  };
  row.addEventListener("input", () => {
    mark(false);
    changed();
  });
  return { limit() {}, mark, ...field };
}

// For each kind of control: adds its inputs to a row; returns how to read it for a request, and as text.
const KINDS = {
  number(row, { min, max, step, value, none }) {
    const input = element("input", { type: "number", min, max, step, value, inputMode: "decimal" });
    const slider = element("input", { type: "range", min, max, step, value, tabIndex: -1, ariaHidden: "true" });
    const follow = () => {
      slider.value = input.value;
      slider.style.setProperty("--fill", `${(100 * (slider.value - slider.min)) / (slider.max - slider.min)}%`);
    };
    input.addEventListener("input", follow);
    slider.addEventListener("input", () => {
      input.value = slider.value;
      follow();
    });
    row.append(input, slider);
    const text = () => (Number.isFinite(input.valueAsNumber) ? String(input.valueAsNumber) : String(value));
    return {
      input,
      text,
      read: () => (Number(text()) === none ? undefined : Number(text())),
      write(wanted) {
        input.value = Number.isFinite(Number.parseFloat(wanted)) ? Number.parseFloat(wanted) : value;
        follow();
      },
      limit(most) {
        input.max = most;
        slider.max = Math.min(most, 1024);
        follow();
      },
    };
  },
  lines(row) {
    const input = row.appendChild(element("textarea", { rows: 2, spellcheck: false, autocapitalize: "off" }));
    const lines = () => input.value.split("\n").filter((line) => line !== "");
    return {
      input,
      text: () => lines().join("\n"),
      read: () => lines().map(unescape),
      write: (wanted) => (input.value = wanted),
    };
  },
  check(row) {
    const input = element("input", { type: "checkbox" });
    row.prepend(input);
    return {
      input,
      text: () => String(input.checked),
      read: () => input.checked,
      write: (wanted) => (input.checked = wanted === "true"),
    };
  },
  seed(row) {
    const input = element("input", { type: "text", inputMode: "numeric", placeholder: "random", autocomplete: "off" });
    row.append(input);
    const text = () => input.value.replace(/\D/g, "").slice(0, 15); // JavaScript's numbers are not exact above 2^53
    return {
      input,
      text,
      read: () => (text() === "" ? undefined : Number(text())),
      write: (wanted) => (input.value = wanted),
    };
  },
};

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

function unescape(line) {
  return line.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter]);
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}
