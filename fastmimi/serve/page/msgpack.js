/* MessagePack, as far as the protocol uses it: null, booleans, numbers, strings, bytes, arrays, maps with string keys.

   JavaScript          MessagePack
   number              the shortest integer that holds it, up to 2^53, else float 64
   Uint8Array          bin
   plain object        map; a key whose value is undefined is left out

   Larger integers are refused when read, since a number cannot hold them. */

const text = { encoder: new TextEncoder(), decoder: new TextDecoder("utf-8", { fatal: true }) };

class Writer {
  #bytes = new Uint8Array(256);
  #view = new DataView(this.#bytes.buffer);
  #length = 0;

  result() {
    return this.#bytes.slice(0, this.#length);
  }

  value(x) {
    if (x === null) this.#number("Uint8", 0xc0);
    else if (typeof x === "boolean") this.#number("Uint8", x ? 0xc3 : 0xc2);
    else if (typeof x === "number") this.#numeric(x);
    else if (typeof x === "string") this.#string(x);
    else if (x instanceof Uint8Array) this.#binary(x);
    else if (Array.isArray(x)) this.#array(x);
    else if (typeof x === "object") this.#map(x);
    else throw new TypeError(`cannot be written as MessagePack: ${typeof x}`);
    return this;
  }

  #numeric(x) {
    if (!Number.isSafeInteger(x) || Object.is(x, -0)) return this.#tagged(0xcb, "Float64", x);
    if (x >= -32 && x < 128) return this.#number("Int8", x);
    const kinds = x < 0
      ? [[0xd0, "Int8", -0x80], [0xd1, "Int16", -0x8000], [0xd2, "Int32", -0x80000000]]
      : [[0xcc, "Uint8", 0xff], [0xcd, "Uint16", 0xffff], [0xce, "Uint32", 0xffffffff]];
    const kind = kinds.find(([, , limit]) => Math.abs(x) <= Math.abs(limit));
    if (kind) return this.#tagged(kind[0], kind[1], x);
    return this.#tagged(x < 0 ? 0xd3 : 0xcf, x < 0 ? "BigInt64" : "BigUint64", BigInt(x));
  }

  #string(x) {
    const bytes = text.encoder.encode(x);
    if (bytes.length < 32) this.#number("Uint8", 0xa0 | bytes.length);
    else this.#sized(bytes.length, [0xd9, 0xda, 0xdb]);
    this.#raw(bytes);
  }

  #binary(x) {
    this.#sized(x.length, [0xc4, 0xc5, 0xc6]);
    this.#raw(x);
  }

  #array(x) {
    if (x.length < 16) this.#number("Uint8", 0x90 | x.length);
    else this.#sized(x.length, [null, 0xdc, 0xdd]);
    for (const item of x) this.value(item);
  }

  #map(x) {
    const entries = Object.entries(x).filter(([, item]) => item !== undefined);
    if (entries.length < 16) this.#number("Uint8", 0x80 | entries.length);
    else this.#sized(entries.length, [null, 0xde, 0xdf]);
    for (const [key, item] of entries) this.value(key).value(item);
  }

  /** A length behind the tag for 8, 16 or 32 bits. */
  #sized(length, [tag8, tag16, tag32]) {
    if (length < 0x100 && tag8 !== null) this.#tagged(tag8, "Uint8", length);
    else if (length < 0x10000) this.#tagged(tag16, "Uint16", length);
    else this.#tagged(tag32, "Uint32", length);
  }

  #tagged(tag, kind, x) {
    this.#number("Uint8", tag);
    this.#number(kind, x);
  }

  #number(kind, x) {
    const size = Number(kind.match(/\d+/)[0]) / 8;
    const at = this.#grow(size);
    this.#view[`set${kind}`](at, x);
  }

  #raw(bytes) {
    const at = this.#grow(bytes.length);
    this.#bytes.set(bytes, at);
  }

  /** Make room; returns where it begins. */
  #grow(size) {
    const at = this.#length;
    this.#length += size;
    if (this.#length > this.#bytes.length) {
      const larger = new Uint8Array(2 * this.#length);
      larger.set(this.#bytes);
      this.#bytes = larger;
      this.#view = new DataView(larger.buffer);
    }
    return at;
  }
}

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  value() {
    const tag = this.#number("Uint8");
    if (tag < 0x80) return tag;
    if (tag < 0x90) return this.#map(tag & 0x0f);
    if (tag < 0xa0) return this.#array(tag & 0x0f);
    if (tag < 0xc0) return this.#string(tag & 0x1f);
    if (tag >= 0xe0) return tag - 0x100;
    return this.#tagged(tag);
  }

  #tagged(tag) {
    switch (tag) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return this.#binary(this.#number("Uint8"));
      case 0xc5: return this.#binary(this.#number("Uint16"));
      case 0xc6: return this.#binary(this.#number("Uint32"));
      case 0xca: return this.#number("Float32");
      case 0xcb: return this.#number("Float64");
      case 0xcc: return this.#number("Uint8");
      case 0xcd: return this.#number("Uint16");
      case 0xce: return this.#number("Uint32");
      case 0xcf: return this.#safe(this.#number("BigUint64"));
      case 0xd0: return this.#number("Int8");
      case 0xd1: return this.#number("Int16");
      case 0xd2: return this.#number("Int32");
      case 0xd3: return this.#safe(this.#number("BigInt64"));
      case 0xd9: return this.#string(this.#number("Uint8"));
      case 0xda: return this.#string(this.#number("Uint16"));
      case 0xdb: return this.#string(this.#number("Uint32"));
      case 0xdc: return this.#array(this.#number("Uint16"));
      case 0xdd: return this.#array(this.#number("Uint32"));
      case 0xde: return this.#map(this.#number("Uint16"));
      case 0xdf: return this.#map(this.#number("Uint32"));
      default: throw new TypeError(`a MessagePack type that this page does not read: 0x${tag.toString(16)}`);
    }
  }

  #map(size) {
    const entries = [];
    for (let i = 0; i < size; i++) entries.push([this.value(), this.value()]);
    return Object.fromEntries(entries);
  }

  #array(size) {
    const items = [];
    for (let i = 0; i < size; i++) items.push(this.value());
    return items;
  }

  #string(size) {
    return text.decoder.decode(this.#binary(size));
  }

  #binary(size) {
    const at = this.#advance(size);
    return this.bytes.subarray(at, this.at);
  }

  #number(kind) {
    const at = this.#advance(Number(kind.match(/\d+/)[0]) / 8);
    return this.view[`get${kind}`](at);
  }

  #safe(x) {
    if (!Number.isSafeInteger(Number(x))) throw new RangeError(`an integer beyond 2^53: ${x}`);
    return Number(x);
  }

  #advance(size) {
    const at = this.at;
    if (at + size > this.bytes.length) throw new RangeError("the message ends too early");
    this.at += size;
    return at;
  }
}

/** A value as a Uint8Array. */
export function encode(value) {
  return new Writer().value(value).result();
}

/** The value of a Uint8Array; byte strings in it are views of that array. Throws for anything but one whole value. */
export function decode(bytes) {
  const reader = new Reader(bytes);
  const value = reader.value();
  if (reader.at !== bytes.length) throw new RangeError(`${bytes.length - reader.at} bytes follow the message`);
  return value;
}
