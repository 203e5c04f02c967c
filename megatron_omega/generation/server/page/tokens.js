// A text of tokens: each coloured by its probability, with its alternatives on hover and focus.
// One stop of the Tab key for the whole text; arrow keys, Home and End move in it.

const tooltip = document.getElementById("alternatives");

export const percent = (share) => share >= 0.9995 ? "100%" : share >= 0.0005 ? `${(100 * share).toFixed(1)}%` : "<0.1%";

// Spaces and line ends of a token, made visible.
export const shown = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// A table of words and their shares; `taken` is the word to be marked.
export function shares(rows, caption, taken) {
  const lines = rows.map(([word, share]) => {
    const bar = element("span");
    bar.style.setProperty("--p", share);
    return element("tr", {className: word === taken ? "taken" : ""},
      element("td", {className: "word"}, shown(word)), element("td", {className: "share"}, percent(share)),
      element("td", {className: "bar", ariaHidden: "true"}, bar));
  });
  return element("table", {}, element("caption", {}, caption), element("tbody", {}, ...lines));
}

export class Tokens {
  constructor(place, label) {
    this.place = place;
    this.chosen = -1;
    this.tokens = [];
    place.setAttribute("role", "listbox");
    place.setAttribute("aria-label", label);
    place.tabIndex = 0;
    place.addEventListener("keydown", (event) => this.move(event));
    place.addEventListener("focus", () => this.choose(Math.max(0, this.chosen)));
    place.addEventListener("blur", () => this.leave());
    place.addEventListener("pointerover", (event) => {
      const index = this.tokens.findIndex((token) => token.element === event.target);
      if (index >= 0) this.show(this.tokens[index]);
    });
    place.addEventListener("pointerout", () => { tooltip.hidden = true; });
  }

  // Add one token: what is seen of it, what it is called, its log-probability, its alternatives {name: log-probability}.
  add(text, name, logProbability, alternatives) {
    const share = Math.exp(logProbability);
    const made = element("span", {className: text ? "token" : "token unseen", id: `${this.place.id}-${this.tokens.length}`});
    made.textContent = text || name;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.setAttribute("aria-label", `${shown(name)}, ${percent(share)}`);
    made.style.setProperty("--p", Math.sqrt(share).toFixed(4));
    this.tokens.push({element: made, name, share, alternatives});
    this.place.append(made);
  }

  move(event) {
    const last = this.tokens.length - 1;
    const moves = {ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, ArrowDown: this.chosen + 10,
      ArrowUp: this.chosen - 10, Home: 0, End: last};
    if (event.key === "Escape") { tooltip.hidden = true; return; }
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    this.choose(Math.min(last, Math.max(0, moves[event.key])));
  }

  choose(index) {
    if (!this.tokens.length) return;
    this.unmark();
    this.chosen = index;
    const {element: token} = this.tokens[index];
    token.classList.add("chosen");
    token.setAttribute("aria-selected", "true");
    this.place.setAttribute("aria-activedescendant", token.id);
    this.place.setAttribute("aria-describedby", tooltip.id);
    this.show(this.tokens[index]);
  }

  leave() {
    this.unmark();
    tooltip.hidden = true;
  }

  unmark() {
    const old = this.tokens[this.chosen]?.element;
    old?.classList.remove("chosen");
    old?.setAttribute("aria-selected", "false");
  }

  show({element: token, name, share, alternatives}) {
    const rows = Object.entries(alternatives).map(([word, value]) => [word, Math.exp(value)]);
    if (!(name in alternatives)) rows.push([name, share]);
    rows.sort((one, two) => two[1] - one[1]);
    tooltip.replaceChildren(shares(rows, `${shown(name)} was written, ${percent(share)}`, name));
    tooltip.hidden = false;
    const box = token.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
    tooltip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    const fits = box.bottom + 4 + tooltip.offsetHeight < document.documentElement.clientHeight;
    const top = fits ? box.bottom + 4 : Math.max(0, box.top - 4 - tooltip.offsetHeight);
    tooltip.style.top = `${top + window.scrollY}px`;
  }
}
