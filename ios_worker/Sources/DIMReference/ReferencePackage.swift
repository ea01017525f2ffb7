// What a package computes, in plain Swift: the formula of docs/COREML.md, written down. It is slow, it is meant to be read
// beside that page, and it takes its weights from the package's own weight file, so that on a machine without Core ML
// everything of the worker but Core ML's execution runs with real numbers. Arithmetic is fp32; what a package stores or
// gives (the cache, hidden_out) is fp16.
import DIMStage
import Foundation

public final class ReferencePackage: Package {
    /// The cache of one session: keys (after rope) and values of every block.
    private final class State: PackageState {
        var kv: [Float]  // (2 * blocks, n_head_kv, n_ctx, head_dim), each value rounded to fp16
        init(_ count: Int) { kv = [Float](repeating: 0, count: count) }
    }

    /// A matrix or a vector as the weight file has it.
    fileprivate struct Tensor {
        let rows: Int
        let cols: Int
        let values: [Float]  // (rows, cols)
    }

    fileprivate struct Block {
        let attnNorm: Tensor
        let q: Linear
        let k: Linear
        let v: Linear
        let qNorm: Tensor?
        let kNorm: Tensor?
        let output: Linear
        let ffnNorm: Tensor
        /// one per part of the feed-forward network
        let gate: [Linear]
        let up: [Linear]
        let down: [Tensor]
        let downBias: Tensor?
    }

    fileprivate struct Linear {
        let weight: Tensor
        let bias: Tensor?
    }

    public let blocks: ClosedRange<Int>
    private let manifest: Manifest
    private let weights: [Block]
    private let stateCount: Int

    /// Loads the package at place `index` of a directory.
    public init(_ manifest: Manifest, index: Int, directory: URL) throws(ManifestError) {
        let package = manifest.packages[index]
        let file = directory.appendingPathComponent(Manifest.packageName(index))
            .appendingPathComponent(Manifest.packageWeights)
        guard let data = try? Data(contentsOf: file, options: .alwaysMapped) else {
            throw ManifestError("\(file.path) cannot be read")
        }
        self.manifest = manifest
        blocks = package.blocks
        stateCount = package.stateShape.reduce(1, *)
        let reader = WeightReader(file: file.path, data: data, weights: package.weights)
        var loaded: [Block] = []
        for block in package.blocks { loaded.append(try Block(reader, block, manifest.dims)) }
        weights = loaded
    }

    public func makeState() -> any PackageState { State(stateCount) }

    public func evaluate(
        _ function: PackageFunction, _ inputs: PackageInputs, state: any PackageState,
        into output: UnsafeMutableBufferPointer<Half>
    ) throws(StageError) {
        guard let state = state as? State else { throw .compute("a state of another package") }
        let nEmbd = manifest.dims.nEmbd
        var rows = (0..<inputs.rows).map { row in
            inputs.hidden[row * nEmbd..<(row + 1) * nEmbd].map { float($0) }
        }
        for index in weights.indices { evaluate(index, &rows, inputs, state) }
        for (row, x) in rows.enumerated() {
            for (column, value) in x.enumerated() { output[row * nEmbd + column] = half(value) }
        }
    }

    /// One block over all rows, in place. Whole in one function: it is held against the emitted program line by line.
    private func evaluate(_ index: Int, _ rows: inout [[Float]], _ inputs: PackageInputs, _ state: State) {
        let block = weights[index]
        let dims = manifest.dims
        let (hd, nCtx, group) = (dims.headDim, manifest.nCtx, dims.nHead / dims.nHeadKv)
        let scale = Float(manifest.residualScale)
        let eps = Float(dims.normEps) * scale * scale
        func place(_ plane: Int, _ head: Int, _ column: Int) -> Int {
            ((plane * dims.nHeadKv + head) * nCtx + column) * hd
        }

        // keys and values of every row first: a later row of the chunk is hidden from an earlier one by the mask
        var queries: [[Float]] = []
        for (row, x) in rows.enumerated() {
            let cos = inputs.cos[row * hd..<(row + 1) * hd].map { float($0) }
            let sin = inputs.sin[row * hd..<(row + 1) * hd].map { float($0) }
            // h = norm of x; q, k, v from it
            let h = normed(x[...], block.attnNorm, eps)
            var q = apply(block.q, h)
            var k = apply(block.k, h)
            let v = apply(block.v, h)
            for head in 0..<dims.nHead { turn(&q, head * hd, block.qNorm, cos, sin) }
            for head in 0..<dims.nHeadKv { turn(&k, head * hd, block.kNorm, cos, sin) }
            queries.append(q)
            // store k and v at this row's position
            for head in 0..<dims.nHeadKv {
                let keys = place(2 * index, head, inputs.position + row)
                let values = place(2 * index + 1, head, inputs.position + row)
                for i in 0..<hd {
                    state.kv[keys + i] = float(half(k[head * hd + i]))
                    state.kv[values + i] = float(half(v[head * hd + i]))
                }
            }
        }

        for row in rows.indices {
            let mask = inputs.mask[row * nCtx..<(row + 1) * nCtx].map { float($0) }
            // columns of a mask value get a weight of exactly 0 in fp32
            let columns = mask.indices.filter { mask[$0] == 0 }
            var a = [Float](repeating: 0, count: dims.nHead * hd)
            for head in 0..<dims.nHead {
                // a = softmax(q . k / sqrt(head_dim) + mask) times v
                let shared = head / group
                var scores = columns.map { column in
                    let key = place(2 * index, shared, column)
                    var sum: Float = 0
                    for i in 0..<hd { sum += queries[row][head * hd + i] * state.kv[key + i] }
                    return sum / Float(hd).squareRoot()
                }
                let largest = scores.max() ?? 0
                for i in scores.indices { scores[i] = exp(scores[i] - largest) }
                let sum = scores.reduce(0, +)
                for (score, column) in zip(scores, columns) {
                    let value = place(2 * index + 1, shared, column)
                    for i in 0..<hd { a[head * hd + i] += score / sum * state.kv[value + i] }
                }
            }
            // x = x + attn_output a
            var x = rows[row]
            add(apply(block.output, a.map { scale * $0 }), to: &x)

            // x = x + down (silu(gate h) * up h), part by part
            let h = normed(x[...], block.ffnNorm, eps)
            for part in block.gate.indices {
                let gate = apply(block.gate[part], h)
                let up = apply(block.up[part], h)
                let inner = zip(gate, up).map { scale * ($0 / (1 + exp(-$0))) * $1 }
                add(apply(Linear(weight: block.down[part], bias: nil), inner), to: &x)
            }
            if let bias = block.downBias { add(bias.values, to: &x) }
            rows[row] = x
        }
    }

    /// Norm of one head where the model has them, then rope: half against half.
    private func turn(_ x: inout [Float], _ start: Int, _ norm: Tensor?, _ cos: [Float], _ sin: [Float]) {
        let hd = manifest.dims.headDim
        var head = Array(x[start..<start + hd])
        if let norm { head = normed(head[...], norm, Float(manifest.dims.normEps)) }
        for i in 0..<hd {
            let other = i < hd / 2 ? -head[i + hd / 2] : head[i - hd / 2]
            x[start + i] = head[i] * cos[i] + other * sin[i]
        }
    }

    /// x / sqrt(mean(x * x) + eps) * weight
    private func normed(_ x: ArraySlice<Float>, _ weight: Tensor, _ eps: Float) -> [Float] {
        let mean = x.reduce(0) { $0 + $1 * $1 } / Float(x.count)
        let factor = 1 / (mean + eps).squareRoot()
        return zip(x, weight.values).map { $0 * factor * $1 }
    }

    /// Output o is the dot product of row o with the input, plus bias.
    private func apply(_ linear: Linear, _ x: [Float]) -> [Float] {
        let (rows, cols) = (linear.weight.rows, linear.weight.cols)
        precondition(x.count == cols)
        return linear.weight.values.withUnsafeBufferPointer { weight in
            x.withUnsafeBufferPointer { x in
                (0..<rows).map { row in
                    var sum: Float = 0
                    for column in 0..<cols { sum += weight[row * cols + column] * x[column] }
                    return sum + (linear.bias.map { $0.values[row] } ?? 0)
                }
            }
        }
    }

    private func add(_ update: [Float], to x: inout [Float]) {
        for i in x.indices { x[i] += update[i] }
    }

    /// Tensors of one package by name.
    fileprivate struct WeightReader {
        let file: String
        let data: Data
        let weights: [Manifest.Weight]

        /// All stored tensors of that name, in file order, with their checked shapes.
        func all(_ block: Int, _ name: String) throws(ManifestError) -> [Tensor] {
            var found: [Tensor] = []
            for weight in weights where weight.name == "blk.\(block).\(name)" {
                guard weight.dtype == "f16", weight.shape.count <= 2,
                    weight.shape.allSatisfy({ $0 > 0 && $0 < 1 << 30 })
                else { throw ManifestError("\(file): \(weight.name) is \(weight.dtype) of shape \(weight.shape)") }
                let count = weight.shape.reduce(1, *)
                guard weight.offset >= 0, weight.bytes == 2 * count, weight.offset <= data.count - weight.bytes else {
                    throw ManifestError("\(file): \(weight.name) lies outside the file")
                }
                let values = data.withUnsafeBytes { bytes in
                    (0..<count).map {
                        float(
                            Half(
                                littleEndian: bytes.loadUnaligned(
                                    fromByteOffset: weight.offset + 2 * $0, as: UInt16.self)))
                    }
                }
                found.append(
                    Tensor(
                        rows: weight.shape.count == 2 ? weight.shape[0] : 1, cols: weight.shape.last!, values: values))
            }
            return found
        }

        func one(_ block: Int, _ name: String, _ rows: Int, _ cols: Int) throws(ManifestError) -> Tensor {
            guard let tensor = try optional(block, name, rows, cols) else {
                throw ManifestError("\(file): there is no blk.\(block).\(name)")
            }
            return tensor
        }

        func optional(_ block: Int, _ name: String, _ rows: Int, _ cols: Int) throws(ManifestError) -> Tensor? {
            let found = try all(block, name)
            guard found.count <= 1, found.allSatisfy({ $0.rows == rows && $0.cols == cols }) else {
                throw ManifestError("\(file): blk.\(block).\(name) has another shape than [\(rows), \(cols)]")
            }
            return found.first
        }

        func linear(_ block: Int, _ name: String, _ rows: Int, _ cols: Int) throws(ManifestError) -> Linear {
            Linear(
                weight: try one(block, name + ".weight", rows, cols), bias: try optional(block, name + ".bias", 1, rows)
            )
        }

        /// The parts of a projection cut at `bounds`, as their rows.
        func parts(_ block: Int, _ name: String, _ bounds: [Int], cols: Int) throws(ManifestError) -> [Linear] {
            let tensors = try all(block, name + ".weight")
            let biases = try all(block, name + ".bias")
            let sizes = zip(bounds, bounds.dropFirst()).map { $1 - $0 }
            guard tensors.map(\.rows) == sizes, tensors.allSatisfy({ $0.cols == cols }),
                biases.isEmpty || biases.map(\.cols) == sizes
            else { throw ManifestError("\(file): blk.\(block).\(name) is not cut at \(bounds)") }
            return tensors.indices.map { Linear(weight: tensors[$0], bias: biases.isEmpty ? nil : biases[$0]) }
        }
    }
}

extension ReferencePackage.Block {
    fileprivate init(
        _ reader: ReferencePackage.WeightReader, _ block: Int, _ dims: Manifest.Dims
    ) throws(ManifestError) {
        let (n, q, kv) = (dims.nEmbd, dims.nHead * dims.headDim, dims.nHeadKv * dims.headDim)
        attnNorm = try reader.one(block, "attn_norm.weight", 1, n)
        self.q = try reader.linear(block, "attn_q", q, n)
        k = try reader.linear(block, "attn_k", kv, n)
        v = try reader.linear(block, "attn_v", kv, n)
        qNorm = dims.qkNorm ? try reader.one(block, "attn_q_norm.weight", 1, dims.headDim) : nil
        kNorm = dims.qkNorm ? try reader.one(block, "attn_k_norm.weight", 1, dims.headDim) : nil
        output = try reader.linear(block, "attn_output", n, q)
        ffnNorm = try reader.one(block, "ffn_norm.weight", 1, n)
        gate = try reader.parts(block, "ffn_gate", dims.ffnBounds, cols: n)
        up = try reader.parts(block, "ffn_up", dims.ffnBounds, cols: n)
        down = try reader.all(block, "ffn_down.weight")
        let sizes = zip(dims.ffnBounds, dims.ffnBounds.dropFirst()).map { $1 - $0 }
        guard down.map(\.cols) == sizes, down.allSatisfy({ $0.rows == n }) else {
            throw ManifestError("\(reader.file): blk.\(block).ffn_down is not cut at \(dims.ffnBounds)")
        }
        downBias = try reader.optional(block, "ffn_down.bias", 1, n)
    }
}
