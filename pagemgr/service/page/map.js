// The block map: one canvas a tier, a cell for one block or, in a large pool, for equally many. A cell has the mixture
// of the colours of its blocks' states, and more of the mark's colour the more references its most shared block has.

const MOST_CELLS = 4096;
const MAP_HEIGHT = 236;
const STRONGEST = 64; // references at which a cell is marked most

class BlockMap {
  constructor(parent, tier) {
    this.figure = element("figure");
    this.caption = element("figcaption");
    this.canvas = element("canvas", undefined, { "data-tier": tier, role: "img" });
    this.figure.append(this.caption, this.canvas);
    parent.append(this.figure);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { document.getElementById("tip").hidden = true; });
    new ResizeObserver(() => this.draw()).observe(this.figure);
  }

  show(map) {
    this.map = map;
    const scale = map.blocks_per_cell === 1 ? "one cell a block" : `${whole(map.blocks_per_cell)} blocks a cell`;
    this.caption.textContent = `${map.tier}: ${whole(map.blocks)} blocks, ${scale}`;
    const held = map.states.map((state, i) => `${whole(sum(map.counts[i]))} ${state}`).join(", ");
    this.canvas.setAttribute("aria-label", `${map.tier} blocks: ${held}`);
    this.draw();
  }

  // All of it at once, on a canvas that keeps its size: nothing is ever seen half drawn.
  draw() {
    const width = this.figure.clientWidth;
    if (!this.map || !width) return;
    const cells = this.map.references.length;
    this.side = Math.max(3, Math.min(15, Math.floor(Math.sqrt(width * MAP_HEIGHT / cells))));
    this.columns = Math.floor(width / this.side);
    const height = Math.ceil(cells / this.columns) * this.side, ratio = window.devicePixelRatio || 1;
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) {
      [this.canvas.width, this.canvas.height] = size;
      this.canvas.style.height = `${height}px`;
    }
    const context = this.canvas.getContext("2d"), gap = this.side > 7 ? 1 : 0;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const colors = this.map.states.map((state) => channels(color(state))), mark = channels(color("mark"));
    for (let cell = 0; cell < cells; cell += 1) {
      context.fillStyle = this.mixture(cell, colors, mark);
      const x = (cell % this.columns) * this.side, y = Math.floor(cell / this.columns) * this.side;
      context.fillRect(x, y, this.side - gap, this.side - gap);
    }
  }

  mixture(cell, colors, mark) {
    const total = sum(this.map.counts.map((counts) => counts[cell])), mixed = [0, 0, 0];
    colors.forEach((one, state) => {
      const share = this.map.counts[state][cell] / total;
      for (let i = 0; i < 3; i += 1) mixed[i] += share * one[i];
    });
    const shared = Math.min(1, Math.log2(Math.max(1, this.map.references[cell])) / Math.log2(STRONGEST));
    return `rgb(${mixed.map((value, i) => Math.round(value + 0.75 * shared * (mark[i] - value))).join(",")})`;
  }

  point(event) {
    const tip = document.getElementById("tip"), map = this.map;
    const column = Math.floor(event.offsetX / this.side);
    const cell = column + this.columns * Math.floor(event.offsetY / this.side);
    tip.hidden = !map || column >= this.columns || cell >= map.references.length;
    if (tip.hidden) return;
    const first = cell * map.blocks_per_cell, last = Math.min(first + map.blocks_per_cell, map.blocks) - 1;
    const held = map.states.map((state, i) => [map.counts[i][cell], state]).filter(([count]) => count > 0);
    const lines = map.blocks_per_cell === 1
      ? [`block ${whole(first)}: ${held.map(([, state]) => state).join()}`, `references: ${map.references[cell]}`]
      : [`blocks ${whole(first)} to ${whole(last)}`, ...held.map(([count, state]) => `${whole(count)} ${state}`),
         `most references of one: ${map.references[cell]}`];
    tip.textContent = lines.join("\n");
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
  }
}

function sum(values) { return values.reduce((total, value) => total + value, 0); }

function channels(hex) {
  const digits = hex.length === 4 ? [...hex.slice(1)].map((digit) => digit + digit).join("") : hex.slice(1);
  return [0, 2, 4].map((start) => parseInt(digits.slice(start, start + 2), 16));
}
