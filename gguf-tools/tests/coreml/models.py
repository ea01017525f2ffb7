"""Model files for the checks, made from dim-synth's by rewriting them with gguf-py."""

import json
import subprocess

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize


def bf16(x):
    """Rounded to BF16's precision: what published checkpoints hold."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def rewrite(source, target, as_f32=False, n_blocks=None, keys=None, scale=None, extra=None):
    """Copies a GGUF with its vectors rounded to BF16, as published models' are.

    as_f32 stores every tensor as F32, of the same values: llama.cpp then computes in F32 throughout, where for F16
    weights it rounds activations to F16. `n_blocks` keeps only so many, from the first. `keys` replaces or adds keys (GGUF type and value by name); `scale` multiplies
    chosen rows of tensors, as {name: (rows, factor)}; `extra` adds F32 tensors by name.
    """
    reader = GGUFReader(source)
    arch = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, arch)
    keys = dict(keys or {})
    if n_blocks is not None:
        keys[f"{arch}.block_count"] = (GGUFValueType.UINT32, n_blocks)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name in keys:
            continue
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for name, (kind, value) in keys.items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else None
        if n_blocks is not None and block is not None and int(block) >= n_blocks:
            continue
        shape = [int(d) for d in tensor.shape[::-1]]
        kind, data = tensor.tensor_type, tensor.data
        rows, factor = (scale or {}).get(tensor.name, ([], 1))
        if len(shape) == 1 or as_f32 or rows:
            values = dequantize(data, kind).reshape(shape).astype(np.float32)
            values[rows] *= np.float32(factor)
            if len(shape) == 1:
                values = bf16(values)
            if len(shape) == 1 or as_f32:
                writer.add_tensor(tensor.name, values)
            else:
                writer.add_tensor(tensor.name, values.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Tools:
    """The programs under test."""

    def __init__(self, folder):
        self.folder = folder

    def run(self, name, *args):
        command = [str(self.folder / name), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-600:]}")
        return done

    def synth(self, path, *args):
        self.run("dim-synth", path, "-q", *args)
        return path

    def split(self, model, blocks, out, *args):
        """Cuts a model with --coreml; the directory of packages, and what --json says."""
        first, last = blocks
        done = self.run(
            "dim-split", model, "--middle", f"{first}..{last}", "--out", out, "--json", "--coreml", *args
        )
        report = json.loads(done.stdout)
        return out / f"{model.stem}.middle-{first}..{last}.coreml", report

    def truth(self, model, blocks, scale, steps, n_embd, scratch):
        """llama.cpp's rows for steps {"session", "rewind", "tokens"}: per step (rows fed, rows computed)."""
        (scratch / "steps.json").write_text(json.dumps(steps))
        self.run("examples/coreml-oracle", model, *blocks, scale, scratch / "steps.json", scratch / "truth.f32")
        data = np.fromfile(scratch / "truth.f32", dtype="<f4").astype(np.float64)
        (scratch / "truth.f32").unlink()
        at, rows = 0, []
        for step in steps:
            n = len(step["tokens"])
            pair = data[at : at + 2 * n * n_embd].reshape(2, n, n_embd)
            rows.append((pair[0], pair[1]))
            at += 2 * n * n_embd
        assert at == len(data)
        return rows
