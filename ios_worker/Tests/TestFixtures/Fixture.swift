// A package directory of a tiny model with random weights, as docs/COREML.md describes one: what the tests of the
// manifest, of the reference evaluation and of the self-test read. (Directories that dim-split wrote, with vectors of
// llama.cpp, are run by tools/test.sh.)
import DIMCrypto
import DIMStage
import Foundation

public final class Fixture {
    public let directory: URL
    public var manifest: [String: Any]
    /// name -> (rows, cols, values), before rounding nothing: values are fp16 exactly
    public private(set) var tensors: [String: (rows: Int, cols: Int, values: [Float])] = [:]
    private var state: UInt64

    public static let dims = (nEmbd: 16, nHead: 4, nHeadKv: 2, headDim: 8, nFf: 24, nCtx: 32, nPrefill: 4)

    /// - Parameter blocksPerPackage: how blocks 2..4 are divided
    public init(
        seed: UInt64, blocksPerPackage: [Int] = [2, 1], qkNorm: Bool = false, ffnBounds: [Int] = [0, 24],
        padding: Int = 0
    ) throws {
        state = seed
        directory = FileManager.default.temporaryDirectory.appendingPathComponent("dim-\(UUID().uuidString)")
        manifest = [:]
        let d = Fixture.dims
        let large = padding
        var packages: [[String: Any]] = []
        var block = 2
        for (index, count) in blocksPerPackage.enumerated() {
            let package = directory.appendingPathComponent(Manifest.packageName(index))
            var file = Data(count: 64)
            var weights: [[String: Any]] = []
            func store(_ name: String, _ rows: Int, _ cols: Int, scale: Float, around: Float = 0, vector: Bool = false)
            {
                let values = (0..<rows * cols).map { _ in float(half(around + scale * random())) }
                if let before = tensors[name] {
                    tensors[name] = (before.rows + rows, cols, before.values + values)
                } else {
                    tensors[name] = (rows, cols, values)
                }
                file.append(Data(count: (64 - file.count % 64) % 64))
                weights.append([
                    "name": name, "offset": file.count, "bytes": 2 * rows * cols, "dtype": "f16",
                    "shape": vector ? [cols] : [rows, cols], "rows": [0, rows], "cols": [0, cols], "order": "as-is",
                    "scale": 1,
                ])
                for value in values { withUnsafeBytes(of: half(value).littleEndian) { file.append(contentsOf: $0) } }
            }
            for b in block..<block + count {
                let (q, kv) = (d.nHead * d.headDim, d.nHeadKv * d.headDim)
                store("blk.\(b).attn_norm.weight", 1, d.nEmbd, scale: 0.2, around: 1, vector: true)
                for (name, rows) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                    store("blk.\(b).\(name).weight", rows, d.nEmbd, scale: 0.3)
                    store("blk.\(b).\(name).bias", 1, rows, scale: 0.1, vector: true)
                }
                if qkNorm {
                    store("blk.\(b).attn_q_norm.weight", 1, d.headDim, scale: 0.2, around: 1, vector: true)
                    store("blk.\(b).attn_k_norm.weight", 1, d.headDim, scale: 0.2, around: 1, vector: true)
                }
                store("blk.\(b).attn_output.weight", d.nEmbd, q, scale: 0.2)
                store("blk.\(b).ffn_norm.weight", 1, d.nEmbd, scale: 0.2, around: 1, vector: true)
                for (from, to) in zip(ffnBounds, ffnBounds.dropFirst()) {
                    store("blk.\(b).ffn_gate.weight", to - from, d.nEmbd, scale: 0.3)
                    store("blk.\(b).ffn_up.weight", to - from, d.nEmbd, scale: 0.3)
                    store("blk.\(b).ffn_down.weight", d.nEmbd, to - from, scale: 0.2)
                }
            }
            // bytes that no weight uses: for tests that want large files
            file.append(contentsOf: (0..<large).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8) })
            var files: [[String: Any]] = []
            for (path, content) in [
                (Manifest.packageContents, Data("{}".utf8)), (Manifest.packageModel, Data("m".utf8)),
                (Manifest.packageWeights, file),
            ] {
                let url = package.appendingPathComponent(path)
                try FileManager.default.createDirectory(
                    at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
                try content.write(to: url)
                files.append(["path": path, "bytes": content.count, "sha256": hash(content)])
            }
            packages.append([
                "directory": Manifest.packageName(index), "first_block": block, "last_block": block + count - 1,
                "state_shape": [2 * count, d.nHeadKv, d.nCtx, d.headDim], "files": files,
                "weight_file": Manifest.packageWeights, "weights": weights,
            ])
            block += count
        }
        manifest = [
            "format": "dim.coreml", "version": 1,
            "model": [
                "name": "tiny", "sha256": String(repeating: "ab", count: 32),
                "params_sha256": String(repeating: "cd", count: 32), "arch": "qwen2", "n_blocks": 8,
            ],
            "slice": ["first_block": 2, "last_block": block - 1, "sha256": ""],
            "dims": [
                "n_embd": d.nEmbd, "n_head": d.nHead, "n_head_kv": d.nHeadKv, "head_dim": d.headDim, "n_ff": d.nFf,
                "ffn_bounds": ffnBounds, "norm_eps": 1e-6, "qk_norm": qkNorm,
            ],
            "rope": [
                "pairing": "halves", "magnitude": 1, "inv_freq": (0..<d.headDim / 2).map { pow(0.01, Double($0) / 4) },
                "freq_base": 10_000, "scaling": "none", "factor": 1, "freq_factors": [],
            ],
            "n_ctx": d.nCtx, "n_prefill": d.nPrefill, "mask_value": -10_000, "residual_scale": 1,
            "packages": packages, "selftest": NSNull(),
        ]
        try write()
    }

    deinit { try? FileManager.default.removeItem(at: directory) }

    public func write() throws {
        let data = try JSONSerialization.data(withJSONObject: manifest)
        try data.write(to: directory.appendingPathComponent(Manifest.fileName))
    }

    /// Writes `rows` at every boundary as the self-test's vectors.
    public func addSelfTest(boundaries: [[[Double]]], prefill: Int) throws {
        var data = Data()
        var list: [[String: Any]] = []
        for rows in boundaries {
            let f16 = data.count
            for value in rows.joined() {
                withUnsafeBytes(of: half(Float(value)).littleEndian) { data.append(contentsOf: $0) }
            }
            let f32 = data.count
            for value in rows.joined() {
                withUnsafeBytes(of: Float(value).bitPattern.littleEndian) { data.append(contentsOf: $0) }
            }
            list.append(["f16_offset": f16, "f32_offset": f32])
        }
        try data.write(to: directory.appendingPathComponent(Manifest.selfTestName))
        manifest["selftest"] = [
            "file": Manifest.selfTestName, "bytes": data.count, "sha256": hash(data), "n_rows": boundaries[0].count,
            "n_prefill_rows": prefill, "boundaries": list,
        ]
        try write()
    }

    private func hash(_ data: Data) -> String { hex(SystemPrimitives.sha256([UInt8](data))) }

    /// -1 ..< 1
    private func random() -> Float {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return Float(Int64(bitPattern: state) >> 40) / 0x1p23
    }
}
