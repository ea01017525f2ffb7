"""Checks the Core ML packages that dim-split writes: `run.sh` calls it with the folder of the programs.

Per model: the packages are checked statically; coremltools' own type inference is run over them and compared with
every declared type; the evaluator runs them in float64 and with fp16 rounding over two sessions, prefill and decode
mixed, a rewind in the middle, up to the context's last position; rows are compared with llama.cpp's F32 evaluation of
the same blocks, states with a plain reference that is itself compared with llama.cpp. Then packages are broken on
purpose, and each must be caught.
"""

import argparse
import hashlib
import io
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

import faults
import reference
from evaluator import Broken
from models import Tools, rewrite
from worker import PackageSet, Session

# Relative differences that are allowed. The packages in float64 differ from llama.cpp by what the writer rounds to fp16
# (weights that are not, cos and sin); with fp16 everywhere, by every operation's rounding too. The plain reference rounds
# nothing: it shows how well llama.cpp's F32 is met at all.
ROWS = {"plain": 1e-5, "exact": 1e-3, "fp16": 4e-3}
STATE = {"exact": 5e-4, "fp16": 2e-3}
UPDATE = 4e-3  # of a package's update of a self-test row, the median, fp16
EXACT = ROWS["exact"]
N_CTX, N_PREFILL = 64, 8
FIGURES = []
TOP = Path(__file__).resolve().parents[3]


def relative(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def worst_row(x, y):
    return float(np.max(np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)))


def schedule(n_ctx, n_vocab, seed=1):
    """Two sessions in turns, chunks of many lengths, rewinds, and the last positions of the context."""
    rng = random.Random(seed)
    steps, lengths = [], {0: 0, 1: 0}

    def step(session, n, rewind=None):
        if rewind is not None:
            lengths[session] = rewind
        lengths[session] += n
        tokens = [rng.randrange(n_vocab) for _ in range(n)]
        steps.append({"session": session, "rewind": rewind, "tokens": tokens})

    step(0, 21)
    for _ in range(3):
        step(0, 1)
    step(1, 8)
    step(1, 1)
    step(0, 12)
    step(0, 5, rewind=20)
    step(1, 17, rewind=3)
    step(0, 1)
    step(0, n_ctx - lengths[0] - 5)
    for _ in range(5):
        step(0, 1)
    assert lengths[0] == n_ctx
    return steps


class Case:
    """A model cut with --coreml, and llama.cpp's rows for the schedule. `synth`: what dim-synth is to write, or a file."""

    def __init__(self, tools, scratch, name, blocks, synth, split=(), n_ctx=N_CTX, n_prefill=N_PREFILL, **change):
        self.name, self.blocks = name, blocks
        base = synth if isinstance(synth, Path) else tools.synth(scratch / "base.gguf", *synth)
        self.model = scratch / f"{name}.gguf"
        rewrite(base, self.model, **change)
        flags = ["--coreml-ctx", n_ctx, "--coreml-prefill", n_prefill, *split]
        started = time.time()
        self.directory, self.report = tools.split(self.model, blocks, scratch / name, *flags)
        self.seconds = time.time() - started
        self.packages = PackageSet(self.directory)
        n_embd, scale = self.packages.manifest["dims"]["n_embd"], self.packages.manifest["residual_scale"]
        self.steps = schedule(n_ctx, 256)
        twin = scratch / "twin.gguf"
        rewrite(base, twin, as_f32=True, n_blocks=blocks[1] + 1, **change)
        base.unlink()
        self.rows = tools.truth(twin, blocks, scale, self.steps, n_embd, scratch)
        twin.unlink()

    def sessions(self, make):
        """The schedule through sessions: rows computed, per step, and the sessions."""
        sessions = [make(), make()]
        out = []
        for step, (fed, _) in zip(self.steps, self.rows):
            session = sessions[step["session"]]
            if step["rewind"] is not None:
                session.rewind(step["rewind"])
            out.append(session.feed(fed))
        return out, sessions

    def evaluate(self, mode, packages=None):
        return self.sessions(lambda: Session(packages or self.packages, mode))

    def expected(self):
        return [computed for _, computed in self.rows]

    def plain(self):
        """Rows and caches of the plain reference, in float64."""
        blocks = reference.Blocks(self.model, *self.blocks)
        out, sessions = self.sessions(blocks.session)
        return out, [s.cache() for s in sessions]

    # channels of the residual stream whose updates drown in fp16's spacing at their own size
    loud = []

    def figures(self):
        """Relative differences. Per mode: all rows, updates (out - in) and the worst single row against llama.cpp; the
        worst single row and the state against the plain reference."""
        fed = np.concatenate([f for f, _ in self.rows])
        expected = np.concatenate(self.expected())
        update = lambda out: np.delete(out - fed, self.loud, axis=1)
        plain, caches = self.plain()
        plain = np.concatenate(plain)
        figures = {"plain": (relative(plain, expected), relative(update(plain), update(expected)), worst_row(plain, expected))}
        for mode in ("exact", "fp16"):
            out, sessions = self.evaluate(mode)
            out = np.concatenate(out)
            assert np.isfinite(out).all()
            scaled = [s.cache() for s in sessions]
            state = max(relative(s, c) for s, c in zip(scaled, caches))
            figures[mode] = (
                relative(out, expected),
                relative(update(out), update(expected)),
                worst_row(out, expected),
                worst_row(out, plain),
                state,
            )
        return figures


def infer_types(directory):
    """coremltools' type inference over a package; the number of values whose type it agrees with."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil import types
    from coremltools.proto import Model_pb2

    data = directory / "Data/com.apple.CoreML"
    spec = Model_pb2.Model()
    spec.ParseFromString((data / "model.mlmodel").read_bytes())
    names = {10: types.fp16, 11: types.fp32, 23: types.int32, 1: types.bool, 2: types.str}
    compared = 0
    for name, function in spec.mlProgram.functions.items():
        # one function at a time: it would let the second one's values shadow the first one's
        single = Model_pb2.Model()
        single.CopyFrom(spec)
        for other in list(single.mlProgram.functions):
            if other != name:
                del single.mlProgram.functions[other]
        program = load(single, specification_version=9, file_weights_dir=str(data / "weights"))
        found = {}
        for operation in program.functions[name].operations:
            for output in operation.outputs:
                found[output.name] = (output.dtype, tuple(output.shape) if output.rank else ())
        block = function.block_specializations[function.opset]
        state_reads = 0
        for operation in block.operations:
            if operation.type == "const":
                continue
            for output in operation.outputs:
                tensor = output.type.tensorType
                declared = (names[tensor.dataType], tuple(d.constant.size for d in tensor.dimensions))
                if operation.type == "read_state" and output.name not in found:
                    state_reads += 1  # coremltools sees a write and the read after it as one operation
                    continue
                assert found[output.name] == declared, f"{output.name}: {declared}, inferred {found[output.name]}"
                compared += 1
        writes = sum(o.type == "write_state" for o in block.operations)
        assert state_reads <= writes, f"{state_reads} reads of the state were not inferred, for {writes} writes"
        assert set(program.functions[name].inputs) == {i.name for i in function.inputs}
    return compared


def rehash(directory):
    """Makes the manifest's hashes those of the files as they are, so that only their meaning differs."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for package in manifest["packages"]:
        for file in package["files"]:
            data = (directory / package["directory"] / file["path"]).read_bytes()
            file["bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))


class Checks(unittest.TestCase):
    tools = scratch = None

    def case(self, name, *args, **kwargs):
        folder = self.scratch / name
        folder.mkdir()
        self.addCleanup(shutil.rmtree, folder)
        return Case(self.tools, folder, name, *args, **kwargs)

    def assert_agrees(self, case, selftest=True):
        figures = case.figures()
        FIGURES.append((case.name, figures))
        for mode, limit in ROWS.items():
            self.assertLess(max(figures[mode][:4]), limit, mode)
        for mode, limit in STATE.items():
            self.assertLess(figures[mode][4], limit, mode)
        compared = sum(infer_types(case.directory / p["directory"]) for p in case.packages.manifest["packages"])
        self.assertGreater(compared, 60)
        if selftest:
            self.assert_selftest(case)

    def assert_selftest(self, case):
        """The vectors, as a phone would use them: package by package, the update of each row."""
        test = case.packages.manifest["selftest"]
        fed, expected = case.packages.selftest_rows("f16"), case.packages.selftest_rows("f32")
        self.assertEqual(len(fed), len(case.packages.programs) + 1)
        scale = case.packages.manifest["residual_scale"]
        self.assertTrue(np.abs(expected[0]).max() <= test["max_abs_hidden"][0] * scale)
        for i, program in enumerate(case.packages.programs):
            session = Session(case.packages, "fp16")
            session.packages = type("One", (), {"programs": [program], "manifest": {**case.packages.manifest, "residual_scale": 1}})
            session.states = [program.new_state()]
            n = test["n_prefill_rows"]
            out = [session.feed(fed[i][:n])] + [session.feed(fed[i][r : r + 1]) for r in range(n, test["n_rows"])]
            update = np.concatenate(out) - fed[i]
            wanted = expected[i + 1].astype(np.float64) - fed[i]
            error = np.linalg.norm(update - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
            cosine = (update * wanted).sum(1) / np.linalg.norm(update, axis=1) / np.linalg.norm(wanted, axis=1)
            self.assertLess(np.median(error), UPDATE)  # a worker takes 2e-2
            self.assertGreater(cosine.min(), 0.9999)

    # -- agreement with llama.cpp

    def test_qwen2_in_two_packages(self):
        case = self.case("qwen2", (2, 4), ["--arch", "qwen2"], split=["--coreml-max-bytes", "2800000"])
        self.assertEqual([p["last_block"] for p in case.packages.manifest["packages"]], [3, 4])
        self.assert_agrees(case)

    def test_llama(self):
        case = self.case("llama", (1, 2), ["--arch", "llama"])
        orders = {w["name"].split(".", 2)[2]: w["order"] for w in case.packages.manifest["packages"][0]["weights"]}
        self.assertEqual(orders["attn_q.weight"], "pairs-to-halves")
        self.assertEqual(orders["attn_v.weight"], "as-is")
        self.assert_agrees(case)

    def test_llama_with_frequency_factors(self):
        factors = np.array([1, 1, 1, 1.3, 1.9, 2.7, 4, 5.5, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8])
        base = self.scratch / "probe.gguf"
        self.tools.synth(base, "--arch", "llama")
        from gguf import GGUFReader

        reader = GGUFReader(base)
        head_dim = reader.get_field("llama.embedding_length").contents() // reader.get_field("llama.attention.head_count").contents()
        has = any(t.name == "rope_freqs.weight" for t in reader.tensors)
        extra = None if has else {"rope_freqs.weight": factors[: head_dim // 2]}
        case = self.case("llama-factors", (1, 2), ["--arch", "llama"], extra=extra)
        self.assertTrue(case.packages.manifest["rope"]["freq_factors"])
        self.assert_agrees(case)

    def test_qwen3(self):
        case = self.case("qwen3", (2, 3), ["--arch", "qwen3"])
        self.assertTrue(case.packages.manifest["dims"]["qk_norm"])
        self.assert_agrees(case)

    def test_mistral(self):
        self.assert_agrees(self.case("mistral", (2, 3), ["--arch", "mistral3"]))

    def test_linear_scaling(self):
        keys = {
            "qwen2.rope.scaling.type": (GGUFValueType.STRING, "linear"),
            "qwen2.rope.scaling.factor": (GGUFValueType.FLOAT32, 4.0),
        }
        case = self.case("linear", (2, 3), ["--arch", "qwen2"], keys=keys)
        self.assertEqual(case.packages.manifest["rope"]["scaling"], "linear")
        self.assert_agrees(case)

    def test_yarn_scaling(self):
        keys = {
            "mistral3.rope.scaling.type": (GGUFValueType.STRING, "yarn"),
            "mistral3.rope.scaling.factor": (GGUFValueType.FLOAT32, 4.0),
            "mistral3.rope.scaling.original_context_length": (GGUFValueType.UINT32, 256),
        }
        case = self.case("yarn", (2, 3), ["--arch", "mistral3"], keys=keys)
        self.assertGreater(case.packages.manifest["rope"]["magnitude"], 1)
        self.assert_agrees(case)

    def assert_selftest_is_f32(self, case):
        """The vectors are those of the same model with all weights expanded to F32."""
        folder = case.model.parent
        rewrite(case.model, folder / "f32.gguf", as_f32=True)
        flags = ["--coreml-ctx", N_CTX, "--coreml-prefill", N_PREFILL]
        directory, _ = self.tools.split(folder / "f32.gguf", case.blocks, folder / "f32", *flags)
        for ours, f32 in zip(case.packages.selftest_rows("f32"), PackageSet(directory).selftest_rows("f32"), strict=True):
            self.assertLess(worst_row(ours, f32), 1e-6)

    def test_bf16_weights(self):
        case = self.case("bf16", (2, 3), ["--arch", "qwen2", "--type", "bf16"])
        self.assert_agrees(case)
        self.assert_selftest_is_f32(case)

    def test_f32_weights(self):
        self.assert_agrees(self.case("f32", (2, 3), ["--arch", "qwen3", "--type", "f32"]))

    def test_q8_0_weights_of_llama(self):
        case = self.case("q8_0", (2, 3), ["--arch", "llama", "--type", "q8_0"])
        self.assert_agrees(case)
        self.assert_selftest_is_f32(case)

    def test_q4_k_weights(self):
        case = self.case("q4_k", (2, 3), ["--arch", "qwen2", "--type", "q4_k"])
        self.assert_agrees(case)
        self.assert_selftest_is_f32(case)

    def test_large_residual_stream_is_scaled(self):
        # block 1 writes two channels near 50,000 into the stream, as some models' early blocks do
        loud, factor = [5, 200], 40000
        scale = {"blk.1.ffn_down.weight": (loud, factor)}
        case = self.case("scaled", (2, 3), ["--arch", "qwen2"], scale=scale)
        case.loud = loud
        manifest = case.packages.manifest
        greatest = max(manifest["selftest"]["max_abs_hidden"])
        self.assertGreater(greatest, 30000)
        self.assertLess(greatest * manifest["residual_scale"], 16320)
        self.assertGreater(greatest * manifest["residual_scale"], 8000)
        self.assert_agrees(case, selftest=False)

    def test_real_size_block_of_qwen2_5_7b(self):
        synth = ["--shape", "qwen2.5-7b", "--blocks", "3", "--vocab", "512"]
        case = self.case("qwen2.5-7b", (1, 1), synth, n_ctx=128, n_prefill=64)
        self.assertEqual(case.packages.manifest["dims"]["ffn_bounds"], [0, 9472, 18944])
        self.assert_agrees(case)

    def test_a_trained_model(self):
        """SmolLM2, where .ci/model has fetched it: block 11 puts 23,700 into one channel of the first token, and all else
        has to be right beside that."""
        found = subprocess.run(["sh", TOP / ".ci/model", "--path"], capture_output=True, text=True)
        if found.returncode != 0:
            print("not run: no real weights (sh .ci/model fetches them)")
            return
        whole = self.scratch / "whole.gguf"
        self.tools.run("dim-dequantise", found.stdout.strip(), whole)
        case = self.case("smollm2", (11, 13), whole)
        case.loud = [507]
        before, *after = case.packages.manifest["selftest"]["max_abs_hidden"]
        self.assertLess(before, 2000)
        self.assertGreater(min(after), 20000)
        self.assertEqual(case.packages.manifest["residual_scale"], 1)
        self.assert_agrees(case)

    # -- the checks themselves

    def test_every_planted_fault_is_caught(self):
        case = self.case("broken", (2, 3), ["--arch", "llama"], scale={})
        biased = self.case("biased", (2, 3), ["--arch", "qwen2"])
        caught = {}
        for fault in faults.ALL:
            victim = biased if fault is faults.bias_left_out else case
            caught[fault.__name__] = self.outcome(victim, fault)
        print(f"\nplanted faults: {len(caught)}, all caught")
        for name, how in caught.items():
            print(f"  {name}: {how}")
        for name, how in caught.items():
            self.assertNotEqual(how, "not caught", name)
        self.assertGreaterEqual(len(caught), 10)

    def outcome(self, case, fault):
        """How a fault is found: the static checks' sentence, or the numbers."""
        from coremltools.proto import Model_pb2

        copy = self.scratch / "copy.coreml"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(case.directory, copy)
        data = copy / "middle-00.mlpackage/Data/com.apple.CoreML"
        model = Model_pb2.Model()
        model.ParseFromString((data / "model.mlmodel").read_bytes())
        fault(model, data / "weights/weight.bin")
        (data / "model.mlmodel").write_bytes(model.SerializeToString())
        rehash(copy)
        try:
            packages = PackageSet(copy)
            out, _ = case.evaluate("exact", packages)
        except Broken as broken:
            return str(broken)
        difference = worst_row(np.concatenate(out), np.concatenate(case.expected()))
        return "not caught" if difference < EXACT else f"rows differ by {difference:.1e}"

    def test_a_mask_off_by_one_is_caught(self):
        case = self.case("mask", (2, 3), ["--arch", "qwen2"])

        class Early(Session):
            def inputs(self, n):
                inputs = super().inputs(n)
                inputs["mask"] = np.roll(inputs["mask"], 1, axis=-1)
                return inputs

        out, _ = case.sessions(lambda: Early(case.packages, "exact"))
        self.assertGreater(worst_row(np.concatenate(out), np.concatenate(case.expected())), EXACT)

    def test_hashes_in_the_manifest_are_those_of_the_files(self):
        case = self.case("hashes", (2, 3), ["--arch", "qwen2"])
        weights = case.directory / "middle-00.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with self.assertRaisesRegex(Broken, "SHA-256"):
            PackageSet(case.directory)

    def test_the_same_model_gives_the_same_bytes(self):
        model = self.tools.synth(self.scratch / "twice.gguf", "--arch", "qwen3")
        flags = ["--coreml-ctx", 64, "--coreml-prefill", 8]
        trees = []
        for out in ("one", "two"):
            directory, _ = self.tools.split(model, (2, 3), self.scratch / out, *flags)
            trees.append({p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()})
        self.assertEqual(trees[0].keys(), trees[1].keys())
        for path in trees[0]:
            self.assertEqual(trees[0][path], trees[1][path], path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("programs", type=Path, help="folder of dim-split, dim-synth and examples/coreml-oracle")
    parser.add_argument("tests", nargs="*", help="only these")
    options = parser.parse_args()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="coreml-") as scratch:
        Checks.tools, Checks.scratch = Tools(options.programs), Path(scratch)
        names = [f"Checks.{t}" for t in options.tests] or ["Checks"]
        suite = unittest.defaultTestLoader.loadTestsFromNames(names, module=sys.modules[__name__])
        result = unittest.TextTestRunner(verbosity=2).run(suite)
    if FIGURES:
        print("\nrelative differences: rows, updates, worst row (against llama.cpp); worst row, state (plain reference)")
    for name, figures in FIGURES:
        for mode in ("plain", "exact", "fp16"):
            print(f"  {name:<14} {mode:<6}", "  ".join(f"{x:.1e}" for x in figures[mode]))
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    with redirect_stderr(io.TextIOWrapper(sys.stderr.buffer, line_buffering=True)):
        main()
