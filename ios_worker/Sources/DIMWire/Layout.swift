// What a row is made of (docs/PROTOCOL.md section 5.1), and what follows for the lengths of STEP and STEP_DONE. Read here in
// full, so that a worker can say what it has and refuse what it lacks; this package's stages have one hidden row.

/// One of the tensors that make a row.
public struct Part: Hashable, Sendable {
    public enum Kind: UInt8, Sendable, CaseIterable {
        case f16 = 1
        case f32 = 2
        case i32 = 3
    }

    public var kind: Kind
    /// to F16, on the wire; f32 only
    public var mayRound: Bool
    /// of each token
    public var values: UInt32

    public init(_ kind: Kind, mayRound: Bool = false, values: UInt32) {
        self.kind = kind
        self.mayRound = mayRound
        self.values = values
    }

    static let bytes = 8

    /// bytes of each token in rows of this format
    func bytes(_ format: RowFormat) -> UInt64 {
        let width: UInt64 = dtype(in: format) == .f16 ? 2 : 4
        return UInt64(values) * width
    }
}

/// What a row is made of, part after part. Without a part: not known, or there are no rows.
public struct Layout: Hashable, Sendable, CustomStringConvertible {
    public var parts: [Part] = []

    public init(_ parts: [Part] = []) { self.parts = parts }

    /// One hidden row, which may be rounded: what most models have.
    public static func hidden(_ nEmbd: Int) -> Layout {
        Layout([Part(.f32, mayRound: true, values: UInt32(clamping: nEmbd))])
    }

    /// Bytes of a row; nil if there are more than any message has.
    func bytes(_ format: RowFormat) -> UInt64? {
        // 128 parts of 2^32 values of 4 bytes still fit
        let sum = parts.reduce(0) { $0 + $1.bytes(format) }
        return sum <= Limit.stepMessage ? sum : nil
    }

    public var description: String {
        parts.isEmpty ? "no rows" : parts.map { "\($0.values) \($0.kind)" }.joined(separator: " + ")
    }
}

/// What rows of a connection are.
public struct Shape: Hashable, Sendable {
    public var input = Layout()
    public var output = Layout()
    /// token ids go to the worker beside the rows
    public var readsTokens = false

    public init(input: Layout = Layout(), output: Layout = Layout(), readsTokens: Bool = false) {
        self.input = input
        self.output = output
        self.readsTokens = readsTokens
    }

    /// One hidden row each way.
    public static func hidden(_ nEmbd: Int) -> Shape { Shape(input: .hidden(nEmbd), output: .hidden(nEmbd)) }

    public var isKnown: Bool { !input.parts.isEmpty || !output.parts.isEmpty }

    /// Bytes of the token ids of so many rows, with what fills them up.
    func tokenBytes(_ rows: UInt32) -> UInt64 { readsTokens ? (4 * UInt64(rows) + 7) / 8 * 8 : 0 }

    init(from reader: inout Reader) throws(RuleBroken) {
        let tokens = try reader.u8()
        guard tokens <= 1 else { throw RuleBroken(.badValue, "token ids \(tokens)") }
        readsTokens = tokens == 1
        let counts = [Int(try reader.u8()), Int(try reader.u8())]
        try reader.zeros(5)
        input = try Layout(from: &reader, count: counts[0])
        output = try Layout(from: &reader, count: counts[1])
    }

    func write(to writer: inout Writer) {
        writer.u8(readsTokens ? 1 : 0)
        writer.u8(UInt8(clamping: input.parts.count))
        writer.u8(UInt8(clamping: output.parts.count))
        writer.zeros(5)
        for part in input.parts + output.parts {
            writer.u8(part.kind.rawValue)
            writer.u8(part.mayRound ? 1 : 0)
            writer.u16(0)
            writer.u32(part.values)
        }
    }
}

extension Layout {
    fileprivate init(from reader: inout Reader, count: Int) throws(RuleBroken) {
        guard count <= Limit.parts else { throw RuleBroken(.badValue, "\(count) parts of a row") }
        for _ in 0..<count {
            let kind = try reader.u8()
            let flags = try reader.u8()
            try reader.zeros(2)
            let values = try reader.u32()
            guard let known = Part.Kind(rawValue: kind) else { throw RuleBroken(.badValue, "part type \(kind)") }
            guard flags == 0 || (flags == 1 && known == .f32) else {
                throw RuleBroken(.badValue, "part flags \(flags)")
            }
            guard values >= 1, known != .f16 || values % 2 == 0 else {
                throw RuleBroken(.badValue, "\(values) values of a part")
            }
            parts.append(Part(known, mayRound: flags == 1, values: values))
        }
    }
}
