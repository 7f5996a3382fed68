/** Bytes as text and back: base64 for the contract's JSON, base64url for addresses. */

export function toBase64(bytes: Uint8Array): string {
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const decoded = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(decoded, (character) => character.charCodeAt(0));
}

export function toBase64Url(bytes: Uint8Array): string {
  return toBase64(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

async function through(bytes: Uint8Array<ArrayBuffer>, way: GenericTransformStream): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([bytes]).stream().pipeThrough(way as ReadableWritablePair<Uint8Array, BufferSource>);
  return new Uint8Array(await new Response(stream as ReadableStream<Uint8Array<ArrayBuffer>>).arrayBuffer());
}

export const deflate = (bytes: Uint8Array<ArrayBuffer>) => through(bytes, new CompressionStream("deflate-raw"));
export const inflate = (bytes: Uint8Array<ArrayBuffer>) => through(bytes, new DecompressionStream("deflate-raw"));
export const unzlib = (bytes: Uint8Array<ArrayBuffer>) => through(bytes, new DecompressionStream("deflate"));
