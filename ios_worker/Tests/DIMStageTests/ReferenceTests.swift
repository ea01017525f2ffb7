// The reference evaluation against a second one, written here from the same page in another way: double precision, a
// cache that grows, no mask, no chunks. Manifests and self-tests on the same tiny directories.
import DIMReference
import DIMWire
import Foundation
import TestFixtures
import Testing

@testable import DIMStage

/// One session of a tiny model, row by row, in doubles.
private struct Oracle {
    let fixture: Fixture
    let blocks: ClosedRange<Int>
    let qkNorm: Bool
    let parts: Int
    private var keys: [Int: [[Double]]] = [:]
    private var values: [Int: [[Double]]] = [:]

    init(_ fixture: Fixture, blocks: ClosedRange<Int>, qkNorm: Bool, parts: Int) {
        self.fixture = fixture
        self.blocks = blocks
        self.qkNorm = qkNorm
        self.parts = parts
    }

    private func tensor(_ name: String) -> [Double] { fixture.tensors[name]!.values.map { Double($0) } }

    private func times(_ name: String, _ x: [Double]) -> [Double] {
        let (rows, cols, values) = fixture.tensors[name + ".weight"]!
        precondition(cols == x.count)
        let bias = fixture.tensors[name + ".bias"]?.values
        return (0..<rows).map { row in
            var sum = Double(bias?[row] ?? 0)
            for column in 0..<cols { sum += Double(values[row * cols + column]) * x[column] }
            return sum
        }
    }

    private func norm(_ x: [Double], _ weight: [Double]) -> [Double] {
        let length = (x.map { $0 * $0 }.reduce(0, +) / Double(x.count) + 1e-6).squareRoot()
        return zip(x, weight).map { $0 / length * $1 }
    }

    private func rope(_ x: [Double], _ position: Int) -> [Double] {
        let half = x.count / 2
        var y = x
        for i in 0..<half {
            let angle = Double(position) * pow(0.01, Double(i) / 4)
            y[i] = x[i] * cos(angle) - x[i + half] * sin(angle)
            y[i + half] = x[i + half] * cos(angle) + x[i] * sin(angle)
        }
        return y
    }

    /// One row through every block; the rows at every boundary.
    mutating func next(_ row: [Double], boundaries: [Int]) -> [[Double]] {
        let d = Fixture.dims
        var x = row
        var result: [[Double]] = []
        for block in blocks {
            if boundaries.contains(block) { result.append(x) }
            let h = norm(x, tensor("blk.\(block).attn_norm.weight"))
            let position = keys[block]?.count ?? 0
            func heads(_ name: String, _ count: Int, _ turned: Bool) -> [[Double]] {
                let all = times("blk.\(block).\(name)", h)
                return (0..<count).map { head in
                    var part = Array(all[head * d.headDim..<(head + 1) * d.headDim])
                    if turned, qkNorm { part = norm(part, tensor("blk.\(block).\(name)_norm.weight")) }
                    return turned ? rope(part, position) : part
                }
            }
            let q = heads("attn_q", d.nHead, true)
            keys[block, default: []].append(heads("attn_k", d.nHeadKv, true).flatMap { $0 })
            values[block, default: []].append(heads("attn_v", d.nHeadKv, false).flatMap { $0 })
            var a: [Double] = []
            for head in 0..<d.nHead {
                let start = head / (d.nHead / d.nHeadKv) * d.headDim
                let scores: [Double] = keys[block]!.map { key in
                    var product = 0.0
                    for i in 0..<d.headDim { product += q[head][i] * key[start + i] }
                    return exp(product / Double(d.headDim).squareRoot())
                }
                let sum = scores.reduce(0, +)
                for i in 0..<d.headDim {
                    var mixed = 0.0
                    for (score, value) in zip(scores, values[block]!) { mixed += score / sum * value[start + i] }
                    a.append(mixed)
                }
            }
            x = zip(x, times("blk.\(block).attn_output", a)).map { $0 + $1 }
            let g = norm(x, tensor("blk.\(block).ffn_norm.weight"))
            let gate = times("blk.\(block).ffn_gate", g)
            let up = times("blk.\(block).ffn_up", g)
            let inner = zip(gate, up).map { $0 / (1 + exp(-$0)) * $1 }
            // ffn_down's parts were appended one after the other
            let down = tensor("blk.\(block).ffn_down.weight")
            let width = d.nFf / parts
            for part in 0..<parts {
                for row in 0..<d.nEmbd {
                    for column in 0..<width {
                        x[row] += down[part * width * d.nEmbd + row * width + column] * inner[part * width + column]
                    }
                }
            }
        }
        result.append(x)
        return result
    }
}

@Suite struct ReferenceTests {
    private func stage(_ fixture: Fixture) throws -> (PackagedStage, Manifest) {
        let manifest = try Manifest.read(fixture.directory)
        try manifest.verify(fixture.directory)
        let packages = try manifest.packages.indices.map {
            try ReferencePackage(manifest, index: $0, directory: fixture.directory)
        }
        return (
            PackagedStage(shape: StageShape(manifest), parameters: .init(manifest), packages: packages), manifest
        )
    }

    private func input(_ count: Int) -> [[Double]] {
        (0..<count).map { row in
            (0..<Fixture.dims.nEmbd).map { Double(float(half(Float(sin(Double(row * 17 + $0 * 3)) * 2)))) }
        }
    }

    private func evaluate(_ stage: PackagedStage, _ rows: [[Double]], position: Int) throws -> [[Double]] {
        var bytes: [UInt8] = []
        for value in rows.joined() { withUnsafeBytes(of: Float(value).bitPattern.littleEndian) { bytes += $0 } }
        var output = bytes
        let span = Span(session: 0, position: UInt32(position), count: UInt32(rows.count))
        let step = Step(
            id: 1, spans: [span], rows: Rows(format: RowFormat(.f32), count: rows.count, hidden: bytes[...]))
        try output.withUnsafeMutableBytes { try stage.evaluate(step, into: $0) }
        let n = Fixture.dims.nEmbd
        return output.withUnsafeBytes { raw in
            rows.indices.map { row in
                (0..<n).map {
                    Double(Float(bitPattern: raw.loadUnaligned(fromByteOffset: 4 * (row * n + $0), as: UInt32.self)))
                }
            }
        }
    }

    @Test(arguments: [(1, false, [0, 24]), (2, true, [0, 24]), (3, true, [0, 12, 24])])
    func agreesWithASecondEvaluation(seed: Int, qkNorm: Bool, bounds: [Int]) throws {
        let fixture = try Fixture(seed: UInt64(seed), qkNorm: qkNorm, ffnBounds: bounds)
        let (stage, manifest) = try stage(fixture)
        #expect(stage.shape.firstBlock == 2 && stage.shape.lastBlock == 4)
        var oracle = Oracle(fixture, blocks: 2...4, qkNorm: qkNorm, parts: bounds.count - 1)
        let rows = input(20)
        let expected = rows.map { oracle.next($0, boundaries: [])[0] }
        // a padded chunk, single rows, several chunks
        var found = try evaluate(stage, Array(rows[0..<3]), position: 0)
        for row in 3..<6 { found += try evaluate(stage, [rows[row]], position: row) }
        found += try evaluate(stage, Array(rows[6..<20]), position: 6)
        for (row, (ours, theirs)) in zip(found, expected).enumerated() {
            for (a, b) in zip(ours, theirs) { #expect(abs(a - b) < 2e-2 * max(1, abs(b)), "row \(row)") }
        }
        // rewind to 5 and go on with other rows: as if they had been there at first
        var second = Oracle(fixture, blocks: 2...4, qkNorm: qkNorm, parts: bounds.count - 1)
        for row in rows[..<5] { _ = second.next(row, boundaries: []) }
        stage.rewind(session: 0, position: 5)
        let other = Array(input(30)[22..<28])
        for (ours, theirs) in zip(
            try evaluate(stage, other, position: 5), other.map { second.next($0, boundaries: [])[0] })
        {
            for (a, b) in zip(ours, theirs) { #expect(abs(a - b) < 2e-2 * max(1, abs(b))) }
        }
        #expect(manifest.packages.count == 2)
    }

    @Test func theSelfTestPassesAndFails() throws {
        let fixture = try Fixture(seed: 9)
        var oracle = Oracle(fixture, blocks: 2...4, qkNorm: false, parts: 1)
        let rows = input(8)
        // before package 0 (block 2), before package 1 (block 4), after it
        let boundaries = rows.map { oracle.next($0, boundaries: [2, 4]) }
        let arranged = (0..<3).map { boundary in boundaries.map { $0[boundary] } }
        func run(_ arranged: [[[Double]]]) throws -> SelfTestResult {
            try fixture.addSelfTest(boundaries: arranged, prefill: 4)
            let manifest = try Manifest.read(fixture.directory)
            try manifest.verify(fixture.directory)
            let packages = try manifest.packages.indices.map {
                try ReferencePackage(manifest, index: $0, directory: fixture.directory)
            }
            var time = 0.0
            let test = try #require(try SelfTest(manifest, directory: fixture.directory))
            return try test.run(packages) {
                time += 0.001
                return time
            }
        }
        let good = try run(arranged)
        #expect(good.passes, "\(good.sentence)")
        #expect(good.medianError < 5e-3)
        #expect(good.decodeMs > 0 && good.prefillMs > 0)
        #expect(good.sentence.contains("ms per token"))
        // the rows after package 0 altered, as if a weight were wrong
        var wrong = arranged
        for row in wrong[1].indices { for i in wrong[1][row].indices { wrong[1][row][i] += 0.3 * Double(i % 3) } }
        let bad = try run(wrong)
        #expect(!bad.passes)
        #expect(bad.sentence.contains("wrong"))
        // one row out of order is not hidden by the median
        var swapped = arranged
        swapped[2].swapAt(5, 6)
        #expect(try !run(swapped).passes)
    }

    // MARK: manifests that must be refused

    private func refusal(_ change: (inout [String: Any]) -> Void) throws -> String? {
        let fixture = try Fixture(seed: 3)
        change(&fixture.manifest)
        try fixture.write()
        do throws(ManifestError) {
            let manifest = try Manifest.read(fixture.directory)
            try manifest.verify(fixture.directory)
            _ = try ReferencePackage(manifest, index: 0, directory: fixture.directory)
            return nil
        } catch {
            return error.description
        }
    }

    private func set(_ path: [String], _ value: Any) -> (inout [String: Any]) -> Void {
        func put(_ object: Any, _ path: ArraySlice<String>) -> Any {
            guard let key = path.first else { return value }
            if let index = Int(key), var list = object as? [Any] {
                list[index] = put(list[index], path.dropFirst())
                return list
            }
            var map = object as! [String: Any]
            map[key] = put(map[key] ?? NSNull(), path.dropFirst())
            return map
        }
        return { $0 = put($0, path[...]) as! [String: Any] }
    }

    @Test func manifestsThatLieAreRefused() throws {
        #expect(try refusal { _ in } == nil)
        let cases: [([String], Any, String)] = [
            (["format"], "other", "not dim.coreml"),
            (["version"], 2, "version 2"),
            (["dims", "n_embd"], 0, "dimension"),
            (["dims", "n_embd"], 1 << 30, "dimension"),
            (["dims", "n_head"], 3, "no multiple"),
            (["dims", "head_dim"], 7, "odd"),
            (["dims", "norm_eps"], 0, "norm_eps"),
            (["dims", "ffn_bounds"], [0, 30], "ffn_bounds"),
            (["dims", "ffn_bounds"], [0, 24, 12], "ffn_bounds"),
            (["rope", "pairing"], "neighbours", "pairing"),
            (["rope", "inv_freq"], [1.0], "frequencies"),
            (["n_prefill"], 33, "n_prefill"),
            (["mask_value"], 0, "mask_value"),
            (["residual_scale"], 0.3, "residual_scale"),
            (["slice", "last_block"], 8, "blocks"),
            (["model", "params_sha256"], "beef", "params_sha256"),
            (["packages"], [], "0 packages"),
            (["packages", "0", "directory"], "../../etc", "is called"),
            (["packages", "1", "first_block"], 3, "expected from"),
            (["packages", "0", "state_shape"], [4, 2, 32, 9], "state"),
            (["packages", "0", "weight_file"], "../secret", "other files"),
            (["packages", "0", "files", "0", "path"], "/etc/passwd", "other files"),
            (["packages", "0", "files", "2", "bytes"], 5, "bytes, not 5"),
            (["packages", "0", "files", "1", "sha256"], "00", "altered"),
            (["packages", "0", "weights", "0", "dtype"], "f64", "f64"),
            (["packages", "0", "weights", "0", "offset"], 1 << 40, "outside the file"),
            (["packages", "0", "weights", "0", "offset"], -64, "outside the file"),
            (["packages", "0", "weights", "0", "name"], "blk.2.other", "there is no"),
            (["packages", "0", "weights", "1", "shape"], [16, 32], "another shape"),
            (["packages"], "none", "no manifest"),
        ]
        for (path, value, expected) in cases {
            let found = try refusal(set(path, value))
            #expect(found?.contains(expected) == true, "\(path): \(found ?? "accepted")")
        }
        let file: [String: Any] = [
            "file": "selftest.bin", "bytes": 10, "sha256": "", "n_rows": 4, "n_prefill_rows": 4,
            "boundaries": [["f16_offset": 0, "f32_offset": 0]],
        ]
        #expect(try refusal(set(["selftest"], file))?.contains("boundaries") == true)
        var three = file
        three["boundaries"] = Array(repeating: ["f16_offset": 0, "f32_offset": 0], count: 3)
        #expect(try refusal(set(["selftest"], three))?.contains("outside") == true)
        three["file"] = "../selftest.bin"
        #expect(try refusal(set(["selftest"], three))?.contains("is called") == true)
    }

    @Test func aMissingFileIsNamed() throws {
        let fixture = try Fixture(seed: 4)
        try FileManager.default.removeItem(
            at: fixture.directory.appendingPathComponent("middle-01.mlpackage/\(Manifest.packageWeights)"))
        #expect(throws: ManifestError.self) { try Manifest.read(fixture.directory) }
        #expect(throws: ManifestError.self) { try Manifest.read(URL(fileURLWithPath: "/nonexistent")) }
    }
}
