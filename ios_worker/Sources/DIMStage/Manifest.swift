// manifest.json of a package directory (docs/COREML.md): what is in it, how its packages are driven, how they are
// checked. Read once, checked as a whole, then trusted: nothing that drives the packages asks again.
import DIMCrypto
import DIMWire
import Foundation

/// A directory that cannot be served, as one sentence that says what is wrong with which file.
public struct ManifestError: Error, Equatable, CustomStringConvertible {
    public let description: String

    public init(_ description: String) { self.description = description }
}

public struct Manifest: Decodable, Equatable, Sendable {
    public struct Model: Decodable, Equatable, Sendable {
        public let name: String
        public let sha256: String
        /// of the model's settings; missing where who made the packages did not know it
        public let paramsSha256: String?
        public let arch: String
        public let nBlocks: Int
    }

    public struct Slice: Decodable, Equatable, Sendable {
        public let firstBlock: Int
        public let lastBlock: Int
        public let sha256: String
    }

    public struct Dims: Decodable, Equatable, Sendable {
        public let nEmbd: Int
        public let nHead: Int
        public let nHeadKv: Int
        public let headDim: Int
        public let nFf: Int
        public let ffnBounds: [Int]
        public let normEps: Double
        public let qkNorm: Bool
    }

    public struct Rope: Decodable, Equatable, Sendable {
        public let pairing: String
        public let magnitude: Double
        /// (head_dim / 2)
        public let invFreq: [Double]
    }

    public struct Package: Decodable, Equatable, Sendable {
        public let directory: String
        public let firstBlock: Int
        public let lastBlock: Int
        public let stateShape: [Int]
        public let files: [File]
        public let weightFile: String
        public let weights: [Weight]

        public var blocks: ClosedRange<Int> { firstBlock...lastBlock }
        /// bytes of one session's cache
        public var stateBytes: Int { stateShape.reduce(2, *) }
    }

    public struct File: Decodable, Equatable, Sendable {
        public let path: String
        public let bytes: UInt64
        public let sha256: String
    }

    public struct Weight: Decodable, Equatable, Sendable {
        public let name: String
        public let offset: Int
        public let bytes: Int
        public let dtype: String
        /// [outputs, inputs], or [n]
        public let shape: [Int]
        public let rows: [Int]
        public let cols: [Int]
    }

    public struct SelfTest: Decodable, Equatable, Sendable {
        public struct Boundary: Decodable, Equatable, Sendable {
            public let f16Offset: Int
            public let f32Offset: Int
        }

        public let file: String
        public let bytes: Int
        public let sha256: String
        public let nRows: Int
        public let nPrefillRows: Int
        public let boundaries: [Boundary]
    }

    public let format: String
    public let version: Int
    public let model: Model
    public let slice: Slice
    public let dims: Dims
    public let rope: Rope
    public let nCtx: Int
    public let nPrefill: Int
    public let maskValue: Double
    public let residualScale: Double
    public let packages: [Package]
    public let selftest: SelfTest?

    /// Names of the directory's own files. What a peer or a manifest calls them is compared, never opened.
    public static let fileName = "manifest.json"
    public static let selfTestName = "selftest.bin"
    public static func packageName(_ index: Int) -> String {
        "middle-" + (index < 10 ? "0" : "") + String(index) + ".mlpackage"
    }
    public static let packageContents = "Manifest.json"
    public static let packageModel = "Data/com.apple.CoreML/model.mlmodel"
    public static let packageWeights = "Data/com.apple.CoreML/weights/weight.bin"

    /// Reads and checks `directory`'s manifest, and that its files have the sizes it says.
    public static func read(_ directory: URL) throws(ManifestError) -> Manifest {
        let file = directory.appendingPathComponent(fileName)
        let data: Data
        do {
            data = try Data(contentsOf: file)
        } catch {
            throw ManifestError("\(file.path) cannot be read: is this a directory that dim-split --coreml wrote?")
        }
        let manifest = try Manifest(json: data, file: file.path)
        for (index, package) in manifest.packages.enumerated() {
            for listed in package.files {
                try check(
                    directory.appendingPathComponent(packageName(index)).appendingPathComponent(listed.path),
                    has: listed.bytes)
            }
        }
        if let selftest = manifest.selftest {
            try check(directory.appendingPathComponent(selfTestName), has: UInt64(max(0, selftest.bytes)))
        }
        return manifest
    }

    /// Parses and checks a manifest; `file` is its name in errors.
    public init(json: Data, file: String) throws(ManifestError) {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        do {
            self = try decoder.decode(Manifest.self, from: json)
        } catch {
            throw ManifestError("\(file) is no manifest of Core ML packages: \(error)")
        }
        if let fault { throw ManifestError("\(file): \(fault)") }
    }

    /// The first thing that is wrong with the numbers; nil if they fit each other.
    private var fault: String? {
        let heads = dims.nHead
        let kv = dims.nHeadKv
        let half = dims.headDim / 2
        let limit = 1 << 20
        guard format == "dim.coreml" else { return "format is \(format), not dim.coreml" }
        guard version == 1 else { return "version \(version): this program knows version 1" }
        guard
            [dims.nEmbd, heads, kv, dims.headDim, dims.nFf, nCtx, nPrefill, model.nBlocks].allSatisfy({
                (1...limit).contains($0)
            })
        else { return "a dimension is not in 1...\(limit)" }
        guard heads % kv == 0 else { return "n_head \(heads) is no multiple of n_head_kv \(kv)" }
        guard dims.headDim % 2 == 0 else { return "head_dim \(dims.headDim) is odd" }
        guard dims.normEps > 0, dims.normEps < 1 else { return "norm_eps is \(dims.normEps)" }
        guard dims.ffnBounds.count >= 2, dims.ffnBounds.first == 0, dims.ffnBounds.last == dims.nFf,
            zip(dims.ffnBounds, dims.ffnBounds.dropFirst()).allSatisfy({ $0 < $1 })
        else { return "ffn_bounds \(dims.ffnBounds) do not cut 0...\(dims.nFf)" }
        guard rope.pairing == "halves" else { return "rope pairing \(rope.pairing) is not known" }
        guard rope.invFreq.count == half, rope.invFreq.allSatisfy({ $0.isFinite }), rope.magnitude.isFinite else {
            return "rope has \(rope.invFreq.count) frequencies for a head of \(dims.headDim)"
        }
        guard nPrefill <= nCtx else { return "n_prefill \(nPrefill) is more than n_ctx \(nCtx)" }
        guard maskValue < -1000, maskValue >= -65_504 else { return "mask_value is \(maskValue)" }
        guard residualScale > 0, residualScale <= 1, residualScale.significand == 1 else {
            return "residual_scale \(residualScale) is no power of two up to 1"
        }
        guard slice.firstBlock >= 0, slice.firstBlock <= slice.lastBlock, slice.lastBlock < model.nBlocks else {
            return "blocks \(slice.firstBlock)..\(slice.lastBlock) of \(model.nBlocks)"
        }
        if let params = model.paramsSha256, digest(params) == .unknown {
            return "params_sha256 \(shown(params)) is no SHA-256 in 64 hex digits"
        }
        return packageFault ?? selfTestFault
    }

    private var packageFault: String? {
        guard (1...100).contains(packages.count) else { return "\(packages.count) packages" }
        var next = slice.firstBlock
        for (index, package) in packages.enumerated() {
            guard package.directory == Manifest.packageName(index) else {
                return "package \(index) is called \(shown(package.directory))"
            }
            guard package.firstBlock == next, package.lastBlock >= next, package.lastBlock <= slice.lastBlock else {
                return "package \(index) has blocks \(package.firstBlock)..\(package.lastBlock), expected from \(next)"
            }
            next = package.lastBlock + 1
            guard package.stateShape == [2 * package.blocks.count, dims.nHeadKv, nCtx, dims.headDim] else {
                return "package \(index) has a state of shape \(package.stateShape)"
            }
            let ours = [Manifest.packageContents, Manifest.packageModel, Manifest.packageWeights]
            guard Set(package.files.map(\.path)) == Set(ours), package.files.count == ours.count,
                package.weightFile == Manifest.packageWeights
            else { return "package \(index) lists other files than \(ours)" }
        }
        guard next == slice.lastBlock + 1 else { return "the packages end at block \(next - 1)" }
        return nil
    }

    private var selfTestFault: String? {
        guard let selftest else { return nil }
        guard selftest.file == Manifest.selfTestName else { return "selftest is called \(shown(selftest.file))" }
        guard (1...nCtx).contains(selftest.nRows), (0...selftest.nRows).contains(selftest.nPrefillRows),
            selftest.boundaries.count == packages.count + 1
        else { return "selftest has \(selftest.nRows) rows at \(selftest.boundaries.count) boundaries" }
        let values = selftest.nRows * dims.nEmbd
        for boundary in selftest.boundaries {
            guard boundary.f16Offset >= 0, boundary.f32Offset >= 0, boundary.f16Offset <= selftest.bytes - 2 * values,
                boundary.f32Offset <= selftest.bytes - 4 * values
            else { return "selftest's rows lie outside its \(selftest.bytes) bytes" }
        }
        return nil
    }

    private static func check(_ file: URL, has bytes: UInt64) throws(ManifestError) {
        let found = (try? FileManager.default.attributesOfItem(atPath: file.path))?[.size] as? NSNumber
        guard let found else { throw ManifestError("\(file.path) is missing: copy the directory again") }
        guard found.uint64Value == bytes else {
            throw ManifestError("\(file.path) has \(found) bytes, not \(bytes): copy the directory again")
        }
    }
}

/// A digest written as 64 hexadecimal digits; anything else is not known.
func digest(_ text: String) -> Digest { unhex(text).flatMap { Digest($0) } ?? .unknown }
