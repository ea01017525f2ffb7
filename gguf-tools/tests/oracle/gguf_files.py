"""llama.cpp's own Python reader and writer as an oracle for ours: gguf_files.py BIN_FOLDER

1. Models written by dim-synth and slices cut by dim-split are read by the `gguf` package. Every key (type and
   value) and every tensor (name, type, shape, bytes) of the slices is compared with the model's, and every digest
   is computed again from its definition: of tensors, of the model, of the slice.
2. A model written by the `gguf` package, with values of every type, is cut by dim-split and compared the same way.
3. Models in every type that dim-synth writes go through dim-dequantise: each tensor is what the `gguf` package reads
   out of the quantised one, bit for bit, rounded by numpy; and a trained model, where `.ci/model` has fetched one.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

MIDDLES = ["1..2", "3..3"]
TOP = Path(__file__).resolve().parents[3]


def run(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def keys(reader):
    """Key -> (types, bytes of the value as they stand in the file), in file order."""
    found = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        # parts: key length, key, type, then the value's own
        value = b"".join(part.tobytes() for part in field.parts[3:])
        found[name] = ([t.name for t in field.types], value)
    return found


def tensor_bytes(tensor):
    return numpy.ascontiguousarray(tensor.data).tobytes()


def identity(reader):
    sha = hashlib.sha256()
    for tensor in reader.tensors:
        name, shape = tensor.name.encode(), [int(d) for d in tensor.shape]
        sha.update(struct.pack("<Q", len(name)) + name)
        sha.update(struct.pack("<II", int(tensor.tensor_type), len(shape)))
        sha.update(struct.pack(f"<{len(shape)}Q", *shape))
        sha.update(hashlib.sha256(tensor_bytes(tensor)).digest())
    return sha.hexdigest()


def text(reader, key):
    return reader.fields[key].contents()


def check_digests(path, reader, entry, model, manifest):
    assert path.stat().st_size == entry["bytes"], path

    # digests, from their definition
    digests = text(reader, "dim.tensor_sha256")
    assert digests == [hashlib.sha256(tensor_bytes(t)).hexdigest() for t in reader.tensors], path
    assert text(reader, "dim.model.sha256") == manifest["model"]["sha256"] == identity(model), path
    header = path.read_bytes()[: int(reader.data_offset)]
    own_digest = text(reader, "dim.slice.sha256").encode()
    assert header.count(own_digest) == 1, path
    assert hashlib.sha256(header.replace(own_digest, b"0" * 64)).hexdigest() == own_digest.decode() == entry["sha256"]

    assert text(reader, "dim.role") == entry["role"]
    assert [text(reader, f"dim.{end}_block") for end in ("first", "last")] == [entry["first"], entry["last"]]


def check_slice(path, entry, model, model_keys, model_tensors, manifest):
    """A slice that keeps the model's numbers, names and keys, and says what it lacks."""
    reader = GGUFReader(path)
    check_digests(path, reader, entry, model, manifest)
    found, role = keys(reader), entry["role"]
    assert text(reader, "dim.version") == 2
    carried = [k for k in model_keys if role != "middle" or not k.startswith("tokenizer.")]
    vocab_size = f"{manifest['model']['arch']}.vocab_size"
    changed = {"tokenizer.ggml.model", vocab_size} if role == "middle" else set()
    assert [k for k in found if not k.startswith("dim.") and k not in changed] == [k for k in carried if k not in changed]
    for key in set(carried) - changed:
        assert found[key] == model_keys[key], f"{path}: {key}"
    if role == "middle":
        assert text(reader, "tokenizer.ggml.model") == "none"
        assert text(reader, vocab_size) == manifest["model"]["n_vocab"]

    held = {t.name: t for t in reader.tensors}
    names, types = text(reader, "dim.absent.names"), text(reader, "dim.absent.types")
    shapes = text(reader, "dim.absent.shapes")
    absent = {n: (types[i], shapes[4 * i : 4 * i + 4]) for i, n in enumerate(names)}
    assert not held.keys() & absent.keys() and held.keys() | absent.keys() == model_tensors.keys(), path
    for name, original in model_tensors.items():
        shape = [int(d) for d in original.shape]
        if name.startswith("blk."):
            assert (entry["first"] <= int(name.split(".")[1]) <= entry["last"]) == (name in held), f"{path}: {name}"
        if name in held:
            assert held[name].tensor_type == original.tensor_type, name
            assert [int(d) for d in held[name].shape] == shape, name
            assert tensor_bytes(held[name]) == tensor_bytes(original), name
        else:
            assert absent[name] == (int(original.tensor_type), shape + [1] * (4 - len(shape))), f"{path}: {name}"
    return len(held)


def check_renumbered(path, entry, model, model_keys, model_tensors, manifest):
    """A slice that is a model of its own."""
    reader = GGUFReader(path)
    check_digests(path, reader, entry, model, manifest)
    arch = manifest["model"]["arch"]
    tied = "output.weight" not in model_tensors
    own = any(t.name == "output.weight" for t in reader.tensors)

    # keys
    found = keys(reader)
    role = entry["role"]
    assert text(reader, "dim.version") == 1
    changed = {f"{arch}.block_count"}
    if role == "middle":
        changed |= {"tokenizer.ggml.model", f"{arch}.vocab_size"}
    if role != "head":
        changed |= {f"{arch}.embedding_scale"}
    carried = [k for k in model_keys if role != "middle" or not k.startswith("tokenizer.") or k in changed]
    ours = [k for k in found if not k.startswith("dim.")]
    added = {f"{arch}.{k}" for k in ("vocab_size", "embedding_scale", "residual_scale")}
    assert [k for k in ours if k in model_keys] == carried, path
    assert set(ours) - set(carried) <= added, path
    for key in carried:
        per_block = key.startswith(f"{arch}.") and "ARRAY" in found[key][0]
        if per_block:
            # one number per block: those of the slice's blocks
            assert found[key][0] == model_keys[key][0], f"{path}: {key}"
            assert text(reader, key) == text(model, key)[entry["first"] : entry["last"] + 1], f"{path}: {key}"
        elif key not in changed:
            assert found[key] == model_keys[key], f"{path}: {key}"
    assert text(reader, f"{arch}.block_count") == entry["last"] - entry["first"] + 1

    # tensors
    for tensor in reader.tensors:
        source = tensor.name
        if source.startswith("blk."):
            _, number, rest = source.split(".", 2)
            source = f"blk.{int(number) + entry['first']}.{rest}"
        elif source == "token_embd.weight" and role == "tail" and not tied and not own:
            source = "output.weight"
        original = model_tensors[source]
        row = tensor_bytes(original)[: len(tensor_bytes(tensor))]
        if own and (tensor.name, role) in (("output.weight", "head"), ("token_embd.weight", "tail")):
            assert list(tensor.shape) == list(original.shape) and set(tensor_bytes(tensor)) == {0}, source
        elif role == "middle" and tensor.name in ("token_embd.weight", "output.weight", "output.bias"):
            assert tensor_bytes(tensor) == row and tensor.tensor_type == original.tensor_type, source
        else:
            assert list(tensor.shape) == list(original.shape), source
            assert tensor.tensor_type == original.tensor_type, source
            assert tensor_bytes(tensor) == tensor_bytes(original), source
    return len(reader.tensors)


def check_cut(binaries, path, folder, renumber):
    middles = [option for middle in MIDDLES for option in ("--middle", middle)]
    run(binaries / "dim-split", path, *middles, "--out", folder, "--verify", *(["--renumber"] if renumber else []))
    check = check_renumbered if renumber else check_slice
    manifest = json.loads((folder / f"{path.stem}.split.json").read_text())
    model = GGUFReader(path)
    model_keys, model_tensors = keys(model), {t.name: t for t in model.tensors}
    tensors = sum(
        check(folder / entry["file"], entry, model, model_keys, model_tensors, manifest)
        for entry in manifest["slices"]
    )
    return len(manifest["slices"]), tensors


def write_model(path):
    """A model with every type of value, strings that are no UTF-8, and tensors of several types."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("caf\u00e9")
    writer.add_block_count(5)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length([256] * 5)
    writer.add_head_count(4)
    writer.add_head_count_kv([4] * 5)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint8("x.u8", 255)
    writer.add_int8("x.i8", -128)
    writer.add_uint16("x.u16", 65535)
    writer.add_int16("x.i16", -32768)
    writer.add_uint64("x.u64", 2**64 - 1)
    writer.add_int64("x.i64", -(2**63))
    writer.add_float64("x.f64", 1e300)
    writer.add_bool("x.bool", True)
    writer.add_array("x.bools", [True, False])
    writer.add_array("x.strings", ["", "\u00fc", "z"])
    writer.add_array("x.floats", [0.5, -1.0])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"\xff\xfe", b"\x00x"] + [f"t{i}".encode() for i in range(62)])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)

    random = numpy.random.default_rng(1)
    quant = GGMLQuantizationType

    def matrix(name, rows, columns, kind=quant.F16):
        if kind == quant.F16:
            writer.add_tensor(name, random.standard_normal((rows, columns)).astype(numpy.float16))
        else:
            row_bytes = {quant.Q8_0: 34 * columns // 32, quant.Q4_K: 144 * columns // 256}[kind]
            raw = random.integers(0, 256, (rows, row_bytes), dtype=numpy.uint8)
            writer.add_tensor(name, raw, raw_dtype=kind)

    matrix("token_embd.weight", 64, 256, quant.Q8_0)
    matrix("output.weight", 64, 256)
    writer.add_tensor("output_norm.weight", numpy.ones(256, numpy.float32))
    writer.add_tensor("rope_freqs.weight", numpy.ones(32, numpy.float32))
    for block in range(5):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", numpy.full(256, block, numpy.float32))
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", numpy.ones(256, numpy.float32))
        matrix(f"blk.{block}.attn_q.weight", 256, 256, quant.Q4_K)
        matrix(f"blk.{block}.attn_k.weight", 256, 256)
        matrix(f"blk.{block}.attn_v.weight", 256, 256, quant.Q8_0)
        matrix(f"blk.{block}.attn_output.weight", 256, 256)
        matrix(f"blk.{block}.ffn_gate.weight", 256, 256)
        matrix(f"blk.{block}.ffn_up.weight", 256, 256)
        matrix(f"blk.{block}.ffn_down.weight", 256, 256, quant.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_per_block(folder):
    """Lists with a number per block went with their blocks."""
    middle = GGUFReader(folder / "python.middle-1..2.gguf")
    assert text(middle, "llama.feed_forward_length") == [256, 256]
    assert text(middle, "llama.attention.head_count_kv") == [4, 4]
    assert middle.fields["llama.attention.head_count_kv"].types[1] == GGUFValueType.INT32


PLAIN = {"f16": (GGMLQuantizationType.F16, numpy.float16), "f32": (GGMLQuantizationType.F32, numpy.float32)}


def check_dequantised(binaries, path, folder):
    """How many tensors were converted, in both types."""
    model, converted = GGUFReader(path), 0
    for to, (kind, dtype) in PLAIN.items():
        out = folder / "plain.gguf"
        run(binaries / "dim-dequantise", path, out, "--type", to, "-q")
        plain = GGUFReader(out)
        was, now = keys(model), keys(plain)
        changed = {key for key in was if was[key] != now[key]}
        assert list(was) == list(now) and changed <= {"general.file_type"}, f"{path}: {changed}"
        for before, after in zip(model.tensors, plain.tensors, strict=True):
            assert before.name == after.name and list(before.shape) == list(after.shape), f"{path}: {before.name}"
            if before.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                assert tensor_bytes(before) == tensor_bytes(after), f"{path}: {before.name}"
                continue
            values = dequantize(before.data, before.tensor_type).astype(dtype)
            assert after.tensor_type == kind and values.tobytes() == tensor_bytes(after), f"{path}: {before.name}"
            converted += 1
        out.unlink()
    return converted


def main():
    binaries = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [("qwen2", kind) for kind in ("f32", "f16", "bf16", "q8_0", "q4_k_m", "q6_k")]
        models += [(arch, "f16") for arch in ("llama", "qwen3", "qwen3moe", "olmo2", "phi2", "minicpm", "gptneox")]
        slices = tensors = 0
        for arch, kind in models:
            path = folder / f"{arch}-{kind}.gguf"
            run(binaries / "dim-synth", path, "--shape", "tiny", "--arch", arch, "--type", kind, "-q")
            for renumber in (False, True):
                counts = check_cut(binaries, path, folder / path.stem, renumber)
                slices, tensors = slices + counts[0], tensors + counts[1]
        path = folder / "python.gguf"
        write_model(path)
        for renumber in (False, True):
            counts = check_cut(binaries, path, folder / "python", renumber)
            slices, tensors = slices + counts[0], tensors + counts[1]
        check_per_block(folder / "python")
        quantised = [folder / "qwen2-q8_0.gguf", folder / "qwen2-q4_k_m.gguf", folder / "qwen2-q6_k.gguf"]
        for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k", "iq4_nl"):
            quantised.append(folder / f"{kind}.gguf")
            run(binaries / "dim-synth", quantised[-1], "--shape", "tiny", "--type", kind, "-q")
        real = subprocess.run(["sh", TOP / ".ci/model", "--path"], capture_output=True, text=True).stdout.strip()
        quantised += [Path(real)] if real else []
        converted = sum(check_dequantised(binaries, path, folder) for path in quantised)
        print(f"dequantised: {len(quantised)} models, {converted} tensors agree with the gguf package")
        print(f"gguf files: {len(models) + 1} models, {slices} slices, {tensors} tensors agree with the gguf package")


if __name__ == "__main__":
    main()
