// The vectors that dim-split wrote beside the packages: real rows at every boundary, computed by llama.cpp. A worker feeds
// each package with the rows before it and compares what comes out. Compared is the block's update (out - in), because
// the first token carries a few channels near 1e4 that would hide everything else in `out`.
import DIMWire
import Foundation

/// What a self-test found, over all packages.
public struct SelfTestResult: Equatable, Sendable {
    /// of the rows' relative L2 errors of the update, the worst package's median
    public var medianError = 0.0
    /// the least over rows
    public var cosine = 1.0
    public var nonFinite = 0
    /// of one `decode` call through all packages, the median: milliseconds
    public var decodeMs = 0.0
    /// of one `prefill` call through all packages: milliseconds
    public var prefillMs = 0.0

    public init() {}

    public var passes: Bool { nonFinite == 0 && medianError < 2e-2 && cosine > 0.999 }

    public var sentence: String {
        func short(_ value: Double) -> String { String(format: "%.2g", value) }
        return passes
            ? "error \(short(medianError)), \(short(decodeMs)) ms per token, \(short(prefillMs)) ms per chunk"
            : "wrong: median error \(short(medianError)), cosine \(short(cosine)), \(nonFinite) values not finite"
    }
}

public struct SelfTest {
    private let manifest: Manifest
    private let data: Data
    private let plan: Manifest.SelfTest

    /// nil if the manifest has none.
    public init?(_ manifest: Manifest, directory: URL) throws(ManifestError) {
        guard let plan = manifest.selftest else { return nil }
        let file = directory.appendingPathComponent(Manifest.selfTestName)
        guard let data = try? Data(contentsOf: file), data.count == plan.bytes else {
            throw ManifestError("\(file.path) cannot be read")
        }
        self.manifest = manifest
        self.data = data
        self.plan = plan
    }

    /// Runs every package over its rows: one `prefill`, then `decode` after `decode`.
    /// - Parameters:
    ///   - withPrefill: false: `decode` only
    ///   - now: a clock in seconds
    public func run(
        _ packages: [any Package], withPrefill: Bool = true, now: () -> Double
    ) throws(StageError) -> SelfTestResult {
        precondition(packages.count == manifest.packages.count)
        let nEmbd = manifest.dims.nEmbd
        let tables = Tables(
            nCtx: manifest.nCtx, headDim: manifest.dims.headDim, inverseFrequencies: manifest.rope.invFreq,
            magnitude: manifest.rope.magnitude, maskValue: manifest.maskValue)
        var result = SelfTestResult()
        var decodes: [Double] = []
        for (index, package) in packages.enumerated() {
            let state = try package.makeState()
            let input = halves(plan.boundaries[index].f16Offset)
            let expected = floats(plan.boundaries[index + 1].f32Offset)
            var errors: [Double] = []
            var times: [Double] = []
            var row = 0
            while row < plan.nRows {
                let prefill = withPrefill && row == 0 && plan.nPrefillRows == manifest.nPrefill && manifest.nPrefill > 1
                let rows = prefill ? manifest.nPrefill : 1
                var output = [Half](repeating: 0, count: rows * nEmbd)
                var mask: [Half] = []
                for line in 0..<rows { mask += tables.maskRow(row + line) }
                let started = now()
                try call(
                    package, prefill ? .prefill : .decode, tables, rows: rows, position: row,
                    input[row * nEmbd..<(row + rows) * nEmbd], mask, state, &output)
                let took = (now() - started) * 1000
                if prefill { result.prefillMs += took } else { times.append(took) }
                for line in 0..<rows {
                    let place = (row + line) * nEmbd
                    let (error, cosine, bad) = compare(
                        input[place..<place + nEmbd], output[line * nEmbd..<(line + 1) * nEmbd],
                        expected[place..<place + nEmbd])
                    errors.append(error)
                    result.cosine = min(result.cosine, cosine)
                    result.nonFinite += bad
                }
                row += rows
            }
            result.medianError = max(result.medianError, median(errors))
            decodes.append(median(times))
        }
        result.decodeMs = decodes.reduce(0, +)
        return result
    }

    private func call(
        _ package: any Package, _ function: PackageFunction, _ tables: Tables, rows: Int, position: Int,
        _ input: ArraySlice<Half>, _ mask: [Half], _ state: any PackageState, _ output: inout [Half]
    ) throws(StageError) {
        var failure: StageError?
        input.withUnsafeBufferPointer { hidden in
            mask.withUnsafeBufferPointer { mask in
                output.withUnsafeMutableBufferPointer { output in
                    let inputs = PackageInputs(
                        rows: rows, hidden: hidden, position: position, cos: tables.cosine(from: position, rows: rows),
                        sin: tables.sine(from: position, rows: rows), mask: mask)
                    do throws(StageError) {
                        try package.evaluate(function, inputs, state: state, into: output)
                    } catch {
                        failure = error
                    }
                }
            }
        }
        if let failure { throw failure }
    }

    /// Relative L2 error and cosine of one row's update, and how many values are not finite.
    private func compare(
        _ input: ArraySlice<Half>, _ output: ArraySlice<Half>, _ expected: ArraySlice<Float>
    ) -> (error: Double, cosine: Double, nonFinite: Int) {
        var difference = 0.0
        var ofOurs = 0.0
        var ofTheirs = 0.0
        var product = 0.0
        var bad = 0
        for ((before, after), wanted) in zip(zip(input, output), expected) {
            let ours = Double(float(after)) - Double(float(before))
            let theirs = Double(wanted) - Double(float(before))
            if !ours.isFinite { bad += 1 }
            difference += (ours - theirs) * (ours - theirs)
            ofOurs += ours * ours
            ofTheirs += theirs * theirs
            product += ours * theirs
        }
        // an update of nothing cannot be compared: both must be nothing
        guard ofTheirs > 0, ofOurs > 0 else { return ofOurs == ofTheirs ? (0, 1, bad) : (1, 0, bad) }
        let error = (difference / ofTheirs).squareRoot()
        let cosine = product / (ofOurs * ofTheirs).squareRoot()
        // NaN compares false with everything: make it a failure
        return (error.isFinite ? error : .greatestFiniteMagnitude, cosine.isFinite ? cosine : -1, bad)
    }

    private func halves(_ offset: Int) -> [Half] {
        data.withUnsafeBytes { bytes in
            (0..<plan.nRows * manifest.dims.nEmbd).map {
                Half(littleEndian: bytes.loadUnaligned(fromByteOffset: offset + 2 * $0, as: UInt16.self))
            }
        }
    }

    private func floats(_ offset: Int) -> [Float] {
        data.withUnsafeBytes { bytes in
            (0..<plan.nRows * manifest.dims.nEmbd).map {
                Float(
                    bitPattern: UInt32(
                        littleEndian: bytes.loadUnaligned(fromByteOffset: offset + 4 * $0, as: UInt32.self)))
            }
        }
    }
}

func median(_ values: [Double]) -> Double {
    values.isEmpty ? 0 : values.sorted()[values.count / 2]
}
