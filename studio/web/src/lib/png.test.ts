import assert from "node:assert/strict";
import { test } from "node:test";
import { inflateSync } from "node:zlib";
import { noise } from "./noise.ts";
import { decodeGrey, encodeGrey } from "./png.ts";

test("what is encoded is decoded, whatever its size and however it runs", async () => {
  const random = noise(1);
  const next = () => random.next().value as number;
  for (let at = 0; at < 60; at++) {
    const [width, height] = [1 + Math.floor(next() * 70), 1 + Math.floor(next() * 40)];
    const rough = next();
    let value = 0;
    const data = Uint8Array.from({ length: width * height }, () => (next() < rough ? (value = Math.floor(next() * 256)) : value));
    assert.deepEqual(await decodeGrey(encodeGrey(data, width, height)), { width, height, data });
  }
});

test("zlib itself reads it: long runs of every length up to past the longest code", () => {
  for (let length = 1; length < 600; length++) {
    const png = encodeGrey(new Uint8Array(length).fill(9), length, 1);
    const size = new DataView(png.buffer).getUint32(33);
    const rows = inflateSync(png.subarray(41, 41 + size));
    assert.equal(rows.length, length + 1);
    assert.ok(rows.subarray(1).every((byte) => byte === 9));
  }
});

test("a painted mask of the largest picture is small", () => {
  const data = new Uint8Array(512 * 512);
  for (let y = 0; y < 512; y++) for (let x = 0; x < 512; x++) data[y * 512 + x] = Math.hypot(x - 200, y - 250) < 90 ? 255 : 0;
  assert.ok(encodeGrey(data, 512, 512).length < 6000);
});

test("what is no mask is refused", async () => {
  await assert.rejects(decodeGrey(new Uint8Array(40)), /no PNG/);
});
