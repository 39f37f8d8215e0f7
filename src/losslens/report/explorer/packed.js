"use strict";
// Reads what report/binary_pack.py wrote: a header, and arrays by name.
class Packed {
  static async from(text) {
    const zipped = atob(text);
    const bytes = new Uint8Array(zipped.length);
    for (let i = 0; i < zipped.length; i++) bytes[i] = zipped.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Packed(await new Response(stream).arrayBuffer());
  }

  constructor(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    this.header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    this.buffer = buffer;
    this.arrays = new Map();
    let start = 4 + length;
    for (const block of this.header.blocks) {
      const size = block.shape.reduce((product, side) => product * side, 1);
      this.arrays.set(block.name, {...block, start, size});
      start += size * Number(block.kind[1]);
    }
  }

  // Returns the number at an index of an array; NaN if there is no such index or array.
  at(name, ...place) {
    const array = this.arrays.get(name);
    if (!array || place.some((where, side) => !(where >= 0 && where < array.shape[side]))) return NaN;
    array.values ??= this.read(array);
    const value = array.values[place.reduce((index, where, side) => index * array.shape[side] + where, 0)];
    if (array.kind === "f4") return value;
    return value === (array.kind === "i2" ? -(2 ** 15) : -(2 ** 31)) ? NaN : value / 10 ** array.digits;
  }

  side(name, number) {
    return this.arrays.get(name).shape[number];
  }

  any(name) {
    const array = this.arrays.get(name);
    if (!array) return false;
    for (let i = 0; i < array.size; i++) {
      array.values ??= this.read(array);
      const value = array.values[i];
      if (array.kind === "f4" ? value === value : value !== (array.kind === "i2" ? -(2 ** 15) : -(2 ** 31))) return true;
    }
    return false;
  }

  read({start, size, kind}) {
    const width = Number(kind[1]);
    const planes = new Uint8Array(this.buffer, start, size * width);
    const bytes = new Uint8Array(size * width);
    for (let plane = 0, from = 0; plane < width; plane++) {
      for (let to = plane; to < bytes.length; to += width) bytes[to] = planes[from++];
    }
    return new {i2: Int16Array, i4: Int32Array, f4: Float32Array}[kind](bytes.buffer);
  }
}
