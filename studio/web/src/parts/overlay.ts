/** What is drawn over pictures: heat-maps, masks, grids. All in device pixels, from our own arrays. */
import { colour, css } from "../lib/heat.ts";
import type { Bytes, Point, Size } from "../lib/raster.ts";

type Place = (at: Point) => Point;

/** Colours of layers, in order; each stands out on light and dark and beside the others. */
export const LAYER_COLOURS = ["#f4632d", "#3b8eea", "#e9b000", "#a15ee0", "#12a594", "#e5439a", "#76a900", "#6672e5"];
export const layerColour = (at: number) => LAYER_COLOURS[at % LAYER_COLOURS.length]!;

function eachCell(grid: Size, size: Size, place: Place, draw: (cell: number, x: number, y: number, w: number, h: number) => void): void {
  for (let row = 0; row < grid.height; row++) {
    for (let column = 0; column < grid.width; column++) {
      const from = place({ x: (column / grid.width) * size.width, y: (row / grid.height) * size.height });
      const to = place({ x: ((column + 1) / grid.width) * size.width, y: ((row + 1) / grid.height) * size.height });
      draw(row * grid.width + column, from.x, from.y, to.x - from.x, to.y - from.y);
    }
  }
}

export interface HeatLook {
  /** What the brightest colour stands for. */
  top: number;
  smooth: boolean;
  /** The heat-map alone, in place of over the picture. */
  alone: boolean;
}

/** A heat-map; over a picture the colder a cell, the more of the picture is seen. */
export function drawHeat(context: CanvasRenderingContext2D, heat: Float32Array, grid: Size, size: Size, place: Place, look: HeatLook): void {
  const share = (cell: number) => Math.min(1, heat[cell]! / Math.max(look.top, 1e-9));
  if (look.smooth) {
    const small = new OffscreenCanvas(grid.width, grid.height);
    const pixels = new ImageData(grid.width, grid.height);
    for (let cell = 0; cell < heat.length; cell++) {
      pixels.data.set([...colour(share(cell)), look.alone ? 255 : Math.round(255 * Math.min(0.92, 0.15 + 0.8 * share(cell)))], cell * 4);
    }
    small.getContext("2d")!.putImageData(pixels, 0, 0);
    const [from, to] = [place({ x: 0, y: 0 }), place({ x: size.width, y: size.height })];
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, from.x, from.y, to.x - from.x, to.y - from.y);
    return;
  }
  eachCell(grid, size, place, (cell, x, y, w, h) => {
    context.globalAlpha = look.alone ? 1 : Math.min(0.92, 0.15 + 0.8 * share(cell));
    context.fillStyle = css(colour(share(cell)));
    context.fillRect(x, y, w, h);
  });
  context.globalAlpha = 1;
}

/** One cell, outlined. */
export function drawCell(context: CanvasRenderingContext2D, column: number, row: number, grid: Size, size: Size, place: Place, ratio: number): void {
  const from = place({ x: (column / grid.width) * size.width, y: (row / grid.height) * size.height });
  const to = place({ x: ((column + 1) / grid.width) * size.width, y: ((row + 1) / grid.height) * size.height });
  for (const [style, width] of [["#000c", 4], ["#fff", 2]] as const) {
    context.strokeStyle = style;
    context.lineWidth = width * ratio;
    context.strokeRect(from.x, from.y, to.x - from.x, to.y - from.y);
  }
}

const tints = new WeakMap<Bytes, Map<string, OffscreenCanvas>>();

function tinted(mask: Bytes, size: Size, tint: string): OffscreenCanvas {
  let known = tints.get(mask);
  if (!known) tints.set(mask, (known = new Map()));
  let canvas = known.get(tint);
  if (!canvas) {
    canvas = new OffscreenCanvas(size.width, size.height);
    const pixels = new ImageData(size.width, size.height);
    const [red, green, blue] = [1, 3, 5].map((at) => Number.parseInt(tint.slice(at, at + 2), 16));
    for (let at = 0; at < mask.length; at++) {
      pixels.data[4 * at] = red!;
      pixels.data[4 * at + 1] = green!;
      pixels.data[4 * at + 2] = blue!;
      pixels.data[4 * at + 3] = mask[at]!;
    }
    canvas.getContext("2d")!.putImageData(pixels, 0, 0);
    known.set(tint, canvas);
  }
  return canvas;
}

export function drawMask(context: CanvasRenderingContext2D, mask: Bytes, size: Size, place: Place, tint: string, opacity: number): void {
  const [from, to] = [place({ x: 0, y: 0 }), place({ x: size.width, y: size.height })];
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = true;
  context.drawImage(tinted(mask, size, tint), from.x, from.y, to.x - from.x, to.y - from.y);
  context.globalAlpha = 1;
}

/** What the model sees of a mask: how much of each of its cells is covered, as a square's area. */
export function drawCoverage(context: CanvasRenderingContext2D, cells: Float64Array, grid: Size, size: Size, place: Place, tint: string, ratio: number): void {
  eachCell(grid, size, place, (cell, x, y, w, h) => {
    context.strokeStyle = "#ffffff66";
    context.lineWidth = ratio;
    context.strokeRect(x, y, w, h);
    const side = Math.sqrt(cells[cell]!);
    if (side < 0.02) return;
    context.fillStyle = tint;
    context.globalAlpha = 0.75;
    context.fillRect(x + (w * (1 - side)) / 2, y + (h * (1 - side)) / 2, w * side, h * side);
    context.globalAlpha = 1;
  });
}
