import assert from "node:assert/strict";
import { test } from "node:test";
import { Block, colour, type Part } from "./heat.ts";

const part = (step: number): Part => ({
  sae: "up.0.1", step, height: 2, width: 2, size: 5,
  rows: Uint32Array.from([0, 0, 1, 3]), indices: Uint32Array.from([1, 4, 4, 1]), values: Float32Array.from([2, 8, 4, 6 * (step + 1)]),
});

test("sums are the SDK's: means over cells and steps, zeros counted", () => {
  const block = new Block([part(0), part(1)]);
  assert.deepEqual(block.top(9), [
    { index: 1, mean: (2 + 6 + 2 + 12) / 8, share: 0.5 },
    { index: 4, mean: 3, share: 0.5 },
  ].sort((a, b) => b.mean - a.mean));
  assert.deepEqual([...block.heat(1)], [2, 0, 0, 9]);
  assert.deepEqual([...block.at(1).heat(1)], [2, 0, 0, 12]);
  assert.deepEqual(block.in(0).map((one) => [one.index, one.mean]), [[4, 8], [1, 2]]);
  assert.deepEqual(block.steps, [0, 1]);
});

test("colors rise in lightness, from dark blue to yellow", () => {
  assert.deepEqual(colour(-1), [10, 12, 60]);
  assert.deepEqual(colour(2), [250, 230, 60]);
  let before = -1;
  for (let at = 0; at <= 100; at++) {
    const [red, green, blue] = colour(at / 100);
    const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    assert.ok(light > before);
    before = light;
  }
});
