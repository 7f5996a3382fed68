/** Painting into masks: arrays [height * width] of 0 to 255, in pixels of the picture. Nothing here draws on a screen. */

export type Bytes = Uint8Array<ArrayBuffer>;

export interface Size {
  width: number;
  height: number;
}

export interface Point {
  x: number;
  y: number;
}

export interface Brush {
  /** In pixels of the picture. */
  radius: number;
  /** Share of the radius that is painted in full; the rest falls off smoothly. */
  hardness: number;
  /** 0 to 1: what is painted; an eraser paints what is left. */
  value: number;
  erase: boolean;
}

const clamp = (value: number, least: number, most: number) => Math.min(most, Math.max(least, value));

/** How much of a brush reaches a pixel at some distance from its middle. */
export function reach(distance: number, brush: Brush): number {
  const inner = brush.radius * brush.hardness;
  const outer = Math.max(brush.radius, inner + 1); // a hard edge is one pixel wide, not a staircase
  const t = clamp((outer - distance) / (outer - inner), 0, 1);
  return t * t * (3 - 2 * t);
}

/**
 * A stroke along points, from what the mask was before it.
 *
 * It is the most that any dab gives a pixel, so that going over a place twice within a stroke does not add up.
 */
export function stroke(before: Bytes, size: Size, points: readonly Point[], brush: Brush): Bytes {
  const after = before.slice();
  const cover = new Float32Array(before.length);
  const dab = (x: number, y: number) => {
    const r = brush.radius + 1;
    for (let py = Math.max(0, Math.floor(y - r)); py < Math.min(size.height, y + r); py++) {
      for (let px = Math.max(0, Math.floor(x - r)); px < Math.min(size.width, x + r); px++) {
        const at = py * size.width + px;
        const share = reach(Math.hypot(px + 0.5 - x, py + 0.5 - y), brush);
        if (share > cover[at]!) {
          cover[at] = share;
          const old = before[at]!;
          const target = brush.erase ? old * (1 - share * brush.value) : Math.max(old, 255 * share * brush.value);
          after[at] = Math.round(target);
        }
      }
    }
  };
  const spacing = Math.max(0.5, brush.radius / 4);
  points.forEach((point, i) => {
    const from = points[i - 1] ?? point;
    const count = Math.max(1, Math.ceil(Math.hypot(point.x - from.x, point.y - from.y) / spacing));
    for (let k = i ? 1 : count; k <= count; k++) {
      dab(from.x + ((point.x - from.x) * k) / count, from.y + ((point.y - from.y) * k) / count);
    }
  });
  return after;
}

/** A box by two of its corners. */
export function box(before: Bytes, size: Size, a: Point, b: Point, value: number, erase: boolean): Bytes {
  const [left, right] = [clamp(Math.round(Math.min(a.x, b.x)), 0, size.width), clamp(Math.round(Math.max(a.x, b.x)), 0, size.width)];
  const [top, bottom] = [clamp(Math.round(Math.min(a.y, b.y)), 0, size.height), clamp(Math.round(Math.max(a.y, b.y)), 0, size.height)];
  const after = before.slice();
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++) after[y * size.width + x] = laid(before[y * size.width + x]!, value, erase);
  }
  return after;
}

/** A polygon, or a closed stroke of a lasso: pixels whose middle is inside by the even-odd rule. */
export function polygon(before: Bytes, size: Size, points: readonly Point[], value: number, erase: boolean): Bytes {
  const after = before.slice();
  for (let y = 0; y < size.height; y++) {
    const crossings: number[] = [];
    points.forEach((p, i) => {
      const q = points[(i + 1) % points.length]!;
      const at = y + 0.5;
      if (p.y <= at !== q.y <= at) crossings.push(p.x + ((at - p.y) / (q.y - p.y)) * (q.x - p.x));
    });
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const from = clamp(Math.ceil(crossings[i]! - 0.5), 0, size.width);
      const to = clamp(Math.ceil(crossings[i + 1]! - 0.5), 0, size.width);
      for (let x = from; x < to; x++) after[y * size.width + x] = laid(before[y * size.width + x]!, value, erase);
    }
  }
  return after;
}

function laid(old: number, value: number, erase: boolean): number {
  return Math.round(erase ? old * (1 - value) : Math.max(old, 255 * value));
}

/** The area around a point whose mask is alike, filled. */
export function fill(before: Bytes, size: Size, from: Point, value: number, erase: boolean): Bytes {
  const after = before.slice();
  const start = Math.floor(clamp(from.y, 0, size.height - 1)) * size.width + Math.floor(clamp(from.x, 0, size.width - 1));
  const like = before[start]!;
  const seen = new Uint8Array(before.length);
  const queue = [start];
  seen[start] = 1;
  while (queue.length) {
    const at = queue.pop()!;
    after[at] = erase ? 0 : Math.round(255 * value);
    const x = at % size.width;
    for (const next of [x > 0 ? at - 1 : -1, x + 1 < size.width ? at + 1 : -1, at - size.width, at + size.width]) {
      if (next >= 0 && next < before.length && !seen[next] && Math.abs(before[next]! - like) < 32) {
        seen[next] = 1;
        queue.push(next);
      }
    }
  }
  return after;
}

export const invert = (before: Bytes): Bytes => before.map((value) => 255 - value);

/** Moved by whole pixels; what comes in from outside is empty. */
export function move(before: Bytes, size: Size, dx: number, dy: number): Bytes {
  const after = new Uint8Array(before.length);
  for (let y = 0; y < size.height; y++) {
    for (let x = 0; x < size.width; x++) {
      const [fx, fy] = [x - Math.round(dx), y - Math.round(dy)];
      if (fx >= 0 && fy >= 0 && fx < size.width && fy < size.height) after[y * size.width + x] = before[fy * size.width + fx]!;
    }
  }
  return after;
}

/** Grown by so many pixels each way; shrunk where negative. */
export function grow(before: Bytes, size: Size, pixels: number): Bytes {
  const most = pixels > 0;
  let now = before;
  for (const stride of [1, size.width]) {
    const next = now.slice();
    for (let at = 0; at < now.length; at++) {
      const place = stride === 1 ? at % size.width : Math.floor(at / size.width);
      const extent = stride === 1 ? size.width : size.height;
      for (let d = -Math.abs(pixels); d <= Math.abs(pixels); d++) {
        const outside = place + d < 0 || place + d >= extent;
        const value = outside ? 0 : now[at + d * stride]!;
        if (most ? value > next[at]! : value < next[at]!) next[at] = value;
      }
    }
    now = next;
  }
  return now;
}

/** One cell of a grid, all of it. */
export function cell(before: Bytes, size: Size, grid: Size, column: number, row: number, value: number): Bytes {
  const after = before.slice();
  const edge = (at: number, cells: number, pixels: number) => Math.round((at * pixels) / cells);
  for (let y = edge(row, grid.height, size.height); y < edge(row + 1, grid.height, size.height); y++) {
    for (let x = edge(column, grid.width, size.width); x < edge(column + 1, grid.width, size.width); x++) {
      after[y * size.width + x] = Math.round(255 * value);
    }
  }
  return after;
}

/** A mask from a heat-map, stretched over the picture smoothly; what is below the threshold is empty. */
export function fromHeat(heat: Float32Array, grid: Size, size: Size, threshold: number): Bytes {
  const most = heat.reduce((a, b) => Math.max(a, b), 1e-9);
  const at = (column: number, row: number) =>
    heat[clamp(row, 0, grid.height - 1) * grid.width + clamp(column, 0, grid.width - 1)]! / most;
  const mask = new Uint8Array(size.width * size.height);
  for (let y = 0; y < size.height; y++) {
    for (let x = 0; x < size.width; x++) {
      const gx = ((x + 0.5) / size.width) * grid.width - 0.5;
      const gy = ((y + 0.5) / size.height) * grid.height - 0.5;
      const [c, r] = [Math.floor(gx), Math.floor(gy)];
      const [fx, fy] = [gx - c, gy - r];
      const value =
        at(c, r) * (1 - fx) * (1 - fy) + at(c + 1, r) * fx * (1 - fy) + at(c, r + 1) * (1 - fx) * fy + at(c + 1, r + 1) * fx * fy;
      mask[y * size.width + x] = value >= threshold ? Math.round(255 * Math.min(1, value)) : 0;
    }
  }
  return mask;
}

/** Mean of a mask over each cell of a grid, 0 to 1, to the cell's area: what the model sees of it. */
export function coverage(mask: Bytes, size: Size, grid: Size): Float64Array {
  const share = (cells: number, samples: number) =>
    Array.from({ length: cells }, (_, c) =>
      Array.from({ length: samples }, (_, s) =>
        Math.max(0, Math.min((c + 1) / cells, (s + 1) / samples) - Math.max(c / cells, s / samples)) * cells,
      ),
    );
  const [across, down] = [share(grid.width, size.width), share(grid.height, size.height)];
  const cells = new Float64Array(grid.width * grid.height);
  for (let row = 0; row < grid.height; row++) {
    for (let y = 0; y < size.height; y++) {
      const weight = down[row]![y]!;
      if (!weight) continue;
      for (let column = 0; column < grid.width; column++) {
        let sum = 0;
        for (let x = 0; x < size.width; x++) sum += across[column]![x]! * mask[y * size.width + x]!;
        cells[row * grid.width + column]! += (weight * sum) / 255;
      }
    }
  }
  return cells;
}

export const isEmpty = (mask: Bytes): boolean => mask.every((value) => value === 0);
