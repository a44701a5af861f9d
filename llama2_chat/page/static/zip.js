// The texts in a ZIP archive, read where they stand: of a large one only its list and the files that are wanted.

const END = 0x06054b50; // of the list of files, with a comment of at most 65,535 bytes
const ENTRY = 0x02014b50; // of that list
const FILE = 0x04034b50;
const IS_IN_64 = 0xffffffff; // in place of a number that is, or may be, too large for a ZIP of the first kind
const END_64 = 0x06064b50;
const WHERE_END_64 = 0x07064b50; // 20 bytes just before the end
const LARGEST = 500_000_000; // bytes that one file may unpack to: a string holds little more

export async function isZip(blob) {
  const start = await blob.slice(0, 4).arrayBuffer();
  return start.byteLength === 4 && [FILE, END].includes(new DataView(start).getUint32(0, true));
}

/**
 * The files whose name passes, unpacked, in the order of their names.
 * @param {Blob} blob
 * @param {(name: string) => boolean} isWanted
 * @returns {AsyncGenerator<string>}
 * @throws {Error} where it is broken or encrypted
 */
export async function* textsInZip(blob, isWanted) {
  const entries = (await entriesOf(blob)).filter(({ name }) => isWanted(name));
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) yield await textOf(blob, entry);
}

async function entriesOf(blob) {
  const last = await viewOf(blob, Math.max(0, blob.size - 65_557), blob.size);
  let at = last.byteLength - 22;
  while (at >= 0 && last.getUint32(at, true) !== END) at -= 1;
  if (at < 0) throw new Error("a ZIP without an end");
  const [size, start] = (await end64(blob, last, at - 20)) ?? [last.getUint32(at + 12, true), last.getUint32(at + 16, true)];
  const list = await viewOf(blob, start, start + size);
  const entries = [];
  for (let place = 0; place < list.byteLength; ) {
    if (list.getUint32(place, true) !== ENTRY) throw new Error("a ZIP with a broken list");
    const [nameLength, extraLength] = [list.getUint16(place + 28, true), list.getUint16(place + 30, true)];
    const in64 = numbersIn64(list, place + 46 + nameLength, extraLength);
    // In this order, those that are there.
    const [, packed, start] = [24, 20, 42].map((at) => list.getUint32(place + at, true)).map((number) => (number === IS_IN_64 ? in64.shift() : number));
    entries.push({
      isEncrypted: Boolean(list.getUint16(place + 8, true) & 1),
      method: list.getUint16(place + 10, true),
      packed,
      start,
      name: new TextDecoder().decode(new Uint8Array(list.buffer, place + 46, nameLength)),
    });
    place += 46 + nameLength + extraLength + list.getUint16(place + 32, true);
  }
  return entries;
}

/** The size of the list and where it starts, where an archive has them in 64 bits. */
async function end64(blob, last, at) {
  if (at < 0 || last.getUint32(at, true) !== WHERE_END_64) return null;
  const from = Number(last.getBigUint64(at + 8, true));
  const end = await viewOf(blob, from, from + 56);
  if (end.byteLength < 56 || end.getUint32(0, true) !== END_64) throw new Error("a ZIP without an end");
  return [Number(end.getBigUint64(40, true)), Number(end.getBigUint64(48, true))];
}

/** Those of an entry, of its extra fields. */
function numbersIn64(list, from, length) {
  for (let at = from; at + 4 <= from + length; at += 4 + list.getUint16(at + 2, true)) {
    if (list.getUint16(at, true) !== 1) continue;
    return Array.from({ length: list.getUint16(at + 2, true) >> 3 }, (_, number) => Number(list.getBigUint64(at + 4 + 8 * number, true)));
  }
  return [];
}

async function textOf(blob, { isEncrypted, method, packed, start }) {
  const head = await viewOf(blob, start, start + 30);
  if (isEncrypted || ![0, 8].includes(method) || head.getUint32(0, true) !== FILE) throw new Error("a file in a ZIP that cannot be read");
  const from = start + 30 + head.getUint16(26, true) + head.getUint16(28, true);
  const bytes = blob.slice(from, from + packed).stream();
  return limitedText(method ? bytes.pipeThrough(new DecompressionStream("deflate-raw")) : bytes);
}

async function limitedText(stream) {
  const chunks = [];
  let size = 0;
  for (const reader = stream.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) return new Blob(chunks).text();
    size += value.byteLength;
    if (size > LARGEST) throw new Error("a file in a ZIP that is too large");
    chunks.push(value);
  }
}

async function viewOf(blob, from, to) {
  return new DataView(await blob.slice(from, to).arrayBuffer());
}
