"""Reads a Core ML package from its files: Manifest.json, the protobuf of model.mlmodel, the blobs of weight.bin.

Independent of the writer on purpose: it shares no code with it, decodes protobuf by itself from a table of field
numbers taken from coremltools' schema (mlmodel/format/*.proto), and refuses whatever it does not know. Every problem
is a Broken with one sentence.
"""

import json
import re
import struct
from pathlib import Path

import numpy as np


class Broken(Exception):
    """The package is not what it should be."""


def require(condition, sentence):
    if not condition:
        raise Broken(sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Protobuf

# message -> field number -> (name, kind); kind: a scalar kind, a message name, [kind] where repeated, {kind} for a map
# from strings
SCHEMA = {
    "Model": {1: ("specificationVersion", "int"), 2: ("description", "ModelDescription"), 502: ("mlProgram", "Program")},
    "ModelDescription": {
        1: ("input", ["FeatureDescription"]),
        10: ("output", ["FeatureDescription"]),
        13: ("state", ["FeatureDescription"]),
        20: ("functions", ["FunctionDescription"]),
        21: ("defaultFunctionName", "string"),
        100: ("metadata", "Metadata"),
    },
    "FunctionDescription": {
        1: ("name", "string"),
        2: ("input", ["FeatureDescription"]),
        3: ("output", ["FeatureDescription"]),
        6: ("state", ["FeatureDescription"]),
    },
    "FeatureDescription": {1: ("name", "string"), 2: ("shortDescription", "string"), 3: ("type", "FeatureType")},
    "FeatureType": {5: ("multiArrayType", "ArrayFeatureType"), 8: ("stateType", "StateFeatureType")},
    "ArrayFeatureType": {1: ("shape", ["int"]), 2: ("dataType", "int")},
    "StateFeatureType": {1: ("arrayType", "ArrayFeatureType")},
    "Metadata": {1: ("shortDescription", "string"), 100: ("userDefined", {"string"})},
    "Program": {1: ("version", "int"), 2: ("functions", {"Function"})},
    "Function": {
        1: ("inputs", ["NamedValueType"]),
        2: ("opset", "string"),
        3: ("block_specializations", {"Block"}),
    },
    "Block": {2: ("outputs", ["string"]), 3: ("operations", ["Operation"])},
    "Operation": {
        1: ("type", "string"),
        2: ("inputs", {"Argument"}),
        3: ("outputs", ["NamedValueType"]),
        5: ("attributes", {"Value"}),
    },
    "Argument": {1: ("arguments", ["Binding"])},
    "Binding": {1: ("name", "string")},
    "NamedValueType": {1: ("name", "string"), 2: ("type", "ValueType")},
    "ValueType": {1: ("tensorType", "TensorType"), 5: ("stateType", "StateType")},
    "StateType": {1: ("wrappedType", "ValueType")},
    "TensorType": {1: ("dataType", "int"), 2: ("rank", "int"), 3: ("dimensions", ["Dimension"])},
    "Dimension": {1: ("constant", "ConstantDimension")},
    "ConstantDimension": {1: ("size", "int")},
    "Value": {2: ("type", "ValueType"), 3: ("immediateValue", "ImmediateValue"), 5: ("blobFileValue", "BlobFileValue")},
    "ImmediateValue": {1: ("tensor", "TensorValue")},
    "BlobFileValue": {1: ("fileName", "string"), 2: ("offset", "int")},
    "TensorValue": {
        1: ("floats", "RepeatedFloats"),
        2: ("ints", "RepeatedInts"),
        3: ("bools", "RepeatedInts"),
        4: ("strings", "RepeatedStrings"),
        7: ("bytes", "RepeatedBytes"),
    },
    "RepeatedFloats": {1: ("values", ["float"])},
    "RepeatedInts": {1: ("values", ["int"])},
    "RepeatedStrings": {1: ("values", ["string"])},
    "RepeatedBytes": {1: ("values", "bytes")},
}


def varint(data, at):
    value = shift = 0
    while True:
        require(at < len(data) and shift < 70, "protobuf: a number runs past its message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return (value - (1 << 64) if value >= 1 << 63 else value), at


def decode(message, data):
    """One message as a dict; absent repeated fields and maps are empty, other absent fields absent."""
    schema = SCHEMA[message]
    result = {}
    for name, kind in schema.values():
        if isinstance(kind, (list, set)):
            result[name] = {} if isinstance(kind, set) else []
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        require(number in schema, f"protobuf: {message} has field {number}, which nothing here should write")
        name, kind = schema[number]
        if wire == 0:
            payload, at = varint(data, at)
        elif wire == 5:
            payload, at = data[at : at + 4], at + 4
        elif wire == 2:
            length, at = varint(data, at)
            require(0 <= length <= len(data) - at, f"protobuf: {message}.{name} runs past its message")
            payload, at = data[at : at + length], at + length
        else:
            raise Broken(f"protobuf: {message}.{name} has wire type {wire}")
        if isinstance(kind, set):
            (value_kind,) = kind
            entry = decode_entry(value_kind, payload)
            require(entry[0] not in result[name], f"protobuf: {message}.{name} has key {entry[0]} twice")
            result[name][entry[0]] = entry[1]
        elif isinstance(kind, list):
            result[name].extend(decode_repeated(kind[0], wire, payload))
        else:
            require(name not in result, f"protobuf: {message}.{name} stands twice")
            result[name] = decode_one(kind, payload)
    return result


def decode_entry(kind, data):
    at, key, value = 0, "", None
    while at < len(data):
        tag, at = varint(data, at)
        require(tag in (0x0A, 0x12), "protobuf: a map entry has more than a key and a value")
        length, at = varint(data, at)
        payload, at = data[at : at + length], at + length
        if tag == 0x0A:
            key = payload.decode()
        else:
            value = decode_one(kind, payload)
    return key, decode_one(kind, b"") if value is None else value


def decode_repeated(kind, wire, payload):
    if kind == "int" and wire == 2:
        at, values = 0, []
        while at < len(payload):
            value, at = varint(payload, at)
            values.append(value)
        return values
    if kind == "float" and wire == 2:
        return list(struct.unpack(f"<{len(payload) // 4}f", payload))
    return [decode_one(kind, payload)]


def decode_one(kind, payload):
    if kind in ("int", "bytes"):
        return payload
    if kind == "string":
        return payload.decode()
    if kind == "float":
        return struct.unpack("<f", payload)[0]
    return decode(kind, payload)


# ---------------------------------------------------------------------------------------------------------------------
# weight.bin

BLOB_FP16 = 1


class Blobs:
    """The blobs of a weight file, by the offset of their records."""

    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        require(len(self.data) >= 64, "weight.bin: shorter than its header")
        count, version = struct.unpack("<II", bytes(self.data[:8]))
        require(version == 2, f"weight.bin: version {version}, not 2")
        require(not self.data[8:64].any(), "weight.bin: the header's reserved bytes are not zero")
        self.at = {}
        end = 64
        for _ in range(count):
            record = -(-end // 64) * 64
            require(not self.data[end:record].any(), f"weight.bin: bytes between blobs before {record} are not zero")
            end = self.read(record)
        require(len(self.data) == -(-end // 64) * 64, f"weight.bin: {len(self.data)} bytes, the blobs end at {end}")

    def read(self, record):
        require(record + 64 <= len(self.data), f"weight.bin: the record at {record} runs past the file")
        magic, dtype, size, offset, padding = struct.unpack("<IIQQQ", bytes(self.data[record : record + 32]))
        require(magic == 0xDEADBEEF, f"weight.bin: no record at {record}")
        require(dtype == BLOB_FP16, f"weight.bin: the blob at {record} has data type {dtype}")
        require(padding == 0 and not self.data[record + 32 : record + 64].any(), f"weight.bin: record {record}: padding")
        require(offset == record + 64, f"weight.bin: the record at {record} says its data is at {offset}")
        require(offset + size <= len(self.data), f"weight.bin: the blob at {record} runs past the file")
        self.at[record] = self.data[offset : offset + size].view(np.float16)
        return offset + size


# ---------------------------------------------------------------------------------------------------------------------
# The package

ITEM_KEYS = {"author", "description", "name", "path"}
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_@]*\Z")
RESERVED = set(
    "any bool program func tensor list dict tuple true false string bf16 fp16 fp32 fp64 int8 int16 int32 int64 uint8 "
    "uint16 uint32 uint64 state".split()
)


class Package:
    """A package's protobuf and blobs, with its Manifest.json checked as Apple's ModelPackage does."""

    def __init__(self, path):
        path = Path(path)
        manifest = json.loads((path / "Manifest.json").read_text())
        require(manifest.get("fileFormatVersion") == "1.0.0", "Manifest.json: fileFormatVersion")
        items = manifest.get("itemInfoEntries", {})
        for item in items.values():
            require(set(item) == ITEM_KEYS, f"Manifest.json: an item has keys {sorted(item)}")
            require(item["path"] == f"{item['author']}/{item['name']}", f"Manifest.json: path {item['path']}")
            require((path / "Data" / item["path"]).exists(), f"Manifest.json: {item['path']} does not exist")
        root = items.get(manifest.get("rootModelIdentifier"))
        require(root is not None, "Manifest.json: rootModelIdentifier names no item")
        names = sorted(item["name"] for item in items.values())
        require(names == ["model.mlmodel", "weights"], f"Manifest.json: items {names}")
        found = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        data = "Data/com.apple.CoreML"
        expected = sorted(["Manifest.json", f"{data}/model.mlmodel", f"{data}/weights/weight.bin"])
        require(found == expected, f"the package holds {found}")
        self.model = decode("Model", (path / "Data" / root["path"]).read_bytes())
        self.blobs = Blobs(path / "Data/com.apple.CoreML/weights/weight.bin")


def check_name(name):
    require(NAME.match(name) and name not in RESERVED, f"{name!r} is not a name Core ML takes")
