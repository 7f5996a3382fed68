import assert from "node:assert/strict";
import { test } from "node:test";
import { box, cell, coverage, fill, fromHeat, grow, invert, move, polygon, stroke, type Bytes, type Size } from "./raster.ts";

const size: Size = { width: 64, height: 48 };
const grid: Size = { width: 8, height: 8 };
const empty = (): Bytes => new Uint8Array(size.width * size.height);
const sum = (mask: Bytes) => mask.reduce((a, b) => a + b, 0);
const brush = { radius: 6, hardness: 0.5, value: 1, erase: false };

test("coverage is the mean of the pixels of each cell, and all of it together is the mask's mean", () => {
  const mask = stroke(empty(), size, [{ x: 10, y: 10 }, { x: 50, y: 40 }], brush);
  const cells = coverage(mask, size, grid);
  for (let row = 0; row < 8; row++) {
    for (let column = 0; column < 8; column++) {
      let own = 0;
      for (let y = 0; y < 6; y++) for (let x = 0; x < 8; x++) own += mask[(row * 6 + y) * 64 + column * 8 + x]!;
      assert.ok(Math.abs(cells[row * 8 + column]! - own / 48 / 255) < 1e-12);
    }
  }
  const odd = coverage(mask, size, { width: 5, height: 7 });
  assert.ok(Math.abs(odd.reduce((a, b) => a + b, 0) / 35 - sum(mask) / mask.length / 255) < 1e-12);
});

test("going over a place twice within a stroke does not add up; the eraser takes away what was painted", () => {
  const once = stroke(empty(), size, [{ x: 20, y: 20 }], { ...brush, value: 0.5 });
  const twice = stroke(empty(), size, [{ x: 20, y: 20 }, { x: 20, y: 20 }], { ...brush, value: 0.5 });
  assert.deepEqual(once, twice);
  assert.equal(once[20 * 64 + 20], 128);
  const full = stroke(empty(), size, [{ x: 20, y: 20 }], brush);
  assert.equal(sum(stroke(full, size, [{ x: 20, y: 20 }], { ...brush, radius: 20, hardness: 1, erase: true })), 0);
});

test("a stroke is closed: points far apart leave no gap between them", () => {
  const mask = stroke(empty(), size, [{ x: 4, y: 24 }, { x: 60, y: 24 }], brush);
  for (let x = 4; x < 60; x++) assert.equal(mask[24 * 64 + x], 255);
});

test("a polygon of a box is the box; a box by any two corners is the same", () => {
  const [a, b] = [{ x: 8, y: 6 }, { x: 40, y: 30 }];
  const boxed = box(empty(), size, a, b, 1, false);
  assert.deepEqual(box(empty(), size, { x: 40, y: 6 }, { x: 8, y: 30 }, 1, false), boxed);
  assert.deepEqual(polygon(empty(), size, [a, { x: 40, y: 6 }, b, { x: 8, y: 30 }], 1, false), boxed);
  assert.equal(sum(boxed), 32 * 24 * 255);
});

test("filling stops at what is painted; inverting twice, and moving there and back, change nothing inside", () => {
  const wall = box(empty(), size, { x: 30, y: 0 }, { x: 34, y: 48 }, 1, false);
  const filled = fill(wall, size, { x: 5, y: 5 }, 1, false);
  assert.equal(filled[10 * 64 + 29], 255);
  assert.equal(filled[10 * 64 + 40], 0);
  assert.deepEqual(invert(invert(filled)), filled);
  const dot = box(empty(), size, { x: 30, y: 20 }, { x: 34, y: 24 }, 1, false);
  assert.deepEqual(move(move(dot, size, 5, -3), size, -5, 3), dot);
  assert.equal(sum(move(dot, size, 100, 0)), 0);
});

test("growing and shrinking a box move its edges", () => {
  const dot = box(empty(), size, { x: 20, y: 20 }, { x: 30, y: 26 }, 1, false);
  assert.deepEqual(grow(dot, size, 3), box(empty(), size, { x: 17, y: 17 }, { x: 33, y: 29 }, 1, false));
  assert.deepEqual(grow(grow(dot, size, 3), size, -3), dot);
});

test("a cell is exactly one cell of coverage", () => {
  const cells = coverage(cell(empty(), size, grid, 3, 5, 1), size, grid);
  cells.forEach((covered, at) => assert.ok(Math.abs(covered - (at === 5 * 8 + 3 ? 1 : 0)) < 1e-12));
});

test("a mask from a heat-map is brightest where the feature is strongest", () => {
  const heat = new Float32Array(64);
  heat[2 * 8 + 6] = 3;
  const mask = fromHeat(heat, grid, size, 0.3);
  const best = coverage(mask, size, grid);
  assert.equal(best.indexOf(Math.max(...best)), 2 * 8 + 6);
  assert.equal(sum(fromHeat(new Float32Array(64), grid, size, 0.3)), 0);
});
