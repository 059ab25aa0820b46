// Tiles and tables. Rows are replaced as one, so that none is seen half filled.

const STATES = ["full", "open", "cached", "fenced", "free", "null"]; // in the order of the curves

function tile(id, title, value, note, mood = "") {
  let found = document.getElementById(id);
  if (!found) {
    found = element("dl", undefined, { class: "tile", id });
    found.append(element("dt", title), element("dd"), element("p"));
    document.getElementById("tiles").append(found);
  }
  found.dataset.mood = mood;
  found.children[1].textContent = value;
  found.children[2].textContent = note;
}

// columns: [heading, value of a row, class]: "text" stands left, and "extra" is left out on a phone
function table(id, columns, rows, nothing) {
  const host = document.getElementById(id);
  if (!rows.length) {
    host.replaceChildren(element("p", nothing, { class: "empty" }));
    return;
  }
  const head = element("tr"), body = element("tbody"), made = element("table");
  for (const [heading, , kind = ""] of columns) head.append(element("th", heading, { class: kind, scope: "col" }));
  for (const row of rows) {
    const cells = columns.map(([, value, kind = ""]) => element("td", String(value(row)), { class: kind }));
    const line = element("tr");
    line.append(...cells);
    body.append(line);
  }
  const top = element("thead");
  top.append(head);
  made.append(top, body);
  host.replaceChildren(made);
}

function showSequences(found) {
  table("sequences", [
    ["row", (one) => one.row], ["tier", (one) => one.tier, "text"], ["doing", (one) => one.doing, "text extra"],
    ["tokens", (one) => whole(one.tokens)], ["blocks", (one) => whole(one.blocks)],
    ["shared", (one) => whole(one.shared_blocks), "extra"], ["bytes", (one) => bytes(one.bytes)],
  ], found.largest.slice(0, 12), "No sequence is live.");
  table("prefixes", [
    ["first block", (one) => whole(one.first_block)], ["tier", (one) => one.tier, "text extra"],
    ["sequences", (one) => one.sequences], ["common tokens", (one) => whole(one.common_tokens)],
    ["saved", (one) => bytes(one.saved_bytes)],
  ], found.prefixes.slice(0, 12), "No two live sequences begin with the same block.");
}

function showTiers(found) {
  table("tiers", [
    ["tier", (one) => one.name, "text"], ["is", (one) => one.health, "text"], ["used", (one) => percent(one.utilization)],
    ["cached", (one) => bytes(one.bytes.cached)], ["free", (one) => bytes(one.bytes.free)],
    ["of", (one) => bytes(one.capacity_bytes)], ["sequences", (one) => one.sequences, "extra"],
    ["evicted", (one) => whole(one.evicted_total), "extra"],
  ], found.tiers, "There is no tier.");
}

function showPressure(counters, blockBytes) {
  const moved = (way) => `${whole(counters.swapped_sequences[way])} sequences, ${bytes(counters.swapped_blocks[way] * blockBytes)}`;
  const refused = Object.entries(counters.failures).map(([reason, calls]) => [`refused: ${word(reason)}`, whole(calls)]);
  table("pressure", [["what", (row) => row[0], "text"], ["how much", (row) => row[1]]], [
    ...refused, ["swapped out", moved("out")], ["swapped in", moved("in")],
    ["evicted, kept in the host", `${whole(counters.demoted_blocks)} blocks`],
    ["came up from the host", `${whole(counters.promoted_blocks)} blocks`],
    ["swaps that failed", whole(counters.swap_failures.out + counters.swap_failures.in)],
    ["copied on write", `${whole(counters.cow_copies)} blocks`], ["steps taken back", whole(counters.steps_aborted)],
  ], "");
}

function showEvents(found) {
  const number = (run) => run.first === run.last ? whole(run.last) : `${whole(run.first)}–${whole(run.last)}`;
  table("events", [
    ["number", number], ["what", (run) => run.kind, "text"], ["why", (run) => run.reason, "text"],
    ["where", (run) => run.target ? `${run.tier} → ${run.target}` : run.tier, "text"], ["blocks", (run) => whole(run.blocks)],
  ], found.events, "No event since you came: nothing was stored, removed, moved or cleared.");
}

function showLegend(maps) {
  const device = maps[0], legend = document.getElementById("legend");
  const entries = STATES.map((state) => {
    const entry = element("li"), chip = element("i", undefined, { "data-color": state });
    const count = sum(device.counts[device.states.indexOf(state)]);
    entry.append(chip, `${state} `, element("b", whole(count), { "data-state": state }));
    return entry;
  });
  const shared = element("li");
  shared.append(element("i", undefined, { "data-color": "references" }), "more references");
  legend.replaceChildren(...entries, shared);
}
