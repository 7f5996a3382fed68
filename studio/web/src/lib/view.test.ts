import assert from "node:assert/strict";
import { test } from "node:test";
import { noise } from "./noise.ts";
import { cellAt, fit, MAX_ZOOM, MIN_ZOOM, pan, toElement, toPicture, zoom } from "./view.ts";

const near = (a: number, b: number) => assert.ok(Math.abs(a - b) < 1e-6 * Math.max(1, Math.abs(a)), `${a} is not ${b}`);

test("there and back is where one was, and zooming keeps the point that one zooms at", () => {
  const random = noise(3);
  const next = (most: number) => (random.next().value as number) * most;
  for (let at = 0; at < 200; at++) {
    const picture = { width: 1 + next(1000), height: 1 + next(1000) };
    let view = fit(picture, { width: 10 + next(2000), height: 10 + next(1000) });
    const about = { x: next(800), y: next(800) };
    const before = toPicture(view, about);
    view = zoom(view, Math.exp(next(4) - 2), about);
    assert.ok(view.scale >= MIN_ZOOM && view.scale <= MAX_ZOOM);
    near(toPicture(view, about).x, before.x);
    near(toPicture(view, about).y, before.y);
    view = pan(view, next(100) - 50, next(100) - 50);
    const point = { x: next(500), y: next(500) };
    near(toElement(view, toPicture(view, point)).x, point.x);
    near(toElement(view, toPicture(view, point)).y, point.y);
  }
});

test("the whole picture is in the middle", () => {
  const view = fit({ width: 100, height: 50 }, { width: 400, height: 400 });
  assert.deepEqual(view, { scale: 4, x: 0, y: 100 });
});

test("every pixel is in the cell that holds it, and none outside", () => {
  const [picture, grid] = [{ width: 128, height: 128 }, { width: 8, height: 8 }];
  assert.deepEqual(cellAt({ x: 0, y: 127.9 }, picture, grid), { column: 0, row: 7 });
  assert.deepEqual(cellAt({ x: 16, y: 15.999 }, picture, grid), { column: 1, row: 0 });
  for (const at of [{ x: -0.1, y: 5 }, { x: 128, y: 5 }, { x: 5, y: 200 }]) assert.equal(cellAt(at, picture, grid), null);
});
