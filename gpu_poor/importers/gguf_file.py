"""Reading GGUF files: metadata and tensors. Only what is asked for is read; nothing is executed.

    "GGUF", version 2 or 3, counts; metadata: key, type, value; tensors: name, sizes (the fastest
    running first), type, offset; then the data, aligned to general.alignment.

Source: docs/gguf.md of ggml. Every length is checked against the size of the file.
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_poor import memory
from gpu_poor.importers.gguf_blocks import TYPES, BlockType

#: Metadata types with a fixed size, by number.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: Longest name, and most dimensions, that ggml has.
MAX_NAME, MAX_DIMS = 1 << 16, 4


class Entry(NamedTuple):
    """A tensor in the file; shape as in torch, the fastest running last."""

    shape: tuple[int, ...]
    type: BlockType
    offset: int
    n_bytes: int


class GgufFile:
    """The metadata and tensors of a file.

    Raises:
        ValueError: it is none, is truncated, or contradicts itself; names the file and the place.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ValueError(f"{path} is no GGUF file: it has {size} bytes")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.at = 0
        if self.data[:4] != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it begins with {self.data[:4]!r}")
        self.at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported, 2 and 3 are")
        tensors, keys = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, object] = {}
        for _ in range(keys):
            key = self._string("a metadata key", MAX_NAME)
            self.metadata[key] = self._value(key, self._scalar("I"))
        self.tensors: dict[str, Entry] = {}
        self._read_entries(tensors)

    def _read_entries(self, count: int) -> None:
        found = {}
        for _ in range(count):
            name = self._string("a tensor's name", MAX_NAME)
            dims = self._scalar("I")
            if not 1 <= dims <= MAX_DIMS:
                raise ValueError(f"{self.path}: {name} has {dims} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(dims)]))
            number, offset = self._scalar("I"), self._scalar("Q")
            if name in found:
                raise ValueError(f"{self.path}: {name} is there twice")
            found[name] = (shape, number, offset)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        for name, (shape, number, offset) in found.items():
            if number not in TYPES:
                known = ", ".join(kind.name for kind in TYPES.values())
                what = UNSUPPORTED.get(number, f"number {number}")
                raise ValueError(f"{self.path}: {name} is of type {what}; known are {known}")
            kind, elements = TYPES[number], 1
            for length in shape:
                elements *= length
            if shape[-1] % kind.elements:
                raise ValueError(
                    f"{self.path}: {name} has rows of {shape[-1]}, {kind.name} comes in blocks of "
                    f"{kind.elements}"
                )
            n_bytes = elements // kind.elements * kind.n_bytes
            if start + offset + n_bytes > len(self.data):
                raise ValueError(
                    f"{self.path} is truncated: {name} ends at byte {start + offset + n_bytes}, "
                    f"the file at {len(self.data)}"
                )
            self.tensors[name] = Entry(shape, kind, start + offset, n_bytes)

    def blocks(self, name: str) -> Tensor:
        """The bytes of a tensor: uint8 ``[blocks, bytes of a block]``, a copy."""
        entry = self.tensors[name]
        if not entry.n_bytes:
            raise ValueError(f"{self.path}: {name} is empty")
        mapped = torch.frombuffer(
            self.data, dtype=torch.uint8, count=entry.n_bytes, offset=entry.offset
        )
        copy = mapped.view(-1, entry.type.n_bytes).clone()
        memory.drop_file_pages(mapped)
        return copy

    # -- the pieces of the header ----------------------------------------------------------------

    def _take(self, n_bytes: int, what: str) -> int:
        """The position of the next bytes, if the file has so many."""
        at = self.at
        if n_bytes > len(self.data) - at:
            raise ValueError(f"{self.path} is truncated: it ends within {what}, at byte {at}")
        self.at = at + n_bytes
        return at

    def _scalar(self, code: str, what: str = "its header"):
        at = self._take(struct.calcsize(code), what)
        return struct.unpack_from(f"<{code}", self.data, at)[0]

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._scalar("Q", what)
        if limit is not None and length > limit:
            raise ValueError(f"{self.path}: {what} of {length} bytes")
        at = self._take(length, what)
        return self.data[at : at + length].decode("utf-8", "replace")

    def _value(self, key: str, kind: int):
        if kind in SCALARS:
            return self._scalar(SCALARS[kind], key)
        if kind == STRING:
            return self._string(key)
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {key} has the unknown type {kind}")
        inner, length = self._scalar("I", key), self._scalar("Q", key)
        if inner in SCALARS:
            at = self._take(length * struct.calcsize(SCALARS[inner]), key)
            return list(struct.unpack_from(f"<{length}{SCALARS[inner]}", self.data, at))
        if inner != STRING:
            raise ValueError(f"{self.path}: {key} is an array of the unknown type {inner}")
        if length > len(self.data):
            raise ValueError(f"{self.path} is truncated: {key} has {length} strings")
        return [self._string(key) for _ in range(length)]


#: Names of types that are known to be unsupported, for errors.
UNSUPPORTED = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip
