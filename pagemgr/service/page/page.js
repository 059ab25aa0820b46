// Asks for everything once a second, and shows one look at the pool at a time.

const EVERY = 1000; // milliseconds
const maps = new Map();
let curves; // made when it is known what there is to draw

async function ask(name) {
  const answer = await fetch(`api/v1/${name}`, { signal: AbortSignal.timeout(8000) });
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.json();
}

function showStats(stats) {
  const { counters } = stats, refused = sum(Object.values(counters.failures)), last = curves.points.length - 1;
  document.getElementById("pool").textContent = stats.pool;
  document.title = `${percent(stats.utilization)} · ${stats.pool} · pagemgr`;
  document.getElementById("facts").textContent = [
    `backend ${stats.backend} on ${stats.device}`, `blocks of ${stats.block_size} tokens, ${bytes(stats.block_bytes)}`,
    `evicts by ${stats.eviction}`, `version ${stats.version}`,
  ].join("  ·  ");
  tile("utilization", "Utilisation", percent(stats.utilization), `of ${bytes(stats.capacity_bytes)} on the device`);
  tile("available", "Can be given out", bytes(stats.available_bytes), `${bytes(stats.bytes.cached)} of it cached`);
  tile("hits", "Prefix hits", percent(curves.hits(last)), `last minute; ${percent(stats.hit_ratio)} since the start`);
  tile("saved", "Saved by sharing", bytes(stats.saved_bytes), `${whole(stats.sequences)} of ${whole(stats.max_sequences)} sequences live`);
  tile("refused", "Calls refused", whole(refused), "for want of room, since the start", refused ? "warn" : "good");
  tile("invariants", "Invariants", counters.invariant_violations ? "broken" : "hold", counters.invariant_violations
    ? `${whole(counters.invariant_violations)} checks failed: a bug, report it` : `${whole(counters.steps_committed)} steps committed`,
  counters.invariant_violations ? "bad" : "good");
  showPressure(counters, stats.block_bytes);
}

function showBlocks(found) {
  for (const map of found.tiers) {
    if (!maps.has(map.tier)) maps.set(map.tier, new BlockMap(document.getElementById("maps"), map.tier));
    maps.get(map.tier).show(map);
  }
  showLegend(found.tiers);
}

// The manager makes events only while somebody listens, which costs it something: ask while they are in sight.
let eventsInSight = false;
new IntersectionObserver((entries) => { eventsInSight = entries.at(-1).isIntersecting; })
  .observe(document.getElementById("events"));

async function tick() {
  const live = document.getElementById("live");
  try {
    const [stats, tiers, blocks, sequences, events] = await Promise.all(
      ["stats", "tiers", `blocks?cells=${MOST_CELLS}`, "sequences", ...(eventsInSight ? ["events"] : [])].map(ask));
    curves ??= await begin(Object.keys(stats.bytes));
    curves.add({ time: stats.time, utilization: stats.utilization, bytes: stats.bytes,
      query_tokens: stats.counters.prefix_query_tokens, hit_tokens: stats.counters.prefix_hit_tokens });
    showStats(stats);
    showTiers(tiers);
    showBlocks(blocks);
    showSequences(sequences);
    if (events) showEvents(events);
    live.dataset.state = "live";
    live.textContent = `live, ${clock(stats.time)}`;
  } catch (error) {
    live.dataset.state = "lost";
    live.textContent = `no answer at ${clock(Date.now() / 1000)}: is the process there?`;
  }
}

async function begin(causes) {
  document.getElementById("config").textContent = JSON.stringify(await ask("config"), null, 2);
  return new Curves((await ask("history")).points, causes);
}

async function run() {
  for (;;) {
    if (!document.hidden) await tick();
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

run();
