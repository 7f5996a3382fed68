/** Heat-maps: the features of a run, and colours for their activations. The SDK's own colours and its own sums. */

/** Dark blue through green to yellow, evenly rising in lightness. */
const ANCHORS = [
  [10, 12, 60],
  [40, 70, 140],
  [30, 130, 130],
  [90, 185, 90],
  [250, 230, 60],
] as const;

/** A value in [0, 1] as red, green and blue. */
export function colour(value: number): [number, number, number] {
  const at = Math.min(1, Math.max(0, value)) * (ANCHORS.length - 1);
  const from = Math.min(Math.floor(at), ANCHORS.length - 2);
  const mix = (channel: 0 | 1 | 2) =>
    Math.round(ANCHORS[from]![channel] + (at - from) * (ANCHORS[from + 1]![channel] - ANCHORS[from]![channel]));
  return [mix(0), mix(1), mix(2)];
}

export const css = ([red, green, blue]: readonly number[]) => `rgb(${red} ${green} ${blue})`;

/** Features of one SAE at one step: activation `values[i]` of feature `indices[i]` in cell `rows[i]`. */
export interface Part {
  sae: string;
  step: number;
  height: number;
  width: number;
  /** Number of features of the SAE. */
  size: number;
  rows: Uint32Array;
  indices: Uint32Array;
  values: Float32Array;
}

export interface Firing {
  index: number;
  /** Mean activation over cells and steps, zeros counted. */
  mean: number;
  /** Share of cells where it fires. */
  share: number;
}

/** The features of one SAE in one run, of some or all of its steps. */
export class Block {
  readonly sae: string;
  readonly width: number;
  readonly height: number;
  readonly parts: readonly Part[];

  constructor(parts: readonly Part[]) {
    const first = parts[0]!;
    this.sae = first.sae;
    this.width = first.width;
    this.height = first.height;
    this.parts = parts;
  }

  get steps(): number[] {
    return this.parts.map((part) => part.step);
  }

  at(step: number): Block {
    const own = this.parts.filter((part) => part.step === step);
    return own.length ? new Block(own) : this;
  }

  /** Features by mean activation, strongest first. */
  top(count: number): Firing[] {
    const size = this.parts[0]!.size;
    const sums = new Float64Array(size);
    const cells = new Uint32Array(size);
    for (const part of this.parts) {
      part.indices.forEach((index, i) => {
        sums[index]! += part.values[i]!;
        cells[index]!++;
      });
    }
    const all = this.width * this.height * this.parts.length;
    const firing: Firing[] = [];
    sums.forEach((sum, index) => {
      if (sum > 0) firing.push({ index, mean: sum / all, share: cells[index]! / all });
    });
    return firing.sort((a, b) => b.mean - a.mean || a.index - b.index).slice(0, count);
  }

  /** Activation of one feature at each cell, mean over steps. */
  heat(index: number): Float32Array {
    const sums = new Float64Array(this.width * this.height);
    for (const part of this.parts) {
      part.indices.forEach((one, i) => {
        if (one === index) sums[part.rows[i]!]! += part.values[i]!;
      });
    }
    return Float32Array.from(sums, (sum) => sum / this.parts.length);
  }

  /** What fires in one cell, strongest first. */
  in(cell: number): Firing[] {
    const sums = new Map<number, number>();
    for (const part of this.parts) {
      part.rows.forEach((row, i) => {
        if (row === cell) sums.set(part.indices[i]!, (sums.get(part.indices[i]!) ?? 0) + part.values[i]!);
      });
    }
    return [...sums]
      .map(([index, sum]) => ({ index, mean: sum / this.parts.length, share: 1 }))
      .sort((a, b) => b.mean - a.mean);
  }
}
