// A text whose words can be masked: each word is a button; what the models say stands below it.

import {fillMask} from "./service.js";
import {element, shares} from "./tokens.js";

export class Masks {
  constructor({text, words, candidates, settings, say}) {
    Object.assign(this, {text, words, candidates, settings, say});
    this.masked = new Set();
    this.asked = null;
    text.addEventListener("input", () => this.read());
    words.addEventListener("keydown", (event) => this.move(event));
    this.read();
  }

  // Cut the text into words, and what is between them.
  read() {
    this.parts = this.text.value.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]+/gu) ?? [];
    this.masked.clear();
    this.candidates.replaceChildren();
    this.draw();
  }

  draw() {
    let isFirst = true;
    this.words.replaceChildren(...this.parts.map((part, index) => {
      if (/^\s+$/.test(part)) return part;
      const button = element("button", {type: "button", textContent: part, tabIndex: isFirst ? 0 : -1});
      isFirst = false;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => this.toggle(index, button));
      return button;
    }));
  }

  toggle(index, button) {
    if (!this.masked.delete(index)) this.masked.add(index);
    button.setAttribute("aria-pressed", String(this.masked.has(index)));
    this.ask();
  }

  // Arrow keys move between words, as in a toolbar.
  move(event) {
    const buttons = [...this.words.querySelectorAll("button")];
    const place = buttons.indexOf(document.activeElement);
    const next = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: buttons.length - 1}[event.key];
    if (next === undefined || !buttons[next]) return;
    event.preventDefault();
    buttons[place].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
  }

  async ask() {
    this.asked?.abort();
    if (!this.masked.size) { this.candidates.replaceChildren(); return; }
    this.asked = new AbortController();
    const {signal} = this.asked;
    const input = this.parts.map((part, index) => this.masked.has(index) ? "<mask>" : part).join("");
    const answers = await Promise.all(this.settings().models.map((model) => this.answer(model, input, signal)));
    if (!signal.aborted) {
      this.candidates.replaceChildren(...answers);
      this.say(`${this.masked.size} masked`);
    }
  }

  // One model's candidates of every mask, as a section.
  async answer(model, input, signal) {
    const section = element("section", {className: "answer"}, element("h2", {textContent: model}));
    section.setAttribute("aria-label", `Candidates of ${model}`);
    try {
      const {data: [found]} = await fillMask({model, input, top_k: 8}, this.settings().key, signal);
      const hidden = [...this.masked].sort((one, two) => one - two).map((index) => this.parts[index]);
      found.masks.forEach((mask, place) => {
        const rows = mask.map(({text, probability}) => [text, probability]);
        const real = rows.map(([word]) => word).find((word) => word.trim() === hidden[place]);
        section.append(shares(rows, `in the place of ${hidden[place]}`, real));
      });
    } catch (error) {
      if (!signal.aborted) section.append(element("p", {className: "failed", textContent: error.message}));
    }
    return section;
  }
}
