// What /metrics says of one model, in words for the page.

const LINE = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/;
const MODEL = /(?:^|,)model="((?:[^"\\]|\\.)*)"/;

// Returns the numbers of a model by name.
export function numbersOf(text, model) {
  const found = {};
  for (const line of text.split("\n")) {
    const [, name, labels, value] = LINE.exec(line) ?? [];
    const label = MODEL.exec(labels ?? "")?.[1].replace(/\\(.)/g, "$1");
    if (name && label === model) found[name] = Number(value);
  }
  return found;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count > 0 ? Math.min(Math.floor(Math.log2(count) / 10), units.length - 1) : 0;
  return `${(count / 1024 ** power).toPrecision(3)} ${units[power]}`;
}

// Turns counters into rates, from one reading to the next.
export class Meter {
  #model; #numbers; #time; #first = "–";

  // Returns the text of each field.
  read(text, model, time) {
    const now = numbersOf(text, model);
    if (model !== this.#model) [this.#model, this.#numbers, this.#first] = [model, null, "–"];
    const before = this.#numbers ?? now;
    const grown = (name) => (now[name] ?? 0) - (before[name] ?? 0);
    const seconds = (time - (this.#time ?? time)) / 1000;
    // From the latest reading in which one began; all of them at first.
    const began = "lminf_time_to_first_token_seconds";
    const all = this.#numbers === null || this.#numbers === undefined;
    const count = all ? now[`${began}_count`] : grown(`${began}_count`);
    const sum = all ? now[`${began}_sum`] : grown(`${began}_sum`);
    if (count > 0) this.#first = `${((1000 * sum) / count).toFixed(0)} ms`;
    [this.#numbers, this.#time] = [now, time];
    return {
      rate: seconds > 0 ? (grown("lminf_new_tokens_total") / seconds).toFixed(1) : "–",
      first: this.#first,
      slots: `${now.lminf_slots_busy ?? "–"} of ${now.lminf_slots ?? "–"}`,
      queue: `${now.lminf_queue_length ?? "–"}`,
      cache: now.lminf_cache_bytes === undefined ? "–" : bytes(now.lminf_cache_bytes),
    };
  }
}
