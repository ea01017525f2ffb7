// A package with exact integer arithmetic in place of a network: it stores one number per row and gives rows that
// depend on every earlier row, on the order of rows, on their positions and on the mask. So a lost, doubled or misplaced
// row, a wrong mask or a wrong chunk changes the answer, and a right one can be computed by anybody:
//
//     key(row at position p) = ((p + 1) * sum over i of (i + 1) * bits(hidden[i])) mod 2^32
//     digest(p)              = sum of key(q) over the columns q whose mask is 0 (all q <= p), mod 2^32
//     hidden_out[i]          = fp16 of ((bits(hidden[i]) + digest(p) + i) mod 2^32 mod 2048)
//
// `bits` are the 16 bits of the fp16 value. Integers below 2,048 are exact in fp16.

import DIMWire

public final class FakePackage: Package {
    private final class State: PackageState {
        var keys: [UInt32]  // (n_ctx)
        init(_ nCtx: Int) { keys = [UInt32](repeating: 0, count: nCtx) }
    }

    public let blocks: ClosedRange<Int>
    private let nEmbd: Int
    private let nCtx: Int
    /// Called before each evaluation: what a test wants to happen there.
    public var before: ((PackageFunction, PackageInputs) throws(StageError) -> Void)?

    public init(blocks: ClosedRange<Int>, nEmbd: Int, nCtx: Int) {
        self.blocks = blocks
        self.nEmbd = nEmbd
        self.nCtx = nCtx
    }

    public func makeState() -> any PackageState { State(nCtx) }

    public func evaluate(
        _ function: PackageFunction, _ inputs: PackageInputs, state: any PackageState,
        into output: UnsafeMutableBufferPointer<Half>
    ) throws(StageError) {
        try before?(function, inputs)
        guard let state = state as? State else { throw .compute("a state of another package") }
        for row in 0..<inputs.rows {
            let hidden = inputs.hidden[row * nEmbd..<(row + 1) * nEmbd]
            state.keys[inputs.position + row] = FakePackage.key(hidden, position: inputs.position + row)
        }
        for row in 0..<inputs.rows {
            var digest: UInt32 = 0
            for column in 0..<nCtx where inputs.mask[row * nCtx + column] == 0 { digest &+= state.keys[column] }
            for index in 0..<nEmbd {
                let value = (UInt32(inputs.hidden[row * nEmbd + index]) &+ digest &+ UInt32(index)) % 2048
                output[row * nEmbd + index] = FakePackage.integers[Int(value)]
            }
        }
    }

    private static func key(_ hidden: Slice<UnsafeBufferPointer<Half>>, position: Int) -> UInt32 {
        var sum: UInt32 = 0
        var factor: UInt32 = 1
        for bits in hidden {
            sum &+= factor &* UInt32(bits)
            factor &+= 1
        }
        return sum &* UInt32(position + 1)
    }

    /// fp16 of 0...2047
    private static let integers: [Half] = (0..<2048).map { half(Float($0)) }
}

extension PackagedStage {
    /// A stage of fake packages, one per block, for tests and `--fake`.
    public static func fake(shape: StageShape, nPrefill: Int = 16) -> PackagedStage {
        let packages = (shape.firstBlock...shape.lastBlock).map {
            FakePackage(blocks: $0...$0, nEmbd: shape.nEmbd, nCtx: shape.nCtx)
        }
        let parameters = Parameters(headDim: 2, nPrefill: min(nPrefill, shape.nCtx), inverseFrequencies: [1])
        return PackagedStage(shape: shape, parameters: parameters, packages: packages)
    }
}

/// Gives rows back as they came: what a round trip costs without any arithmetic.
public final class EchoStage: Stage {
    public let shape: StageShape

    public init(shape: StageShape) { self.shape = shape }

    public func reset() {}
    public func rewind(session: UInt32, position: UInt32) {}
    public func end(session: UInt32) {}

    public func evaluate(_ step: Step, into output: UnsafeMutableRawBufferPointer) {
        step.rows.hidden.withUnsafeBytes { output.copyMemory(from: $0) }
    }
}
