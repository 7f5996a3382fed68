/**
 * Masks as grey PNGs, 8 bits a pixel.
 *
 * Written here and not by a canvas: a canvas keeps colours premultiplied and may add noise, and browsers compress
 * differently, so that the same mask would make two requests.
 */
import { unzlib } from "./bytes.ts";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});

function crc(bytes: Uint8Array): number {
  let c = 0xffffffff;
  for (const byte of bytes) c = CRC[(c ^ byte) & 255]! ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

function adler(bytes: Uint8Array): number {
  let a = 1;
  let b = 0;
  for (const byte of bytes) {
    a = (a + byte) % 65521;
    b = (b + a) % 65521;
  }
  return ((b << 16) | a) >>> 0;
}

/** Smallest length of each of deflate's length codes 257 to 285, and its extra bits. */
const LENGTHS: [number, number][] = [];
for (let code = 0, length = 3; code < 28; code++) {
  const extra = code < 8 ? 0 : (code >> 2) - 1;
  LENGTHS.push([length, extra]);
  length += 1 << extra;
}
LENGTHS.push([258, 0]);

/** Deflate with the fixed codes, in which only runs of one byte are shortened: rows of a mask are little else. */
function deflateRuns(bytes: Uint8Array): number[] {
  const out: number[] = [];
  let buffer = 0;
  let held = 0;
  const put = (value: number, count: number) => {
    buffer |= value << held;
    held += count;
    for (; held >= 8; held -= 8, buffer >>>= 8) out.push(buffer & 255);
  };
  const reversed = (value: number, count: number) => {
    let turned = 0;
    for (let bit = 0; bit < count; bit++) turned |= ((value >> bit) & 1) << (count - 1 - bit);
    put(turned, count);
  };
  const symbol = (value: number) => {
    if (value < 144) reversed(0x30 + value, 8);
    else if (value < 256) reversed(0x190 + value - 144, 9);
    else if (value < 280) reversed(value - 256, 7);
    else reversed(0xc0 + value - 280, 8);
  };
  put(0b011, 3); // the last block, of fixed codes
  for (let at = 0; at < bytes.length; ) {
    symbol(bytes[at]!);
    let run = 0;
    while (at + 1 + run < bytes.length && bytes[at + 1 + run] === bytes[at]) run++;
    at += 1 + run;
    while (run > 0) {
      const length = Math.min(run, 258);
      if (length < 3) {
        for (let i = 0; i < length; i++) symbol(bytes[at - 1]!);
      } else {
        let code = 28;
        while (LENGTHS[code]![0] > length) code--;
        const [least, extra] = LENGTHS[code]!;
        symbol(257 + code);
        put(length - least, extra);
        reversed(0, 5); // from one byte back
      }
      run -= length;
    }
  }
  symbol(256);
  if (held > 0) out.push(buffer & 255);
  return out;
}

const big = (value: number) => [value >>> 24, (value >>> 16) & 255, (value >>> 8) & 255, value & 255];

function chunk(type: string, data: number[] | Uint8Array): number[] {
  const body = Uint8Array.from([...type].map((letter) => letter.charCodeAt(0)).concat(Array.from(data)));
  return [...big(data.length), ...body, ...big(crc(body))];
}

/** A grey picture [height * width] as PNG bytes. */
export function encodeGrey(data: Uint8Array, width: number, height: number): Uint8Array<ArrayBuffer> {
  const rows = new Uint8Array((width + 1) * height);
  for (let y = 0; y < height; y++) {
    rows[y * (width + 1)] = 2; // each row as its change from the one above, so that equal rows are zeros
    for (let x = 0; x < width; x++) {
      const above = y ? data[(y - 1) * width + x]! : 0;
      rows[y * (width + 1) + 1 + x] = data[y * width + x]! - above;
    }
  }
  return Uint8Array.from([
    ...SIGNATURE,
    ...chunk("IHDR", [...big(width), ...big(height), 8, 0, 0, 0, 0]),
    ...chunk("IDAT", [0x78, 0x01, ...deflateRuns(rows), ...big(adler(rows))]),
    ...chunk("IEND", []),
  ]);
}

export interface Grey {
  width: number;
  height: number;
  data: Uint8Array<ArrayBuffer>;
}

/** PNG bytes, of 8-bit grey and not interlaced, as a picture. */
export async function decodeGrey(png: Uint8Array): Promise<Grey> {
  const view = new DataView(png.buffer, png.byteOffset, png.byteLength);
  if (SIGNATURE.some((byte, at) => png[at] !== byte)) throw new Error("no PNG");
  let width = 0;
  let height = 0;
  const parts: Uint8Array[] = [];
  for (let at = 8; at + 12 <= png.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...png.subarray(at + 4, at + 8));
    if (type === "IHDR") {
      [width, height] = [view.getUint32(at + 8), view.getUint32(at + 12)];
      if (png[at + 16] !== 8 || png[at + 17] !== 0 || png[at + 20] !== 0) throw new Error("a mask is a grey PNG of 8 bits");
    } else if (type === "IDAT") parts.push(png.subarray(at + 8, at + 8 + length));
    at += 12 + length;
  }
  const packed = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (packed.set(part, at), at + part.length), 0);
  const rows = await unzlib(packed);
  const data = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const filter = rows[y * (width + 1)]!;
    for (let x = 0; x < width; x++) {
      const left = x ? data[y * width + x - 1]! : 0;
      const up = y ? data[(y - 1) * width + x]! : 0;
      const corner = x && y ? data[(y - 1) * width + x - 1]! : 0;
      data[y * width + x] = rows[y * (width + 1) + 1 + x]! + [0, left, up, (left + up) >> 1, paeth(left, up, corner)][filter]!;
    }
  }
  return { width, height, data };
}

function paeth(left: number, up: number, corner: number): number {
  const guess = left + up - corner;
  const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
  return a <= b && a <= c ? left : b <= c ? up : corner;
}
